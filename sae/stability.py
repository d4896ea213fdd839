"""Whether another dictionary, such as one of another seed, holds the same directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooks.files import ConfigError
from sae.intervals import Figure, mean_interval
from sae.latent_scores import assign
from sae.model import MatryoshkaSAE

SHARED = 0.7
"""Cosine from which two latents count as the same; Paulo & Belrose 2025 (arXiv 2501.16615)."""
MOST = 2048
"""Latents matched at most; the assignment takes their square times the dictionary's size."""


class Stability(NamedTuple):
    """Latents of one dictionary matched one to one with those of another."""

    mean_cosine: Figure
    """Of decoder directions, over matched pairs; intervals by drawing latents."""
    shared: Figure
    """Share of pairs with a cosine of at least :data:`SHARED`."""
    latents: Int[Tensor, " n"]
    partners: Int[Tensor, " n"]
    cosines: Float[Tensor, " n"]


@torch.no_grad()
def stability(
    sae: MatryoshkaSAE,
    other: MatryoshkaSAE,
    rates: Float[Tensor, " F"] | None = None,
    alive: Bool[Tensor, " F"] | None = None,
    most: int = MOST,
) -> Stability:
    """The one-to-one matching of greatest summed decoder cosine.

    Parameters
    ----------
    rates
        Firing rates of ``sae``'s latents: those that never fire are not matched, and of the
        others the ``most`` that fire most often. Without it the first ``most`` are.
    alive
        Which of ``other``'s latents fire; all, if not given. A dead latent's direction is noise.

    Raises
    ------
    ConfigError
        If widths differ, or there are fewer than two latents to match.
    """
    if sae.config.d_model != other.config.d_model:
        raise ConfigError(
            f"dictionaries of widths {sae.config.d_model} and {other.config.d_model} share no "
            "space; compare those of one site"
        )
    if rates is None:
        rates = torch.ones(sae.config.n_latents)
    kept = torch.ones(other.config.n_latents, dtype=torch.bool) if alive is None else alive
    partners = kept.nonzero().flatten()
    order = rates.argsort(descending=True, stable=True)
    latents = order[rates[order] > 0][: min(most, len(partners))]
    if len(latents) < 2:
        raise ConfigError(
            f"{len(latents)} latents that fire, {len(partners)} in the other dictionary: nothing "
            "to match; train for longer"
        )
    mine = F.normalize(sae.W_dec.detach().cpu().double()[latents], dim=1)
    theirs = F.normalize(other.W_dec.detach().cpu().double()[partners], dim=1)
    cosines = theirs @ mine.T
    chosen = torch.from_numpy(assign(cosines.numpy()))
    matched = cosines[chosen, torch.arange(len(latents))]
    return Stability(
        mean_cosine=mean_interval(matched),
        shared=mean_interval((matched >= SHARED).double()),
        latents=latents,
        partners=partners[chosen],
        cosines=matched.float(),
    )
