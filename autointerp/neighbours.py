"""The latents whose directions are nearest to each one's.

The product of a dictionary with itself costs as much as encoding a row for each latent. Where
bf16 products are much faster (:func:`sae.kernels.cost.screens`), one finds the pairs that can be
among the nearest, and only those are computed in full precision. With ũ the rounding of u to bf16,

    |u·v − ũ·ṽ| ≤ ‖u − ũ‖ ‖v‖ + ‖ũ‖ ‖v − ṽ‖

and no pair is left out that lies within twice that bound of a row's ``n``-th best.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae.kernels.cost import screens
from sae.kernels.sparse import offsets, sampled_dots

BLOCK = 1024
"""Latents whose cosines with all others are held at once."""
ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16."""


def neighbours(
    directions: Float[Tensor, "F d"],
    alive: Int64[np.ndarray, " a"],
    n: int,
    screen: bool | None = None,
) -> Int64[np.ndarray, "F n"]:
    """The living latents whose directions have the largest cosine with each one's; -1 where there
    are fewer.

    Parameters
    ----------
    screen
        Whether to find candidates by a bf16 product first; ``None`` decides by the processor. The
        neighbours are the same either way, but for ties within rounding.
    """
    out = np.full((len(directions), n), -1, dtype=np.int64)
    n = min(n, len(alive) - 1)
    if n < 1:
        return out
    own = torch.from_numpy(alive).to(directions.device)
    unit = torch.nn.functional.normalize(directions[own].float(), dim=1)
    if screen is None:
        screen = unit.device.type == "cpu" and screens(unit.dtype)
    best = _screened(unit, n) if screen else _full(unit, n)
    out[alive, :n] = alive[best.cpu().numpy()]
    return out


def _without_itself(cosines: Tensor, start: int) -> Tensor:
    at = torch.arange(len(cosines), device=cosines.device)
    cosines[at, at + start] = -2
    return cosines


def _full(unit: Float[Tensor, "a d"], n: int) -> Int64[Tensor, "a n"]:
    found = []
    for start in range(0, len(unit), BLOCK):
        cosines = _without_itself(unit[start : start + BLOCK] @ unit.T, start)
        found.append(cosines.topk(n, dim=1).indices)
    return torch.cat(found)


def _screened(unit: Float[Tensor, "a d"], n: int) -> Int64[Tensor, "a n"]:
    rounded = unit.bfloat16()
    lost = (rounded.float() - unit).norm(dim=1)
    # Norms of bf16 are below 1.01. A sum of d products in fp32, in any order, errs by less than
    # d · 2^-24 of the norms; twice that also covers the rounding of the full precision itself.
    bound = 1.01 * (lost + lost.max()) + unit.shape[1] * 2.0**-23
    found = []
    for start in range(0, len(unit), BLOCK):
        block = unit[start : start + BLOCK]
        rough = _without_itself(rounded[start : start + BLOCK] @ rounded.T, start)
        least = rough.topk(n, dim=1).values[:, -1].float()
        apart = 2 * bound[start : start + BLOCK]
        # The products themselves were rounded, both the least one and the one that is compared.
        floor = least - apart - 4 * ROUNDING * (least.abs() + apart)
        place = np.flatnonzero((rough >= floor.bfloat16()[:, None]).numpy())
        row, column = np.divmod(place, len(unit))
        ptr = offsets(torch.from_numpy(np.bincount(row, minlength=len(block))))
        cosine = sampled_dots(ptr, torch.from_numpy(column).int(), block, unit).numpy()
        order = np.lexsort((-cosine, row))
        first = ptr[:-1].numpy()
        found.append(torch.from_numpy(column[order[first[:, None] + np.arange(n)]]))
    return torch.cat(found)
