"""The provider's Batch API: requests in files, answered within a day at a lower price.

What is submitted is planned in the ledger first, and each batch carries the hash of its plan.
After a crash at any instant the plan says which requests are out, and the hash finds their batch
again, so that none is submitted, and paid, twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autointerp.job import Failure, Item, Job, Unsupported
from autointerp.ledger import Answer, EgressLog, Plan
from autointerp.limits import Budget
from hooks.files import ConfigError, EndpointError, fingerprint

if TYPE_CHECKING:
    from openai import OpenAI

    from autointerp.client import Client, Request
    from autointerp.display import JobDisplay

MARK = "maira_sae_plan"
"""Under this name a batch's metadata holds the hash of its plan."""
_OVER = ("completed", "expired", "cancelled", "failed")
_FULL = ("token_limit_exceeded", "enqueued")
"""What a validation error says when too many tokens wait already."""


@dataclass(frozen=True)
class BatchConfig:
    """How requests are cut into batches and waited for."""

    max_requests: int = 50_000
    """Requests in a file."""
    max_bytes: int = 200_000_000
    """Of a file; images in the requests reach this first."""
    poll: float = 10.0
    """Seconds before the first look at a batch; doubles with every look that finds none ended."""
    longest_poll: float = 300.0
    """Seconds between looks, at most."""
    max_rounds: int = 6
    """Times a request may be submitted."""
    price_factor: float = 0.5
    """Of the prices in the limits."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_bytes", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.poll <= 0 or self.longest_poll < self.poll or not 0 < self.price_factor <= 1:
            raise ConfigError(
                f"poll {self.poll}, longest_poll {self.longest_poll}, price_factor "
                f"{self.price_factor}: give 0 < poll <= longest_poll and 0 < price_factor <= 1"
            )


def line_of(item: Item) -> bytes:
    """A request as a line of a batch's file."""
    line = {
        "custom_id": item.key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": item.body,
    }
    return (json.dumps(line) + "\n").encode()


def cut(items: Sequence[Item], max_requests: int, max_bytes: int) -> Iterator[list[Item]]:
    """Consecutive items whose lines fit a file.

    Raises
    ------
    ConfigError
        If a request alone is larger than a file may be.
    """
    group: list[Item] = []
    size = 0
    for item in items:
        n = len(line_of(item))
        if n > max_bytes:
            raise ConfigError(
                f"a request has {n:,} bytes and a batch's file may have {max_bytes:,}; show "
                "smaller or fewer images, or raise max_bytes"
            )
        if group and (len(group) == max_requests or size + n > max_bytes):
            yield group
            group, size = [], 0
        group.append(item)
        size += n
    if group:
        yield group


class BatchJob(Job):
    """Gets what the ledger lacks of ``requests`` by batches."""

    def __init__(self, client: Client, requests: Sequence[Request], config: BatchConfig) -> None:
        super().__init__(client, requests)
        self.batch = config
        self._rounds: dict[str, int] = {}
        self._most, self._one_at_a_time = config.max_requests, False
        limits, factor = client.config.limits, config.price_factor
        if limits.price_in is not None and limits.price_out is not None:
            limits = replace(
                limits, price_in=limits.price_in * factor, price_out=limits.price_out * factor
            )
        self.budget = Budget(limits, (0, 0))
        self.budget.spent = client.spent(factor)

    def collect(self, display: JobDisplay, wait: bool) -> None:
        """Submit, wait, read, and submit again what came back unanswered.

        Raises
        ------
        EndpointError
            If the endpoint refuses, the budget is used up, requests failed, or, without ``wait``,
            batches are still running; all but the first can be resumed.
        """
        self._display = display
        self._log = EgressLog(self.client.ledger.path.with_name("requests.jsonl"))
        try:
            with self._endpoint() as endpoint:
                self._guarded(endpoint, wait)
        finally:
            self._log.close()
        self._raise_failures()

    def _guarded(self, endpoint: OpenAI, wait: bool) -> None:
        from openai import APIConnectionError, APIStatusError

        try:
            self._rounds_of(endpoint, wait)
        except APIConnectionError as error:
            raise self.client.error(f"cannot be reached ({error.__cause__ or error})") from None
        except APIStatusError as error:
            detail = " ".join(str(error.message).split())[:200]
            raise self.client.error(
                f"refused with status {error.status_code}: {detail}; check that it offers files "
                "and batches"
            ) from None

    def _rounds_of(self, endpoint: OpenAI, wait: bool) -> None:
        ledger, pause = self.client.ledger, self.batch.poll
        reserved: set[str] = set()
        waiting = list(self.unsent)
        while waiting:
            plans = ledger.plans()
            self._reserve(plans, waiting, reserved)
            out = {key for plan in plans for key in plan.keys}
            new = [item for item in waiting if item.key not in out]
            for group in cut(new, self._most, self.batch.max_bytes):
                if self._one_at_a_time and plans:
                    break
                self._afford(group)
                plans.append(self._plan(group))
                reserved.add(plans[-1].hash)
            # Also for plans just made: a ledger that was lost does not pay for its batches again.
            if any(plan.batch is None for plan in plans):
                self._adopt(endpoint, plans)
                plans = ledger.plans()
            for i, plan in enumerate(plans):
                if plan.batch is None:
                    plans[i] = self._submit(endpoint, plan, waiting)
            ended = [plan for plan in plans if self._ended(endpoint, plan)]
            waiting = [item for item in waiting if id(item) not in self._finished_items]
            if ended:
                pause = self.batch.poll
            elif waiting:
                if not wait:
                    error = self.client.error(
                        f"works on {len(waiting)} requests in {len(plans)} batches",
                        "run again to collect them",
                    )
                    error.resumable = True
                    raise error
                time.sleep(pause)
                pause = min(2 * pause, self.batch.longest_poll)

    def _plan(self, group: Sequence[Item]) -> Plan:
        """Write down what is about to be submitted, before anything is."""
        keys = tuple(item.key for item in group)
        rounds = max(self._rounds.get(key, 0) for key in keys)
        plan = Plan(fingerprint([*keys, self.client.ledger.n_plans_of(keys[0])]), keys, None)
        self.client.ledger.plan(plan)
        for key in keys:
            self._rounds[key] = rounds + 1
        return plan

    def _afford(self, group: Sequence[Item]) -> None:
        for n, item in enumerate(group):
            refusal = self.budget.refusal(*item.expected)
            if refusal is not None:
                for given in group[:n]:
                    self.budget.settle(given.expected, (0, 0))
                error = self.client.error(refusal, "raise the limit and run again")
                error.resumable = True
                raise error

    def _reserve(self, plans: Sequence[Plan], waiting: Sequence[Item], reserved: set[str]) -> None:
        """Set aside what batches of an earlier run may cost: they are out, whatever the budget."""
        expected = {item.key: item.expected for item in waiting}
        for plan in plans:
            if plan.hash not in reserved:
                reserved.add(plan.hash)
                for key in plan.keys:
                    if key in expected:
                        self.budget.reserve(*expected[key])

    def _adopt(self, endpoint: OpenAI, plans: Sequence[Plan]) -> None:
        """Find the batches of plans whose batch was not recorded before a crash."""
        lost = {plan.hash for plan in plans if plan.batch is None}
        if not lost:
            return
        for batch in endpoint.batches.list(limit=100):
            mark = (batch.metadata or {}).get(MARK)
            if mark in lost:
                self.client.ledger.submitted(mark, batch.id)
                lost.discard(mark)
            if not lost:
                return

    def _submit(self, endpoint: OpenAI, plan: Plan, waiting: Sequence[Item]) -> Plan:
        from openai import APIConnectionError, APITimeoutError

        by_key = {item.key: item for item in waiting}
        if any(key not in by_key for key in plan.keys):
            # Another call's plan that never left, or one in part answered since: plan anew.
            self.client.ledger.ended(plan.hash)
            for key in plan.keys:
                if key in by_key:
                    self.budget.settle(by_key[key].expected, (0, 0))
            return plan
        name = f"maira-sae-{plan.hash}.jsonl"
        marked = {"Idempotency-Key": plan.hash}
        uploaded = next(
            (f for f in endpoint.files.list(purpose="batch") if f.filename == name), None
        )
        if uploaded is None:
            content = b"".join(line_of(by_key[key]) for key in plan.keys)
            uploaded = endpoint.files.create(
                file=(name, content), purpose="batch", extra_headers=marked
            )
        for tries in range(self.client.config.max_retries + 1):
            try:
                # The SDK's own retry after a lost reply would create a second batch.
                batch = endpoint.with_options(max_retries=0).batches.create(
                    input_file_id=uploaded.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={MARK: plan.hash},
                    extra_headers=marked,
                )
            except (APIConnectionError, APITimeoutError):
                if tries == self.client.config.max_retries:
                    raise
                time.sleep(self.client.config.backoff * 2**tries)
                self._adopt(endpoint, [plan])
                found = {one.hash: one for one in self.client.ledger.plans()}[plan.hash]
                if found.batch is not None:
                    return found
            else:
                self.client.ledger.submitted(plan.hash, batch.id)
                return plan._replace(batch=batch.id)
        raise AssertionError("the last try returns or raises")

    def _ended(self, endpoint: OpenAI, plan: Plan) -> bool:
        """Whether a batch is over; then its answers are kept and the plan is closed."""
        if plan.batch is None:
            return True
        batch = endpoint.batches.retrieve(plan.batch)
        if batch.status not in _OVER:
            return False
        items = {item.key: item for item in self._live() if item.key in set(plan.keys)}
        failures: dict[str, Failure] = {}
        answers: dict[str, Answer] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                for line in endpoint.files.content(file_id).content.splitlines():
                    self._line(line, items, answers, failures)
        self.client.ledger.commit(answers, batched=True)
        self.client.ledger.ended(plan.hash)
        for key, item in items.items():
            answer = answers.get(key)
            used = (answer.tokens_in, answer.tokens_out) if answer else (0, 0)
            self.budget.settle(item.expected, used)
            if answer is not None:
                if self._accept(item, answer) or self._from_ledger(item):
                    self._answered += 1
                    self._finished_items.add(id(item))
                continue
            left = failures.get(key) or Failure("left a request of a batch unanswered", again=True)
            if not left.again or self._rounds.get(key, 1) >= self.batch.max_rounds:
                self._failed.append(left)
                self._finished_items.add(id(item))
        self._told(batch, plan)
        limits = self.client.config.limits
        cost = None if limits.price_in is None else self.budget.spent
        kept = len(self.items) - len(self.unsent)
        self._display.update(kept + self._answered, len(self._failed), 0, cost)
        return True

    def _live(self) -> list[Item]:
        return [item for item in self.unsent if id(item) not in self._finished_items]

    def _line(
        self,
        line: bytes,
        items: dict[str, Item],
        answers: dict[str, Answer],
        failures: dict[str, Failure],
    ) -> None:
        """Sort a line of results: an answer, a failure, or neither, to be submitted again."""
        try:
            row = json.loads(line)
            key, response = row["custom_id"], row.get("response")
        except (ValueError, KeyError, TypeError):
            return  # torn: the request is missing and submitted again
        if response is None or (key not in items and response.get("status_code") != 200):
            return
        item = items.get(key)
        if item is None:  # of an earlier call: paid, so kept
            item = Item(None, {}, key, (0, 0))  # pyright: ignore[reportArgumentType]
        body = response.get("body") or {}
        try:
            if response["status_code"] == 200:
                answers[key] = self._read(item, body)
            else:
                error = body.get("error") or {}
                answers[key] = self._status(
                    item, response["status_code"], error.get("code"), str(error.get("message")), {}
                )
        except Unsupported:
            self._ask_instead(item, self._item(item.request).body)
            if self._from_ledger(item):
                self._finished_items.add(id(item))
        except Failure as failure:
            failures[key] = failure

    def _told(self, batch: Any, plan: Plan) -> None:
        """Stop where a whole batch failed for a reason that sending it again would not mend."""
        if batch.status == "cancelled":
            error = self.client.error(f"cancelled {batch.id}")
            error.resumable = True
            raise error
        if batch.status != "failed":
            return
        first = batch.errors.data[0] if batch.errors and batch.errors.data else None
        said = f"{first.code}: {first.message}" if first else "no reason given"
        if not any(word in said.lower() for word in _FULL):
            raise EndpointError(
                f"endpoint {self.client.config.base_url} turned the file of {batch.id} down "
                f"({said}); correct that, then run again"
            )
        if len(plan.keys) == 1 and len(self.client.ledger.plans()) == 0:
            raise self.client.error(f"has no room for a single request ({said})")
        # Too many tokens wait: smaller files, one after the other, find room. Nothing was run.
        self._most, self._one_at_a_time = max(1, len(plan.keys) // 2), True
        for key in plan.keys:
            self._rounds[key] = self._rounds.get(key, 1) - 1
        time.sleep(self.batch.poll)

    def _endpoint(self) -> OpenAI:
        from openai import DefaultHttpxClient, OpenAI

        config = self.client.config

        def log(request: Any) -> None:
            if request.method == "POST":
                n_bytes = int(request.headers.get("content-length", 0))
                self._log.write(request.url.host, n_bytes, request.headers["idempotency-key"])

        return OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=config.timeout,
            max_retries=config.max_retries,
            http_client=DefaultHttpxClient(
                follow_redirects=False,
                trust_env=config.remote,
                event_hooks={"request": [log]},
            ),
        )
