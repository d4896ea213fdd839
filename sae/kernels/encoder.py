"""Pre-activations and their selection on a CPU, without ever holding B × F of them.

The dictionary is walked in blocks of latents. From each block only entries above a *floor* are
kept. As soon as more entries are in hand than will stay, the weakest of those that would stay
raises the floor: it can only lie below the final threshold, so nothing is lost, and memory is
bounded by the answer. If the first floor was guessed above the threshold, too few entries are
found; the walk is then repeated from zero.

Where bf16 products are much faster (:func:`sae.kernels.cost.screens`), a block is *screened*: a
bf16 product gives bounds of every entry, and only those that may be kept are computed in full
precision. With x̃ and w̃ the roundings of x and w to bf16, Cauchy–Schwarz bounds its error:

    |x·w − x̃·w̃| ≤ ‖x − x̃‖ ‖w‖ + ‖x̃‖ ‖w − w̃‖

Both terms are a number per token times a number per latent, so two more columns on x̃ and w̃ add
the bound to the product itself, and two more add bias − floor. What comes out positive may be above
the floor; what does not, cannot be.

Legend: B tokens, D width, F latents, C latents in a block, c candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sae.kernels.interface import Code, Weights
from sae.kernels.sparse import offsets, sampled_dots

SCREEN_BLOCK = 2**21
"""Pre-activations screened at once; in bf16 they about fit a second-level cache."""
FULL_BLOCK = 2**21
"""Pre-activations of full precision held at once."""
EXTRA = 4
"""Columns that screening appends."""
LANES = 32
"""bf16 operands of one tile row; widths are padded to a multiple."""
ROUNDING = 2.0**-7
"""Twice the largest relative error of rounding to bf16."""


class Candidates(NamedTuple):
    """Entries of one block that may be kept, by token and then latent."""

    row: Int32[Tensor, " c"]
    col: Int32[Tensor, " c"]
    """Latent within the block."""
    low: Float[Tensor, " c"]
    """At most the pre-activation."""
    high: Float[Tensor, " c"]
    """At least the pre-activation."""
    exact: bool
    """Whether ``low`` and ``high`` are both the pre-activation itself."""

    def at_least(self, floor: float) -> Candidates:
        """Those that may reach ``floor``."""
        stay = (self.high >= floor).nonzero().squeeze(1)
        return Candidates(
            self.row[stay], self.col[stay], self.low[stay], self.high[stay], self.exact
        )


def batch_topk(
    weights: Weights, x: Float[Tensor, "B D"], count: int, floor: float, screen: bool
) -> Code:
    """The ``count`` largest positive pre-activations of the batch, and ties with the least."""
    centred = x - weights.b_dec
    code = _walk(weights, centred, count, floor, screen)
    if floor > 0 and code.val.numel() < count:
        code = _walk(weights, centred, count, 0.0, screen)
    return code


def topk(weights: Weights, x: Float[Tensor, "B D"], k: int) -> Code:
    """Each token's ``k`` largest positive pre-activations, and ties with the least."""
    latents = len(weights.W_enc)
    bias = weights.b_enc - weights.W_enc @ weights.b_dec
    step = max(1, FULL_BLOCK // latents)
    rows, cols, vals = [], [], []
    for begin in range(0, len(x), step):
        pre = torch.addmm(bias, x[begin : begin + step], weights.W_enc.T)
        least = pre.topk(min(k, latents), dim=1).values[:, -1:]
        row, col = ((pre >= least) & (pre > 0)).nonzero(as_tuple=True)
        rows.append(row + begin)
        cols.append(col)
        vals.append(pre[row, col])
    return _code(torch.cat(rows), torch.cat(cols), torch.cat(vals), (len(x), latents))


def _walk(
    weights: Weights, centred: Float[Tensor, "B D"], count: int, floor: float, screen: bool
) -> Code:
    """The ``count`` largest entries ≥ ``floor`` (> 0 if that is 0), and ties with the least.

    Blocks are computed in full precision until there is a floor to screen with.
    """
    tokens, latents = len(centred), len(weights.W_enc)
    screener = Screener(centred) if screen else None
    parts: dict[int, Candidates] = {}  # by first latent of their block
    begin = 0
    while begin < latents:
        screened = screener is not None and floor > 0
        width = max(1, (SCREEN_BLOCK if screened else FULL_BLOCK) // max(1, tokens))
        block = slice(begin, min(begin + width, latents))
        W, b = weights.W_enc[block], weights.b_enc[block]
        if screener is not None and floor > 0:
            parts[begin] = screener.candidates(W, b, floor)
        else:
            parts[begin] = _full(centred, W, b, floor)
        if sum(len(part.low) for part in parts.values()) > 3 * count:
            floor = max(floor, _kth_largest([part.low for part in parts.values()], count))
            parts = {first: part.at_least(floor) for first, part in parts.items()}
        begin = block.stop
    floor = max(floor, _kth_largest([part.low for part in parts.values()], count))
    parts = {first: part.at_least(floor) for first, part in parts.items()}
    if screener is not None:
        for first, part in parts.items():
            parts[first] = _computed(part, centred, weights, first)
        floor = max(floor, _kth_largest([part.low for part in parts.values()], count))
        parts = {first: part.at_least(floor) for first, part in parts.items()}
    row = torch.cat([part.row for part in parts.values()])
    col = torch.cat([part.col + first for first, part in parts.items()])
    val = torch.cat([part.low for part in parts.values()])
    return _code(row, col, val, (tokens, latents))


def _full(
    centred: Float[Tensor, "B D"], W: Float[Tensor, "C D"], b: Float[Tensor, " C"], floor: float
) -> Candidates:
    """Entries of a block that are ≥ ``floor``, or > 0 if that is 0."""
    pre = torch.addmm(b, centred, W.T).view(-1)
    place = _true(pre.numpy() >= floor if floor > 0 else pre.numpy() > 0)
    row, col = _divided(place, len(W))
    val = pre[place]
    return Candidates(row, col, val, val, exact=True)


def _computed(
    part: Candidates, centred: Float[Tensor, "B D"], weights: Weights, first: int
) -> Candidates:
    """Candidates of the block that begins at ``first``, in full precision."""
    if part.exact or len(part.low) == 0:
        return part
    block = slice(first, first + int(part.col.max()) + 1)
    ptr = offsets(torch.bincount(part.row, minlength=len(centred)))
    val = sampled_dots(ptr, part.col, centred, weights.W_enc[block])
    val += weights.b_enc[block][part.col]
    return part._replace(low=val, high=val, exact=True)


class Screener:
    """Bounds of pre-activations by a bf16 product."""

    def __init__(self, centred: Float[Tensor, "B D"]) -> None:
        tokens, width = centred.shape
        padded = -(-(width + EXTRA) // LANES) * LANES
        self.rounded = torch.zeros(tokens, padded, dtype=torch.bfloat16)
        self.rounded[:, :width] = centred
        rounded = self.rounded[:, :width].to(centred.dtype)
        # A sum of `padded` products in fp32, in any order, errs by less than padded · 2^-24 of
        # ‖x̃‖ ‖w̃‖; four times that also covers the rounding of the full precision itself.
        self.slack = padded * 2.0**-22
        self.norm = _up(rounded.norm(dim=1))
        self.lost = _up((centred - rounded).norm(dim=1) + self.slack * self.norm)
        ones = torch.ones_like(self.norm)
        self.columns = slice(width, width + EXTRA)
        self.rounded[:, self.columns] = torch.stack([self.lost, self.norm, ones, ones], dim=1)
        self.bound = torch.empty(max(SCREEN_BLOCK, tokens), dtype=torch.bfloat16)

    def candidates(
        self, W: Float[Tensor, "C D"], b: Float[Tensor, " C"], floor: float
    ) -> Candidates:
        """Entries of ``centred @ Wᵀ + b`` that may reach ``floor``, which is positive."""
        latents, width = W.shape
        rounded = torch.zeros(latents, self.rounded.shape[1], dtype=torch.bfloat16)
        plain = W.bfloat16()
        rounded[:, :width] = plain
        norm, lost = _up(W.norm(dim=1)), _up(plain.to(W.dtype).sub_(W).norm(dim=1))
        shift = b - floor
        slack = shift.abs() * (2.0**-14 + self.slack)
        high = (shift + slack).bfloat16()
        low = (shift + slack - high).bfloat16()
        rounded[:, self.columns] = torch.stack([norm.bfloat16(), lost.bfloat16(), high, low], dim=1)
        bound = self.bound[: len(self.rounded) * latents]
        torch.mm(self.rounded, rounded.T, out=bound.view(-1, latents))
        place = _true(bound.view(torch.int16).numpy() > 0)  # the sign of bf16 is that of its bits
        row, col = _divided(place, latents)
        above = bound[place].to(W.dtype)
        # The bounds added, with the largest of the block's latents in place of each one's own.
        added = self.lost * norm.max() + self.norm * lost.max()
        width_of_bounds = _up(_up(2 * (added + slack.max())))
        return Candidates(
            row,
            col,
            low=floor + above * (1 - ROUNDING) - width_of_bounds[row],
            high=floor + above * (1 + ROUNDING),
            exact=False,
        )


def _up(values: Tensor) -> Tensor:
    """A little more than non-negative ``values``, so that rounding to bf16 stays above them."""
    return values * (1 + ROUNDING)


def _true(mask: np.ndarray) -> Int64[Tensor, " c"]:
    """Places of true values. NumPy skips runs of false ones; torch visits each."""
    return torch.from_numpy(np.flatnonzero(mask))


def _divided(place: Int64[Tensor, " c"], width: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat places in a matrix of this width."""
    row = torch.div(place, width, rounding_mode="floor")
    return row.int(), (place - row * width).int()


def _kth_largest(parts: list[Float[Tensor, " c"]], count: int) -> float:
    """The ``count``-th largest of all values; 0 if there are fewer."""
    values = torch.cat(parts).numpy()
    if len(values) < count:
        return 0.0
    place = len(values) - count
    return float(np.partition(values, place)[place])


def _code(row: Tensor, col: Tensor, val: Tensor, shape: tuple[int, int]) -> Code:
    """From entries in order of latents for each token, in any order of tokens."""
    order = row.argsort(stable=True)
    ends = torch.bincount(row, minlength=shape[0]).cumsum(dim=0)
    row_ptr = torch.cat([ends.new_zeros(1), ends])
    least = float(val.min()) if val.numel() else 0.0
    return Code(row_ptr, col[order].long(), val[order], shape, least)
