"""Requests of any explainer, sent together and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from autointerp.batch import BatchConfig
from autointerp.client import Client, Request
from autointerp.explainers import Explanation
from autointerp.features import IMAGES, Features


class Explained(NamedTuple):
    """What came of explaining latents."""

    found: dict[int, Explanation]
    """By latent; "no clear concept" is one whose label is ``None``."""
    missing: tuple[int, ...]
    """Latents without a readable answer: neither a label nor "no clear concept"."""
    unasked: tuple[int, ...]
    """Dense latents, and those with nothing to show."""


def explain(
    client: Client,
    requests: Mapping[int, Request | None],
    name: str = "explain",
    *,
    batch: BatchConfig | None = None,
    wait: bool = True,
) -> Explained:
    """Ask every request, all together; ``None`` stands for a latent that is not asked about.

    ``batch`` and ``wait`` are those of :meth:`autointerp.client.Client.ask_all`.
    """
    asked = {latent: request for latent, request in requests.items() if request is not None}
    replies = client.ask_all(list(asked.values()), name, batch=batch, wait=wait)
    read = {n: cast(Explanation | None, one.value) for n, one in zip(asked, replies, strict=True)}
    return Explained(
        {latent: value for latent, value in read.items() if value is not None},
        tuple(latent for latent, value in read.items() if value is None),
        tuple(latent for latent in requests if latent not in asked),
    )


def film_of(features: Features, latent: int) -> str | None:
    """The film a latent fires on most often; ``None`` where it fires on none."""
    stats = features.stats(latent)
    fired = {name: stats[name].n_fired for name in IMAGES if name in stats}
    best = max(fired, key=lambda name: fired[name], default=None)
    return best if best is not None and fired[best] else None
