"""The training objective: weighted nested reconstruction plus an auxiliary loss on dead latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.model import MatryoshkaSAE


class Objective(NamedTuple):
    """Loss of one batch and what was computed on the way."""

    total: Tensor
    groups: Float[Tensor, " G"]
    """Mean squared error of each prefix, over tokens and dimensions."""
    auxiliary: Tensor
    latents: Float[Tensor, "batch F"]
    """BatchTopK latents, detached."""
    reconstruction: Float[Tensor, "batch d"]
    """From the whole dictionary, detached."""


def objective(
    sae: MatryoshkaSAE,
    x: Float[Tensor, "batch d"],
    dead: Bool[Tensor, " F"],
    weights: Sequence[float],
    aux_weight: float,
    aux_k: int,
) -> Objective:
    """``Σ_g w_g · mean((x − x̂_g)²) + aux_weight · auxiliary``.

    ``weights`` are used as given (the trainer makes them sum to 1). Matryoshka losses are those of
    arXiv 2503.17547; the auxiliary loss that of arXiv 2406.04093, appendix A.2, on the ReLU'd
    pre-activations of latents in ``dead``.
    """
    pre = sae.pre_activations(x)
    z = sae.batch_topk(pre)
    losses, reconstruction = [], x
    for reconstruction in sae.decode_prefixes(z):
        losses.append((x - reconstruction).square().mean())
    groups = torch.stack(losses)
    total = (groups * groups.new_tensor(weights)).sum()
    auxiliary = auxiliary_loss(sae, pre, (x - reconstruction).detach(), dead, aux_k)
    return Objective(
        total + aux_weight * auxiliary,
        groups.detach(),
        auxiliary.detach(),
        z.detach(),
        reconstruction.detach(),
    )


def auxiliary_loss(
    sae: MatryoshkaSAE,
    pre: Float[Tensor, "batch F"],
    residual: Float[Tensor, "batch d"],
    dead: Bool[Tensor, " F"],
    k: int,
) -> Tensor:
    """How much of the residual's variance the ``k`` strongest dead latents leave unexplained.

    0 when no latent is dead or the residual is constant.
    """
    indices = dead.nonzero().squeeze(1)
    spread = (residual - residual.mean(dim=0)).square().sum()
    if indices.numel() == 0 or float(spread) == 0:
        return residual.new_zeros(())
    values = pre[:, indices]
    k = min(k, indices.numel())
    if k < indices.numel():
        least = values.detach().topk(k, dim=1).values[:, -1:]
        values = values * (values >= least)
    return (residual - values @ sae.W_dec[indices]).square().sum() / spread
