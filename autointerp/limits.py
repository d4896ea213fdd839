"""How fast and how far a job may go: rates, prices and a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hooks.files import ConfigError

Messages = Sequence[Mapping[str, Any]]
"""As OpenAI has them: the content is a text, or a list of texts and images."""
Count = Callable[[str], int]
"""Tokens of a text."""

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True)
class Limits:
    """What a job may use of an endpoint."""

    concurrency: int = 16
    """Requests under way at once."""
    requests_per_minute: float | None = None
    """Retries included."""
    tokens_per_minute: float | None = None
    """Of prompts and the longest allowed replies, by the estimate."""
    price_in: float | None = None
    """Of a million tokens of prompts, in any currency."""
    price_out: float | None = None
    """Of a million tokens of replies."""
    tokens_per_image: int = 1_500
    """What an image is taken for in estimates; endpoints differ widely, so look yours up."""
    max_cost: float | None = None
    """Most that everything in the ledger may cost, this and earlier runs; needs both prices."""
    max_requests: int | None = None
    """Most requests that may leave in a run, retries included."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"concurrency is {self.concurrency}; give at least 1")
        for name in ("requests_per_minute", "tokens_per_minute"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ConfigError(f"{name} is {rate}; give a positive rate, or none")
        if self.tokens_per_image < 0:
            raise ConfigError(f"tokens_per_image is {self.tokens_per_image}; give 0 or more")
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError("only one price is given; give price_in and price_out, or neither")
        if self.max_cost is not None and self.price_in is None:
            raise ConfigError("max_cost needs prices; give price_in and price_out per 1M tokens")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """What tokens cost, or ``None`` without prices.

        >>> Limits(price_in=2.0, price_out=8.0).cost(500_000, 250_000)
        3.0
        """
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


class Estimate(NamedTuple):
    """What a job has left to send, before it starts."""

    requests: int
    kept: int
    """Answered by the ledger."""
    tokens_in: int
    tokens_out: int
    """At most: every reply as long as it may be."""
    cost: float | None
    """At most, or ``None`` without prices."""

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", at most {self.cost:.4f} at the given prices"
        return (
            f"{self.requests:,} requests ({self.kept:,} more are kept), about {self.tokens_in:,} "
            f"tokens in and at most {self.tokens_out:,} out{cost}"
        )


def texts_of(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a message's content, images left out."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def n_images(messages: Messages) -> int:
    """Images in a prompt."""
    lists = [m["content"] for m in messages if not isinstance(m["content"], str)]
    return sum(part["type"] == "image_url" for parts in lists for part in parts)


def count_tokens(messages: Messages, count: Count | None = None, per_image: int = 0) -> int:
    """Tokens of a prompt: by ``count``, or a token for four characters, and four a message.

    An image counts ``per_image``.

    >>> count_tokens([{"role": "user", "content": "Is the heart large?"}])
    9
    """
    total = n_images(messages) * per_image
    for message in messages:
        total += TOKENS_PER_MESSAGE
        for text in texts_of(message["content"]):
            total += count(text) if count else -(-len(text) // CHARACTERS_PER_TOKEN)
    return total


class Pace:
    """Spreads use over time at ``per_minute``, with bursts of a second's worth."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_second = None if per_minute is None else per_minute / 60
        self._due = 0.0

    def reserve(self, amount: float, now: float | None = None) -> float:
        """Take ``amount``; gives the seconds to wait before it is used.

        >>> pace = Pace(120)
        >>> [pace.reserve(1, now=100.0) for _ in range(4)]
        [0.0, 0.0, 0.5, 1.0]
        """
        if self._per_second is None:
            return 0.0
        now = time.monotonic() if now is None else now
        start = max(self._due, now - 1.0)
        self._due = start + amount / self._per_second
        return max(0.0, self._due - now)


class Budget:
    """Money and requests used, with what is under way set aside at its longest."""

    def __init__(self, limits: Limits, tokens: tuple[int, int]) -> None:
        self.limits = limits
        self.spent = limits.cost(*tokens) or 0.0
        self.sent = 0
        self._aside = 0.0

    def refusal(self, tokens_in: int, tokens_out: int) -> str | None:
        """Why a request may not be sent; ``None`` sets its cost aside and counts it."""
        limits = self.limits
        if limits.max_requests is not None and self.sent >= limits.max_requests:
            return f"{self.sent:,} requests were sent, as many as max_requests allows"
        most = limits.cost(tokens_in, tokens_out) or 0.0
        if limits.max_cost is not None and self.spent + self._aside + most > limits.max_cost:
            return (
                f"{self.spent:.4f} is spent and the next request might pass max_cost "
                f"{limits.max_cost:g}"
            )
        self._aside += most
        self.sent += 1
        return None

    def reserve(self, tokens_in: int, tokens_out: int) -> None:
        """Set aside what was sent by an earlier run and may yet cost."""
        self._aside += self.limits.cost(tokens_in, tokens_out) or 0.0

    def settle(self, expected: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace what was set aside by what was used; a failure that cost nothing used (0, 0)."""
        self._aside -= self.limits.cost(*expected) or 0.0
        self.spent += self.limits.cost(*used) or 0.0
