"""Pre-activations and their selection on a CPU, without ever holding B × F of them.

The dictionary is walked in blocks of latents. From each block only entries above a *floor* are
kept. As soon as more entries are in hand than will stay, the weakest of those that would stay
raises the floor: it can only lie below the final threshold, so nothing is lost, and memory is
bounded by the answer. If the first floor was guessed above the threshold, too few entries are
found; the walk is then repeated from zero.

Where bf16 products are much faster (:func:`sae.kernels.cost.screens`), a block is first *screened*.
With x̃ and w̃ the roundings of x and w to bf16, Cauchy–Schwarz bounds the error of a product:

    |x·w − x̃·w̃| ≤ ‖x − x̃‖ ‖w‖ + ‖x̃‖ ‖w − w̃‖

Both terms are products of a number per token and a number per latent, so two more columns on x̃
and w̃ add the bound to the product itself, and two more add bias − floor. What comes out positive
may be above the floor and is computed again in full precision; what does not, cannot be.

Legend: B tokens, D width, F latents, C latents in a block, c candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from sae.kernels.interface import Code, Weights
from sae.kernels.sparse import offsets, sampled_dots

SCREEN_BLOCK = 2**20
"""Pre-activations screened at once; in bf16 they fit a second-level cache."""
FULL_BLOCK = 2**22
"""Pre-activations of full precision held at once."""
EXTRA = 4
"""Columns that screening appends."""
LANES = 32
"""bf16 operands of one tile row; widths are padded to a multiple."""


class Candidates(NamedTuple):
    """Entries of pre-activations that may be kept, by token and then latent within a block."""

    row: Int32[Tensor, " c"]
    col: Int32[Tensor, " c"]
    val: Float[Tensor, " c"]

    def at_least(self, least: float) -> Candidates:
        stay = (self.val >= least).nonzero().squeeze(1)
        return Candidates(*(tensor[stay] for tensor in self))


def batch_topk(
    weights: Weights, x: Float[Tensor, "B D"], count: int, floor: float, screen: bool
) -> Code:
    """The ``count`` largest positive pre-activations of the batch, and ties with the least."""
    centred = x - weights.b_dec
    shape = (len(x), len(weights.W_enc))
    found = _above(weights, centred, count, floor, screen)
    if floor > 0 and found.val.numel() < count:
        found = _above(weights, centred, count, 0.0, screen)
    if found.val.numel() > count:
        found = found.at_least(_kth_largest(found.val, count))
    return _code(found, shape)


def topk(weights: Weights, x: Float[Tensor, "B D"], k: int) -> Code:
    """Each token's ``k`` largest positive pre-activations, and ties with the least."""
    latents = len(weights.W_enc)
    bias = weights.b_enc - weights.W_enc @ weights.b_dec
    step = max(1, FULL_BLOCK // latents)
    parts = []
    for begin in range(0, len(x), step):
        pre = torch.addmm(bias, x[begin : begin + step], weights.W_enc.T)
        least = pre.topk(min(k, latents), dim=1).values[:, -1:]
        row, col = ((pre >= least) & (pre > 0)).nonzero(as_tuple=True)
        parts.append(Candidates((row + begin).int(), col.int(), pre[row, col]))
    return _code(_joined(parts), (len(x), latents))


def _above(
    weights: Weights, centred: Float[Tensor, "B D"], count: int, floor: float, screen: bool
) -> Candidates:
    """Every entry ≥ ``floor`` (> 0 if that is 0), less those that are surely not among the largest.

    Blocks are full precision until there is a floor to screen with.
    """
    tokens = len(centred)
    screener = Screener(centred) if screen else None
    parts: list[Candidates] = []
    held, begin = 0, 0
    while begin < len(weights.W_enc):
        block = SCREEN_BLOCK if screener is not None and floor > 0 else FULL_BLOCK
        end = min(begin + max(1, block // max(1, tokens)), len(weights.W_enc))
        W, b = weights.W_enc[begin:end], weights.b_enc[begin:end]
        if screener is not None and floor > 0:
            part = screener.candidates(W, b, floor)
        else:
            part = _full(centred, W, b, floor)
        parts.append(part._replace(col=part.col + begin))
        held += part.val.numel()
        if held > 1.5 * count:
            joined = _joined(parts)
            floor = max(floor, _kth_largest(joined.val, count))
            parts = [joined.at_least(floor)]
            held = parts[0].val.numel()
        begin = end
    return _joined(parts)


def _full(
    centred: Float[Tensor, "B D"], W: Float[Tensor, "C D"], b: Float[Tensor, " C"], floor: float
) -> Candidates:
    pre = torch.addmm(b, centred, W.T)
    place = _nonzero((pre >= floor if floor > 0 else pre > 0).view(-1))
    row, col = _divided(place, len(W))
    return Candidates(row, col, pre.view(-1)[place])


class Screener:
    """Finds the entries of a block of pre-activations that may reach a floor, by a bf16 product."""

    def __init__(self, centred: Float[Tensor, "B D"]) -> None:
        tokens, width = centred.shape
        self.centred = centred
        self.columns = slice(width, width + EXTRA)
        padded = -(-(width + EXTRA) // LANES) * LANES
        self.rounded = torch.zeros(tokens, padded, dtype=torch.bfloat16)
        self.rounded[:, :width] = centred
        rounded = self.rounded[:, :width].to(centred.dtype)
        norm = rounded.norm(dim=1)
        # Sums of `padded` products in fp32, in any order, err by less than padded · 2^-24 of
        # ‖x̃‖ ‖w̃‖; four times that also covers the arithmetic of the full precision itself.
        self.slack = padded * 2.0**-22
        lost = (centred - rounded).norm(dim=1) + self.slack * norm
        ones = torch.ones_like(norm)
        self.rounded[:, self.columns] = torch.stack([_up(lost), _up(norm), ones, ones], dim=1)

    def candidates(
        self, W: Float[Tensor, "C D"], b: Float[Tensor, " C"], floor: float
    ) -> Candidates:
        """Entries ≥ ``floor`` of ``relu(centred @ Wᵀ + b)``, for a positive floor."""
        latents, width = W.shape
        lanes = -(-latents // 4) * 4  # so that four bf16 results are one 64-bit word
        rounded = torch.zeros(lanes, self.rounded.shape[1], dtype=torch.bfloat16)
        rounded[:latents, :width] = W
        lost = (W - rounded[:latents, :width]).norm(dim=1)
        shift = b - floor
        shift = shift + shift.abs() * (2.0**-14 + self.slack)
        high = shift.bfloat16()
        low = shift - high
        columns = torch.stack([_up(W.norm(dim=1)), _up(lost), high, low], dim=1)
        rounded[:latents, self.columns] = columns.to(rounded.dtype)
        bound = (self.rounded @ rounded.T).relu_().view(-1)
        words = bound.view(torch.int64).nonzero().squeeze(1)
        place = bound.view(-1, 4)[words].nonzero()
        row, col = _divided(words[place[:, 0]] * 4 + place[:, 1], lanes)
        ptr = offsets(torch.bincount(row, minlength=len(self.centred)))
        val = sampled_dots(ptr, col, self.centred, W) + b[col]
        return Candidates(row, col, val).at_least(floor)


def _up(values: Tensor) -> Tensor:
    """A little more than non-negative ``values``, so that rounding to bf16 stays above them."""
    return values * (1 + 2.0**-7)


def _nonzero(mask: Tensor) -> Tensor:
    """Places of true values in a flat mask; most of them are false, so words are tested first."""
    if len(mask) % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    place = mask.view(-1, 8)[words].nonzero()
    return words[place[:, 0]] * 8 + place[:, 1]


def _divided(place: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat places in a matrix of this width."""
    row = torch.div(place, width, rounding_mode="floor")
    return row.int(), (place - row * width).int()


def _joined(parts: list[Candidates]) -> Candidates:
    return Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _kth_largest(values: Tensor, count: int) -> float:
    return float(values.kthvalue(values.numel() - count + 1).values)


def _code(found: Candidates, shape: tuple[int, int]) -> Code:
    """Sort by token and latent; blocks are in order of latents, so a stable sort by token does."""
    order = found.row.argsort(stable=True)
    ends = torch.bincount(found.row, minlength=shape[0]).cumsum(dim=0)
    row_ptr = torch.cat([ends.new_zeros(1), ends])
    least = float(found.val.min()) if found.val.numel() else 0.0
    return Code(row_ptr, found.col[order].long(), found.val[order], shape, least)


def blocks(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step``."""
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))
