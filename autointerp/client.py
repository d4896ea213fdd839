"""Requests to an OpenAI-compatible endpoint, each paid for once."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from autointerp.display import JobDisplay
from autointerp.ledger import Ledger, Logprobs
from autointerp.limits import (
    Budget,
    Count,
    Estimate,
    Limits,
    Messages,
    Pace,
    count_tokens,
    n_images,
)
from hooks.files import ConfigError, EndpointError, fingerprint

if TYPE_CHECKING:
    from autointerp.batch import BatchConfig

__all__ = ["Client", "EndpointConfig", "Ledger", "Messages", "Reply", "Request"]

T = TypeVar("T")


@dataclass(frozen=True)
class EndpointConfig:
    """Where requests go."""

    base_url: str
    """For example ``http://127.0.0.1:8000/v1``."""
    model: str
    """Model name as the endpoint knows it."""
    allow_remote: str | None = None
    """Host name of a machine that report text may be sent to; loopback needs no leave."""
    allow_remote_images: str | None = None
    """Host name of a machine that films may be sent to; leave for text is not leave for films,
    since what is burnt into pixels, such as a name, cannot be redacted."""
    timeout: float = 120.0
    """Seconds a request may take."""
    max_retries: int = 5
    """Of connection failures, rate limits, server errors and replies that are no JSON."""
    backoff: float = 0.5
    """Seconds before the first retry where the server names none; doubles, up to 30, each less up
    to half by chance."""
    redact: bool = True
    """Take identifiers out of text for another machine (:mod:`autointerp.redact`)."""
    limits: Limits = field(default_factory=Limits)
    """Rates and budget."""

    def __post_init__(self) -> None:
        host = urlsplit(self.base_url).hostname
        if host is None:
            raise EndpointError(
                f"endpoint {self.base_url!r} is not a URL; write http://HOST:PORT/v1"
            )
        if self.remote and host != self.allow_remote:
            raise EndpointError(
                f"endpoint host {host!r} is not this machine, and report text would be sent to it; "
                f"if your data agreement allows that, pass --allow-remote {host}"
            )
        if self.timeout <= 0 or self.max_retries < 0 or self.backoff < 0:
            raise ConfigError(
                f"timeout {self.timeout}, max_retries {self.max_retries}, backoff {self.backoff}: "
                "give a positive timeout, and no negative number"
            )

    @cached_property
    def remote(self) -> bool:
        """Whether text leaves this machine."""
        return not _is_loopback(urlsplit(self.base_url).hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Request(NamedTuple):
    """One question."""

    messages: Messages
    max_tokens: int
    schema: type[BaseModel] | None = None
    """What the reply must be read as; the endpoint is held to it where it can be."""
    top_logprobs: int = 0
    """How many likeliest tokens to tell, for each of the reply's, with their log-probabilities;
    an endpoint that cannot is asked without."""


class Reply(NamedTuple):
    """What came back."""

    text: str
    refused: bool
    """Whether the model declined."""
    value: BaseModel | None
    """The reply read by the request's schema; ``None`` without one, or if one repair failed."""
    logprobs: Logprobs | None = None
    """Of each token; ``None`` where they were not asked for, or the endpoint told none."""


class Client:
    """Asks an endpoint, through a ledger; greedy decoding, so that an answer can be reused.

    The requests run in an event loop of a thread of their own, so the methods work where a loop
    runs already, as in Jupyter. Every request that leaves is listed in ``requests.jsonl`` beside
    the ledger. Retries are this library's, not the SDK's: they give their place to other
    requests while they wait, and each is paced, budgeted and listed.

    Parameters
    ----------
    count
        Tokens of a text, for estimates; without it, a token for four characters.
    """

    def __init__(self, config: EndpointConfig, ledger: Ledger, count: Count | None = None) -> None:
        self.config, self.ledger, self.count = config, ledger, count
        self.budget = Budget(config.limits, (0, 0))
        self.budget.spent = self.spent()
        self.request_pace = Pace(config.limits.requests_per_minute)
        self.token_pace = Pace(config.limits.tokens_per_minute)
        self.no_schema = False
        """Whether the endpoint turned ``response_format`` down; the prompt says it then."""
        self.no_logprobs = False
        """Whether the endpoint turned ``logprobs`` down."""
        self._one_job = threading.Lock()

    def ask(
        self, messages: Messages, max_tokens: int, schema: type[BaseModel] | None = None
    ) -> str:
        """The endpoint's reply to ``messages``, or the recorded one; empty if it declined.

        Raises
        ------
        EndpointError
            If the endpoint cannot be reached or refuses, after retries.
        """
        return self.ask_all([Request(messages, max_tokens, schema)])[0].text

    def spent(self, batch_factor: float = 0.5) -> float:
        """What everything in the ledger cost, answers by batch at their share of the price."""
        cost = self.config.limits.cost
        alone, batched = self.ledger.tokens(batched=False), self.ledger.tokens(batched=True)
        return (cost(*alone) or 0.0) + batch_factor * (cost(*batched) or 0.0)

    def ask_all(
        self,
        requests: Sequence[Request],
        name: str = "ask",
        *,
        batch: BatchConfig | None = None,
        wait: bool = True,
    ) -> list[Reply]:
        """Replies in the order of ``requests``; only what the ledger lacks is sent, each once.

        Parameters
        ----------
        batch
            Ask through the provider's Batch API (:mod:`autointerp.batch`); the same answers are
            found in the same ledger.
        wait
            Wait for batches; otherwise submit, collect what is there, and raise a resumable error
            if any is still running.

        Raises
        ------
        EndpointError
            If the budget is used up, the endpoint turns this client down, or a request failed
            after its retries. Every answer until then is kept: run again for the rest.
        FolderError
            If another process sends requests for this ledger.
        """
        from autointerp.batch import BatchJob
        from autointerp.job import Job

        with self._one_job:
            job = BatchJob(self, requests, batch) if batch else Job(self, requests)
            if job.unsent:
                total = len(job.items)
                with (
                    self.ledger.claimed(),
                    JobDisplay(name, total, total - len(job.unsent), total > 1) as display,
                ):
                    if isinstance(job, BatchJob):
                        job.collect(display, wait)
                        self.budget.spent = self.spent()
                    else:
                        _in_thread(job.run(display))
            return job.replies()

    def estimate(self, requests: Sequence[Request], batch: BatchConfig | None = None) -> Estimate:
        """What :meth:`ask_all` would send, by its ledger; repairs and retries come on top."""
        from autointerp.job import Job

        job = Job(self, requests)
        tokens_in = sum(item.expected[0] for item in job.unsent)
        tokens_out = sum(item.expected[1] for item in job.unsent)
        cost = self.config.limits.cost(tokens_in, tokens_out)
        return Estimate(
            requests=len(job.unsent),
            kept=len(job.items) - len(job.unsent),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=None if cost is None else cost * (batch.price_factor if batch else 1.0),
        )

    def body(self, messages: Messages, max_tokens: int, **extra: Any) -> dict[str, Any]:
        """The body of a request, identifiers taken out where it goes to another machine.

        Raises
        ------
        EndpointError
            If films would go to a machine that ``allow_remote_images`` does not name.
        """
        self._check_images(messages)
        return {
            "model": self.config.model,
            "messages": [{**m, "content": self._clean(m["content"])} for m in messages],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            **extra,
        }

    def _check_images(self, messages: Messages) -> None:
        host = urlsplit(self.config.base_url).hostname
        allowed = not self.config.remote or host == self.config.allow_remote_images
        if not allowed and n_images(messages):
            raise EndpointError(
                f"endpoint host {host!r} is not this machine, and films would be sent to it, whose "
                "pixels no redaction cleans; if your data agreement allows that, pass "
                f"--allow-remote-images {host}"
            )

    def _clean(self, content: Any) -> Any:
        from autointerp.redact import redact

        if not (self.config.remote and self.config.redact):
            return content
        if isinstance(content, str):
            return redact(content)
        return [
            {**part, "text": redact(part["text"])} if part["type"] == "text" else part
            for part in content
        ]

    def error(self, what: str, then: str = "then run again") -> EndpointError:
        """An error that says what is kept."""
        kept = len(self.ledger)
        error = EndpointError(
            f"endpoint {self.config.base_url} {what}, {then}: {kept} finished requests are kept"
        )
        error.resumable = kept > 0
        return error

    def expected(self, body: dict[str, Any]) -> tuple[int, int]:
        """Tokens in by the estimate, and out at most."""
        per_image = self.config.limits.tokens_per_image
        return count_tokens(body["messages"], self.count, per_image), body["max_tokens"]

    @staticmethod
    def key(body: dict[str, Any]) -> str:
        """Under which an answer to ``body`` is kept."""
        return fingerprint(body)


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a thread; an interrupt cancels it, and what came is kept."""
    outcome: list[T] = []
    failure: list[BaseException] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            outcome.append(loop.run_until_complete(task))
        except (Exception, asyncio.CancelledError) as error:
            failure.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name="requests", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if failure:
        raise failure[0]
    return outcome[0]
