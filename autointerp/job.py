"""The requests of one call under way: sent by several workers, committed in groups, retried."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autointerp import structured
from autointerp.ledger import Answer, EgressLog, Logprobs
from hooks.files import EndpointError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

    from autointerp.client import Client, Reply, Request
    from autointerp.display import JobDisplay

LONGEST_PAUSE = 30.0
"""Seconds between retries where the server names none."""
AT_ONCE = 3
"""Times a request is sent again without a pause while others are answered, if its failure says
nothing about load: a server error, a lost connection, a torn reply."""
_TURNED_DOWN = (401, 403, 404)
"""Statuses that every other request would meet too."""
_TRANSIENT = (408, 409, 425, 429)


@dataclass
class Item:
    """A request on its way to an answer."""

    request: Request
    body: dict[str, Any]
    key: str
    expected: tuple[int, int]
    answer: Answer | None = None
    value: Any = None
    tries: int = 0
    repaired: bool = False


class Failure(Exception):
    """An attempt that brought no answer."""

    def __init__(
        self,
        what: str,
        *,
        again: bool,
        pause: float | None = None,
        billed: bool = False,
        busy: bool = True,
    ) -> None:
        super().__init__(what)
        self.what, self.again, self.pause, self.billed = what, again, pause, billed
        self.busy = busy
        self.turned_down = False


class Unsupported(Exception):
    """The endpoint does not know ``response_format``, or ``logprobs``."""


class Job:
    """Sends what the ledger lacks of ``requests``."""

    def __init__(self, client: Client, requests: Sequence[Request]) -> None:
        self.client = client
        self._order: list[Item] = []
        by_key: dict[str, Item] = {}
        for request in requests:
            item = self._item(request)
            self._order.append(by_key.setdefault(item.key, item))
        self.items = list(by_key.values())
        self._open = set()
        self._finished_items: set[int] = set()
        self._failed: list[Failure] = []
        self._answered = self._retries = self._fruitless = 0
        self._failures_in_a_row = 0
        self._stop: EndpointError | None = None
        self._done = False
        self._pending: list[tuple[Item, Answer]] = []
        plain = [self._without_logprobs(item)[1] for item in self.items if _tells(item)]
        kept = client.ledger.find([*by_key, *plain])
        self.unsent = [item for item in self.items if not self._finished(item, kept)]

    def _item(self, request: Request) -> Item:
        extra: dict[str, Any] = {}
        messages = request.messages
        if request.schema is not None:
            if self.client.no_schema:
                messages = structured.in_words(messages, request.schema)
            else:
                extra["response_format"] = structured.response_format(request.schema)
        if request.top_logprobs and not self.client.no_logprobs:
            extra |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        body = self.client.body(messages, request.max_tokens, **extra)
        return Item(request, body, self.client.key(body), self.client.expected(body))

    def _finished(self, item: Item, kept: Mapping[str, Answer]) -> bool:
        answer = kept.get(item.key)
        if answer is None and _tells(item):
            # The same question was paid for without log-probabilities: they are not worth a second.
            body, key = self._without_logprobs(item)
            if (answer := kept.get(key)) is not None:
                self._ask_instead(item, body)
        return answer is not None and (self._accept(item, answer) or self._from_ledger(item))

    def _without_logprobs(self, item: Item) -> tuple[dict[str, Any], str]:
        body = {k: v for k, v in item.body.items() if k not in ("logprobs", "top_logprobs")}
        return body, self.client.key(body)

    def _outdated(self, item: Item) -> bool:
        """Whether an item asks for what the endpoint has turned down since it was queued."""
        client, body = self.client, item.body
        return (client.no_logprobs and "logprobs" in body) or (
            client.no_schema and "response_format" in body
        )

    def _from_ledger(self, item: Item) -> bool:
        """Finish an item with answers that are kept, a repair's included."""
        while (answer := self.client.ledger.find([item.key]).get(item.key)) is not None:
            if self._accept(item, answer):
                return True
        return False

    def _accept(self, item: Item, answer: Answer) -> bool:
        """Whether the answer ends the item; if not, the item has become its own repair."""
        item.answer = answer
        schema = item.request.schema
        if schema is None or answer.refused:
            return True
        value = structured.read(answer.text, schema)
        if not isinstance(value, str):
            item.value = value
            return True
        if item.repaired:
            return True
        repair = structured.repair_messages(item.body["messages"], answer.text, value)
        self._ask_instead(item, {**item.body, "messages": repair})
        item.repaired = True
        return False

    def _ask_instead(self, item: Item, body: dict[str, Any]) -> None:
        item.body, item.key = body, self.client.key(body)
        item.expected, item.tries = self.client.expected(body), 0

    def replies(self) -> list[Reply]:
        """A reply for each request, after :meth:`run`."""
        from autointerp.client import Reply

        replies = []
        for item in self._order:
            answer = item.answer or Answer("", refused=True)
            text = "" if answer.refused else answer.text
            replies.append(Reply(text, answer.refused, item.value, answer.logprobs))
        return replies

    async def run(self, display: JobDisplay) -> None:
        """Send, retry and commit until nothing is open or the job must stop."""
        self._display = display
        self._queue: asyncio.PriorityQueue[tuple[int, int, Item | None]] = asyncio.PriorityQueue()
        self._serial = 0
        self._over, self._arrived = asyncio.Event(), asyncio.Event()
        self._open = {id(item) for item in self.unsent}
        for item in self.unsent:
            self._put(item, 1)
        n = min(self.client.config.limits.concurrency, len(self.unsent))
        self._log = EgressLog(self.client.ledger.path.with_name("requests.jsonl"))
        endpoint = self._endpoint()
        try:
            async with asyncio.TaskGroup() as group:
                committer = group.create_task(self._commit_arrivals())
                workers = [group.create_task(self._work(endpoint)) for _ in range(n)]
                await self._over.wait()
                for _ in workers:
                    self._put(None, 0)
                await asyncio.wait(workers)
                self._done = True
                self._arrived.set()
                await committer
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            if self._pending:  # an interrupt or an error came between arrival and commit
                self.client.ledger.commit({item.key: answer for item, answer in self._pending})
            await endpoint.close()
            self._log.close()
        self._raise_failures()

    def _raise_failures(self) -> None:
        if self._stop is not None:
            raise self._stop
        if self._failed:
            first = self._failed[0].what
            if len(self.items) > 1:
                n, of = len(self._failed), len(self.items)
                first = f"failed {n} of {of} requests, the first: it {first}"
            raise self.client.error(first)

    def _put(self, item: Item | None, priority: int) -> None:
        """Queue an item; retries and repairs, and the end, come before what was never sent."""
        self._serial += 1
        self._queue.put_nowait((priority, self._serial, item))

    def _endpoint(self) -> AsyncOpenAI:
        """The SDK's client; no redirect is followed, and on this machine no proxy is asked, since
        either would carry text to a host nobody named."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        from autointerp.transport import Direct

        config = self.client.config
        local = urlsplit(config.base_url).scheme == "http" and not config.remote

        async def log(request: Any) -> None:
            n_bytes = int(request.headers.get("content-length", 0))
            self._log.write(request.url.host, n_bytes, request.headers["idempotency-key"])

        return AsyncOpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=config.timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(
                follow_redirects=False,
                trust_env=config.remote,
                event_hooks={"request": [log]},
                transport=Direct() if local else None,
            ),
        )

    async def _work(self, endpoint: AsyncOpenAI) -> None:
        budget = self.client.budget
        while True:
            _, _, item = await self._queue.get()
            if item is None or self._stop is not None:
                return
            if self._outdated(item):
                self._adapt(item)
                continue
            expected, used = item.expected, (0, 0)
            if (refusal := budget.refusal(*expected)) is not None:
                error = self.client.error(refusal, "raise the limit and run again")
                error.resumable = True
                self._stop_with(error)
                return
            try:
                await self._wait_turn(expected)
                answer = await self._attempt(endpoint, item)
                used = (answer.tokens_in, answer.tokens_out)
                self._fruitless = self._failures_in_a_row = 0
                self._pending.append((item, answer))
                self._arrived.set()
            except Unsupported:
                self._adapt(item)
            except Failure as failure:
                used = expected if failure.billed else used
                self._failure(item, failure)
            finally:
                budget.settle(expected, used)
            self._show()

    def _adapt(self, item: Item) -> None:
        """Ask without what the endpoint does not know, unless that was answered already."""
        self._ask_instead(item, self._item(item.request).body)
        if self._from_ledger(item):
            self._close(item)
        else:
            self._put(item, 0)

    async def _wait_turn(self, expected: tuple[int, int]) -> None:
        pause = max(
            self.client.request_pace.reserve(1), self.client.token_pace.reserve(sum(expected))
        )
        if pause:
            await asyncio.sleep(pause)

    def _failure(self, item: Item, failure: Failure) -> None:
        """Try again later, give the item up, or stop the job."""
        self._failures_in_a_row += 1
        if failure.turned_down:
            self._stop_with(self.client.error(failure.what))
        elif failure.again and item.tries < self.client.config.max_retries:
            item.tries += 1
            self._retries += 1
            pause = failure.pause
            if pause is None and not failure.busy and self._well(item):
                pause = 0.0
            if pause is None:
                longest = min(LONGEST_PAUSE, self.client.config.backoff * 2 ** (item.tries - 1))
                pause = longest * (1 - random.random() / 2)
            asyncio.get_running_loop().call_later(pause, self._put, item, 0)
        else:
            self._failed.append(failure)
            self._fruitless += 1
            self._close(item)
            # With nothing answered in between, the endpoint is down and the rest would fail too.
            if self._fruitless >= max(8, self.client.config.limits.concurrency):
                self._stop_with(self.client.error(f"keeps failing: it {failure.what}"))

    def _well(self, item: Item) -> bool:
        """Whether the endpoint answers others, as far as the last few attempts tell."""
        return item.tries <= AT_ONCE and self._failures_in_a_row <= AT_ONCE

    def _stop_with(self, error: EndpointError) -> None:
        if self._stop is None:
            self._stop = error
        self._over.set()

    def _close(self, item: Item) -> None:
        self._open.discard(id(item))
        if not self._open:
            self._over.set()

    async def _commit_arrivals(self) -> None:
        """Commit what arrived while the last commit was written, all at once."""
        while self._pending or not self._done:
            if not self._pending:
                await self._arrived.wait()
            self._arrived.clear()
            batch = self._pending[:]
            if not batch:
                continue
            answers = {item.key: answer for item, answer in batch}
            await asyncio.to_thread(self.client.ledger.commit, answers)
            del self._pending[: len(batch)]
            for item, answer in batch:
                self._committed(item, answer)
            self._show()

    def _committed(self, item: Item, answer: Answer) -> None:
        if self._accept(item, answer) or self._from_ledger(item):
            self._answered += 1
            self._close(item)
        else:
            self._put(item, 0)

    def _show(self) -> None:
        limits = self.client.config.limits
        cost = None if limits.price_in is None else self.client.budget.spent
        kept = len(self.items) - len(self.unsent)
        self._display.update(kept + self._answered, len(self._failed), self._retries, cost)

    async def _attempt(self, endpoint: AsyncOpenAI, item: Item) -> Answer:
        from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

        config = self.client.config
        try:
            reply: Any = await endpoint.post(
                "/chat/completions",
                cast_to=object,
                body=item.body,
                # A server that knows the key does not charge twice for a request whose answer a
                # crash kept from us.
                options={"headers": {"Idempotency-Key": item.key}},
            )
        except APITimeoutError:
            raise Failure(
                f"did not answer within {config.timeout:.0f} s; give it more time",
                again=True,
                billed=True,
            ) from None
        except APIConnectionError as error:
            raise Failure(
                f"cannot be reached ({error.__cause__ or error}); start it", again=True, busy=False
            ) from None
        except APIStatusError as error:
            return self._refused(item, error)
        except (APIError, ValueError):
            reply = None
        return self._read(item, reply)

    def _read(self, item: Item, reply: Any) -> Answer:
        try:
            choice = reply["choices"][0]
            message, usage = choice["message"], reply.get("usage") or {}
            refusal, text = message.get("refusal"), message.get("content") or ""
        except (TypeError, KeyError, IndexError, AttributeError):
            raise Failure(
                "sent replies that are no chat completions; check that the URL is an "
                "OpenAI-compatible one",
                again=True,
                billed=True,
                busy=False,
            ) from None
        refused = bool(refusal) or choice.get("finish_reason") == "content_filter"
        tokens_in = int(usage.get("prompt_tokens") or item.expected[0])
        tokens_out = int(usage.get("completion_tokens") or item.expected[1])
        logprobs = None if refused else _logprobs(choice)
        return Answer(str(refusal or text), refused, tokens_in, tokens_out, logprobs)

    def _refused(self, item: Item, error: APIStatusError) -> Answer:
        return self._status(
            item, error.status_code, error.code, str(error.message), error.response.headers
        )

    def _status(
        self, item: Item, status: int, code: str | None, message: str, headers: Mapping[str, str]
    ) -> Answer:
        """What a status other than success means."""
        detail = " ".join(message.split())[:200]
        if status == 400 and "content_filter" in f"{code} {detail}":
            return Answer(detail, refused=True)
        if status in (400, 422) and "response_format" in item.body and "response_format" in detail:
            self.client.no_schema = True
            raise Unsupported
        if status in (400, 403, 422) and _tells(item) and "logprobs" in detail:
            self.client.no_logprobs = True
            raise Unsupported
        failure = Failure(
            f"refused with status {status}: {detail}; check the model name and key",
            again=status in _TRANSIENT or status >= 500,
            pause=_named_pause(headers),
            busy=status != 500,
        )
        failure.turned_down = status in _TURNED_DOWN
        raise failure from None


def _tells(item: Item) -> bool:
    """Whether a request asks for log-probabilities."""
    return "logprobs" in item.body


def _logprobs(choice: Mapping[str, Any]) -> Logprobs | None:
    """Those of a reply; ``None`` where none were asked for, or the endpoint took no notice."""
    try:
        return [
            {str(top["token"]): float(top["logprob"]) for top in token["top_logprobs"]}
            for token in choice["logprobs"]["content"]
        ]
    except (KeyError, TypeError, ValueError):
        return None


def _named_pause(headers: Any) -> float | None:
    """Seconds until a server wants to be asked again, if it says so."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" not in headers:
            return None
        text = headers["retry-after"]
        try:
            return max(0.0, float(text))
        except ValueError:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
