"""The Triton kernels' encoder: dense products in chunks of tokens, each filtered as it comes.

A filter keeps what is at or above a floor, in order: one program counts, a running sum turns
counts into places, another program writes. For a batch top-k the floor is the caller's guess; if
exactly the largest entries cannot be told from what passed, they are searched for.

Legend: B tokens, D width, F latents, T tokens of a chunk, n entries that passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from hooks.files import ConfigError
from sae.kernels.interface import Above, BatchTopK, Code, Selection, TopK, Weights
from sae.kernels.launches import LAUNCHES, run

DTYPES = (torch.float32, torch.bfloat16)
"""Not float16: suffix sums, of the order of 1 / (B·D), would vanish in it."""


@dataclass(frozen=True)
class Tuning:
    """What decides how work is cut up; every choice gives the same result up to rounding."""

    cache_bytes: int = 24 << 20
    """Of a gathered matrix, the slice of the width that should stay in the device's L2 cache."""
    chunk: int = 1 << 25
    """Pre-activations held at once."""
    segment: int = 256
    """Entries of a latent above which its gradient is summed in two stages."""
    slack: float = 2.0
    """Room for candidates of a batch top-k, over the entries to be kept."""


class Entries(NamedTuple):
    """Entries that passed a filter, in the order of a :class:`Code`."""

    row_ptr: Int64[Tensor, " B+1"]
    col: Int32[Tensor, " n"]
    val: Float[Tensor, " n"]

    def largest(self, count: int) -> Entries:
        """The ``count`` largest and ties with the smallest of them, in the same order."""
        keep = self.val >= self.val.topk(count, sorted=False).values.min()
        kept = torch.cat([self.row_ptr.new_zeros(1), keep.cumsum(dim=0)])
        return Entries(kept[self.row_ptr], self.col[keep], self.val[keep])


def checked(weights: Weights, x: Tensor, out: Weights | None = None) -> Tensor:
    """``x`` in the weights' type, and laid out as the programs read it.

    Raises
    ------
    ConfigError
        If the programs cannot read the weights, or write ``out``.
    """
    dtype = weights.W_enc.dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"the Triton kernels take float32 or bfloat16 weights, these are {dtype}; "
            "convert them, or ask for the kernels 'reference'"
        )
    for tensors in (weights, out or weights):
        for name, tensor in tensors._asdict().items():
            if not tensor.is_contiguous():
                raise ConfigError(
                    f"{name} has strides {tensor.stride()}; the Triton kernels need rows side by "
                    "side: call .contiguous() once, where the tensor is made"
                )
    return x.to(dtype).contiguous()


def selected(weights: Weights, x: Tensor, selection: Selection, tuning: Tuning) -> Code:
    """The entries of the pre-activations that ``selection`` keeps; ``x`` as :func:`checked`."""
    if isinstance(selection, BatchTopK):
        entries = _batch_topk(weights, x, selection, tuning)
    else:
        entries = _by_token(weights, x, selection, tuning)
    least = float(entries.val.min()) if entries.val.numel() else 0.0
    shape = (len(x), len(weights.W_enc))
    return Code(entries.row_ptr, entries.col.long(), entries.val, shape, least)


def _by_token(weights: Weights, x: Tensor, selection: TopK | Above, tuning: Tuning) -> Entries:
    """What each token keeps without regard to the others."""
    bias = _bias(weights)
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    parts = []
    for first, pre in _pre_activations(weights, x, tuning.chunk):
        if isinstance(selection, TopK):
            k = min(selection.k, len(weights.W_enc))
            floors = (pre.float() + bias).topk(k, dim=1).values[:, -1].contiguous()
        else:  # the filter keeps what equals its floor, this selection does not
            threshold = torch.full((len(pre),), selection.threshold, device=x.device)
            floors = threshold.nextafter(torch.full_like(threshold, torch.inf))
        part = _passing(pre, bias, floors)
        row_ptr[first + 1 : first + 1 + len(pre)] = part.row_ptr[1:] + row_ptr[first]
        parts.append(part)
    return Entries(
        row_ptr,
        torch.cat([part.col for part in parts]),
        torch.cat([part.val for part in parts]),
    )


def _batch_topk(weights: Weights, x: Tensor, selection: BatchTopK, tuning: Tuning) -> Entries:
    """Filter by the guess and order what passes; search if that was too little or too much."""
    bias = _bias(weights)
    count = min(selection.count(len(x)), len(x) * len(weights.W_enc))
    capacity = int(tuning.slack * count)
    col = torch.empty(capacity, dtype=torch.int32, device=x.device)
    val = torch.empty(capacity, dtype=torch.float32, device=x.device)
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    for first, pre in _pre_activations(weights, x, tuning.chunk):
        floors = torch.full((len(pre),), selection.floor, device=x.device)
        ends = _filter(pre, bias, floors, row_ptr[first], col, val)
        row_ptr[first + 1 : first + 1 + len(pre)] = ends
    total = int(row_ptr[-1])
    if count <= total <= capacity:
        return Entries(row_ptr, col[:total], val[:total]).largest(count)
    floor = selection.floor if total > capacity else 0.0
    return _search(weights, x, bias, floor, count, tuning)


def _search(
    weights: Weights, x: Tensor, bias: Tensor, floor: float, count: int, tuning: Tuning
) -> Entries:
    """Batch top-k from any ``floor`` that is not above the answer.

    The largest of the tokens seen so far bound the answer from below, so the floor rises, and no
    more is held than ``count`` entries, their ties, and one chunk.
    """
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    col = torch.empty(0, dtype=torch.int32, device=x.device)
    found = Entries(row_ptr, col, torch.empty(0, dtype=torch.float32, device=x.device))
    floors = torch.full((len(x),), floor, device=x.device)
    for first, pre in _pre_activations(weights, x, tuning.chunk):
        part = _passing(pre, bias, floors[: len(pre)])
        row_ptr = found.row_ptr
        row_ptr[first + 1 : first + 1 + len(pre)] = part.row_ptr[1:] + row_ptr[first]
        row_ptr[first + 1 + len(pre) :] = row_ptr[first + len(pre)]
        col, val = torch.cat([found.col, part.col]), torch.cat([found.val, part.val])
        found = Entries(row_ptr, col, val)
        if val.numel() > count:
            found = found.largest(count)
            floors.fill_(found.val.min())
    return found


def _pre_activations(
    weights: Weights, x: Tensor, chunk: int
) -> Iterator[tuple[int, Float[Tensor, "T F"]]]:
    """``x @ W_encᵀ`` in chunks of tokens, each over the last one's memory."""
    F = len(weights.W_enc)
    tokens = min(len(x), max(1, chunk // F))
    buffer = x.new_empty(tokens, F)
    for first in range(0, len(x), tokens):
        rows = x[first : first + tokens]
        yield first, torch.mm(rows, weights.W_enc.T, out=buffer[: len(rows)])


def _bias(weights: Weights) -> Float[Tensor, " F"]:
    """What is added to ``x @ W_encᵀ``: ``b_enc − W_enc @ b_dec``, in float32."""
    F, D = weights.W_enc.shape
    bias = torch.empty(F, dtype=torch.float32, device=weights.W_enc.device)
    (launch,) = LAUNCHES["bias"][1]
    run("bias", launch, (F,), weights.W_enc, weights.b_enc, weights.b_dec, bias, D)
    return bias


def _filter(
    pre: Tensor, bias: Tensor, floors: Tensor, base: Tensor, col: Tensor, val: Tensor
) -> Int64[Tensor, " T"]:
    """Write what passes into ``col`` and ``val`` from ``base`` on; where each token ends.

    What does not fit is dropped, but counted.
    """
    T, F = pre.shape
    (launch,) = LAUNCHES["count"][1]
    grid = (T, -(-F // launch.block))
    counts = torch.empty(grid, dtype=torch.int32, device=pre.device)
    run("count", launch, grid, pre, bias, floors, counts, F)
    ends = counts.view(-1).cumsum(dim=0) + base
    run("compact", launch, grid, pre, bias, floors, counts, ends, col, val, F, col.numel())
    return ends.view(grid)[:, -1]


def _passing(pre: Tensor, bias: Tensor, floors: Tensor) -> Entries:
    """The entries of one chunk that pass, however many."""
    col = torch.empty(pre.numel(), dtype=torch.int32, device=pre.device)
    val = torch.empty(pre.numel(), dtype=torch.float32, device=pre.device)
    zero = torch.zeros(1, dtype=torch.int64, device=pre.device)
    row_ptr = torch.cat([zero, _filter(pre, bias, floors, zero, col, val)])
    total = int(row_ptr[-1])
    return Entries(row_ptr, col[:total].clone(), val[:total].clone())
