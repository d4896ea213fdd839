"""The kernels on a CUDA device: cuBLAS for the encoder's product, Triton programs for the rest.

A step touches the dense ``[B, F]`` pre-activations only in chunks of tokens, on their way through
a filter; everything after works on the n active entries. Reductions are ordered and no program
uses atomics, so equal inputs give equal bits.

Legend: B tokens, D width, F latents, G groups, n active entries, T tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from hooks.files import ConfigError
from sae.kernels.interface import (
    BatchTopK,
    Code,
    Decoded,
    Kernels,
    Nested,
    Selection,
    TopK,
    Weights,
)
from sae.kernels.programs import LAUNCHES, Launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


class _Entries(NamedTuple):
    """Entries that passed a filter, in the order of a :class:`Code`."""

    row_ptr: Int64[Tensor, " B+1"]
    col: Int32[Tensor, " n"]
    val: Float[Tensor, " n"]


class _Columns(NamedTuple):
    """A code sorted by latent, then by token, with long latents cut into segments."""

    order: Int64[Tensor, " n"]
    row: Int64[Tensor, " n"]
    """Token of each entry."""
    suffix_row: Int64[Tensor, " n"]
    """Its row in ``S`` seen as [G·B, D]."""
    col_ptr: Int64[Tensor, " F+1"]
    seg_ptr: Int64[Tensor, " F+1"]
    """Where each latent's segments begin; a latent that is not cut has none."""
    seg_begin: Int64[Tensor, " s"]
    seg_end: Int64[Tensor, " s"]


class TritonKernels(Kernels):
    """See :class:`sae.kernels.interface.Kernels`.

    Takes float32, bfloat16 or float16; sums are in float32. The code's values and the residual
    are float32, ``S`` has the weights' type, gradients that of ``out``.
    """

    name = "triton"

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()

    # Encoder

    @torch.no_grad()
    def encode(self, weights: Weights, x: Float[Tensor, "B D"], selection: Selection) -> Code:
        x = _checked(weights, x)
        if isinstance(selection, TopK):
            entries = self._topk(weights, x, selection.k)
        else:
            entries = self._batch_topk(weights, x, selection)
        least = float(entries.val.min()) if entries.val.numel() else 0.0
        shape = (len(x), len(weights.W_enc))
        return Code(entries.row_ptr, entries.col.long(), entries.val, shape, least)

    def _topk(self, weights: Weights, x: Tensor, k: int) -> _Entries:
        k = min(k, len(weights.W_enc))
        bias = _bias(weights)
        row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        parts = []
        for first, pre in self._pre_activations(weights, x):
            floors = (pre.float() + bias).topk(k, dim=1).values[:, -1].contiguous()
            part = _filtered(pre, bias, floors, pre.numel())
            row_ptr[first + 1 : first + 1 + len(pre)] = part.row_ptr[1:] + row_ptr[first]
            parts.append(part)
        return _Entries(
            row_ptr,
            torch.cat([part.col for part in parts]),
            torch.cat([part.val for part in parts]),
        )

    def _batch_topk(self, weights: Weights, x: Tensor, selection: BatchTopK) -> _Entries:
        """Filter by the guess and order what passes; if that was too little or too much, search."""
        bias = _bias(weights)
        count = min(selection.count(len(x)), len(x) * len(weights.W_enc))
        capacity = int(self.tuning.slack * count)
        col = torch.empty(capacity, dtype=torch.int32, device=x.device)
        val = torch.empty(capacity, dtype=torch.float32, device=x.device)
        row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        for first, pre in self._pre_activations(weights, x):
            floors = pre.new_full((len(pre),), selection.floor, dtype=torch.float32)
            ends = _filter(pre, bias, floors, row_ptr[first], col, val)
            row_ptr[first + 1 : first + 1 + len(pre)] = ends
        total = int(row_ptr[-1])
        if count <= total <= capacity:
            return _largest(_Entries(row_ptr, col[:total], val[:total]), count)
        floor = selection.floor if total > capacity else 0.0
        return self._search(weights, x, bias, floor, count)

    def _search(
        self, weights: Weights, x: Tensor, bias: Tensor, floor: float, count: int
    ) -> _Entries:
        """Batch top-k from any ``floor`` that is not above the answer.

        The largest of the tokens seen so far bound the answer from below, so the floor rises and
        no more than one chunk over ``count`` entries is held.
        """
        entries = _Entries(
            torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device),
            torch.empty(0, dtype=torch.int32, device=x.device),
            torch.empty(0, dtype=torch.float32, device=x.device),
        )
        floors = torch.full((len(x),), floor, device=x.device)
        for first, pre in self._pre_activations(weights, x):
            part = _filtered(pre, bias, floors[: len(pre)], pre.numel())
            held = entries.col.numel()
            entries.row_ptr[first + 1 : first + 1 + len(pre)] = part.row_ptr[1:] + held
            entries.row_ptr[first + 1 + len(pre) :] = part.row_ptr[-1] + held
            entries = _Entries(
                entries.row_ptr,
                torch.cat([entries.col, part.col]),
                torch.cat([entries.val, part.val]),
            )
            if entries.col.numel() > count:
                entries = _largest(entries, count)
                floors.fill_(entries.val.min())
        return entries

    def _pre_activations(self, weights: Weights, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``x @ W_encᵀ`` in chunks of tokens, each over the last one's memory."""
        F = len(weights.W_enc)
        tokens = min(len(x), max(1, self.tuning.chunk // F))
        buffer = x.new_empty(tokens, F)
        for first in range(0, len(x), tokens):
            chunk = x[first : first + tokens]
            yield first, torch.mm(chunk, weights.W_enc.T, out=buffer[: len(chunk)])

    # Decoder

    @torch.no_grad()
    def decode(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Decoded:
        x = _checked(weights, x)
        B, D = x.shape
        G = len(nested.prefixes)
        launch, slices = self._slices("decode", weights.W_dec)
        residual = torch.empty(B, D, dtype=torch.float32, device=x.device)
        partial = torch.empty(slices, B, G, dtype=torch.float32, device=x.device)
        _run(
            "decode",
            launch,
            (B, slices),
            *(x, weights.b_dec, weights.W_dec, code.col, code.val, _ends(code, nested)),
            *(residual, partial, B, D, G),
        )
        errors = partial.sum(dim=0) * _of_tokens(x, token_weights)[:, None]
        return Decoded(errors.sum(dim=0) / x.numel(), residual)

    @torch.no_grad()
    def contributions(self, weights: Weights, code: Code, nested: Nested) -> Float[Tensor, "G B D"]:
        """In float32: the sums of many ranks are added before anything is rounded."""
        B, D, G = code.shape[0], weights.W_dec.shape[1], len(nested.prefixes)
        launch, slices = self._slices("contribute", weights.W_dec)
        sums = torch.empty(G, B, D, dtype=torch.float32, device=code.col.device)
        tensors = (weights.W_dec, code.col, code.val, _ends(code, nested), sums)
        _run("contribute", launch, (B, slices), *tensors, B, D, G)
        return sums

    # Gradients

    @torch.no_grad()
    def suffixes(
        self,
        weights: Weights,
        code: Code,
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "G B D"]:
        return self._walk(weights, code, decoded, nested, token_weights)[0]

    @torch.no_grad()
    def gradients(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        S: Float[Tensor, "G B D"],
        nested: Nested,
        out: Weights | None = None,
    ) -> Weights:
        x = _checked(weights, x)
        dval = self._reverse(weights, code, S, None, None, nested)
        return self._weight_gradients(weights, code, x, S, dval, nested, out)

    @torch.no_grad()
    def backward(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
        out: Weights | None = None,
    ) -> Weights:
        x = _checked(weights, x)
        S, dval = self._walk(weights, code, decoded, nested, token_weights)
        return self._weight_gradients(weights, code, x, S, dval, nested, out)

    def _walk(
        self,
        weights: Weights,
        code: Code,
        decoded: Decoded,
        nested: Nested,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``S`` and the gradient of every entry, in one reverse pass."""
        residual = decoded.residual.contiguous()
        B, D = residual.shape
        S = weights.W_dec.new_empty(len(nested.prefixes), B, D)
        scale = 2 * _of_tokens(residual, token_weights) / residual.numel()
        return S, self._reverse(weights, code, S, residual, scale, nested)

    def _reverse(
        self,
        weights: Weights,
        code: Code,
        S: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        nested: Nested,
    ) -> Tensor:
        """Gradient of every entry; ``S`` is read, or written if a residual is given."""
        G, B, D = S.shape
        n = code.col.numel()
        launch, slices = self._slices("reverse", weights.W_dec)
        partial = torch.empty(slices, n, dtype=torch.float32, device=S.device)
        group_weights = torch.tensor(nested.weights, dtype=torch.float32, device=S.device)
        unused = group_weights
        _run(
            "reverse",
            launch,
            (B, slices),
            *(weights.W_dec, code.col, code.val, _ends(code, nested)),
            unused if residual is None else residual,
            S,
            unused if scale is None else scale,
            *(group_weights, partial, B, D, G, n),
            WALK=residual is not None,
        )
        return partial.sum(dim=0)

    def _weight_gradients(
        self,
        weights: Weights,
        code: Code,
        x: Tensor,
        S: Tensor,
        dval: Tensor,
        nested: Nested,
        out: Weights | None,
    ) -> Weights:
        grads = Weights(*(torch.empty_like(tensor) for tensor in weights)) if out is None else out
        columns = self._columns(code, nested)
        dval = dval[columns.order]
        d_bias = _column_sums(dval, columns)
        grads.b_enc.copy_(d_bias)
        grads.b_dec.copy_(self._centre_gradient(weights, S, d_bias))
        val = code.val[columns.order]
        for source, row, weight, grad in (
            (S.view(-1, S.shape[-1]), columns.suffix_row, val, grads.W_dec),
            (x, columns.row, dval, grads.W_enc),
        ):
            partial = self._segments(source, row, weight, columns)
            launch, slices = self._slices("column", source)
            _run(
                "column",
                launch,
                (len(grad), slices),
                *(source, row, weight, columns.col_ptr, columns.seg_ptr, partial),
                *(d_bias, weights.b_dec, grad, grad.shape[1]),
                CENTRE=grad is grads.W_enc,
            )
        return grads

    def _columns(self, code: Code, nested: Nested) -> _Columns:
        """Sort by latent (stably, so tokens ascend) and cut long latents, without a host sync."""
        B, F = code.shape
        n, device = code.col.numel(), code.col.device
        col, order = code.col.int().sort(stable=True)
        row = code.row()[order]
        edges = torch.tensor(nested.prefixes, dtype=torch.int32, device=device)
        group = torch.bucketize(col, edges, right=True)
        latents = torch.arange(F + 1, dtype=torch.int32, device=device)
        col_ptr = torch.searchsorted(col, latents)

        size = self.tuning.segment
        length = col_ptr.diff()
        segments = torch.where(length > size, (length + size - 1) // size, 0)
        seg_ptr = torch.cat([segments.new_zeros(1), segments.cumsum(dim=0)])
        # A latent of L > size entries has at most 2L / size segments, so this many suffice.
        s = torch.arange(2 * n // size, device=device)
        latent = torch.searchsorted(seg_ptr[1:], s, right=True).clamp_max(F - 1)
        used = s < seg_ptr[-1]
        begin = col_ptr[latent] + (s - seg_ptr[latent]) * size
        end = torch.minimum(begin + size, col_ptr[latent + 1])
        return _Columns(
            order,
            row,
            group * B + row,
            col_ptr,
            seg_ptr,
            torch.where(used, begin, 0),
            torch.where(used, end, 0),
        )

    def _segments(self, source: Tensor, row: Tensor, weight: Tensor, columns: _Columns) -> Tensor:
        """Sums of the segments of long latents, [s, D]; the first stage."""
        s, D = columns.seg_begin.numel(), source.shape[1]
        partial = torch.empty(s, D, dtype=torch.float32, device=source.device)
        if s:
            launch, slices = self._slices("segment", source)
            ranges = (columns.seg_begin, columns.seg_end)
            _run("segment", launch, (s, slices), source, row, weight, *ranges, partial, D)
        return partial

    def _centre_gradient(self, weights: Weights, S: Tensor, d_bias: Tensor) -> Tensor:
        """``∂L/∂b_dec = Σ_b S_1b − W_encᵀ ∂L/∂b_enc`` in float32, the product in segments."""
        F, size = len(d_bias), self.tuning.segment
        latents = torch.arange(F, device=S.device)
        begin = torch.arange(0, F, size, device=S.device)
        partial = torch.empty(len(begin), S.shape[-1], dtype=torch.float32, device=S.device)
        launch, slices = self._slices("segment", weights.W_enc)
        ranges = (begin, (begin + size).clamp_max(F))
        tensors = (weights.W_enc, latents, d_bias, *ranges, partial)
        _run("segment", launch, (len(begin), slices), *tensors, S.shape[-1])
        return S[0].sum(dim=0, dtype=torch.float32) - partial.sum(dim=0)

    # Auxiliary loss

    @torch.no_grad()
    def auxiliary(
        self,
        weights: Weights,
        x: Float[Tensor, "B D"],
        residual: Float[Tensor, "B D"],
        candidates: Int64[Tensor, " c"],
        k: int,
        scale: float = 1.0,
        out: Weights | None = None,
    ) -> Float[Tensor, ""]:
        """Dense products on the few candidates, in the weights' type; sums in float32."""
        x = _checked(weights, x)
        residual = residual.float()
        spread = (residual - residual.mean(dim=0)).square().sum()
        if candidates.numel() == 0 or float(spread) == 0:
            return residual.new_zeros(())
        W_enc, W_dec = weights.W_enc[candidates], weights.W_dec[candidates]
        centred = x - weights.b_dec
        pre = torch.relu(centred @ W_enc.T + weights.b_enc[candidates])
        least = pre.topk(min(k, candidates.numel()), dim=1).values[:, -1:]
        z = pre * (pre >= least)
        error = (z @ W_dec).float() - residual
        if out is not None:
            step = (2 * scale / spread * error).to(W_dec.dtype)
            d = (step @ W_dec.T) * (z > 0)
            d_bias = d.sum(dim=0, dtype=torch.float32)
            _add_rows(out.W_dec, candidates, z.T @ step)
            _add_rows(out.W_enc, candidates, d.T @ centred)
            _add_rows(out.b_enc, candidates, d_bias)
            out.b_dec.sub_((d_bias @ W_enc.float()).to(out.b_dec.dtype))
        return error.square().sum() / spread

    def _slices(self, name: str, gathered: Tensor) -> tuple[Launch, int]:
        """The widest launch whose slice of ``gathered`` stays in cache, and how many slices."""
        rows, D = gathered.shape
        launches = LAUNCHES[name][1]
        chosen = launches[0]
        for launch in launches[1:]:
            slice_bytes = rows * launch.block * gathered.element_size()
            if chosen.block >= D or slice_bytes > self.tuning.cache_bytes:
                break
            chosen = launch
        return chosen, triton.cdiv(D, chosen.block)


def _run(
    name: str, launch: Launch, grid: tuple[int, ...], *arguments: Any, **constants: Any
) -> None:
    """Launch a program on the device of its first tensor."""
    program, _ = LAUNCHES[name]
    constants |= {"BLOCK": launch.block}
    if "UNROLL" in program.arg_names:
        constants["UNROLL"] = launch.unroll
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants, **launch.options())


def _checked(weights: Weights, x: Tensor) -> Tensor:
    """``x`` in the weights' type and laid out as the programs read it."""
    dtype = weights.W_enc.dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"the Triton kernels take float32, bfloat16 or float16 weights, these are {dtype}; "
            "convert them, or ask for the kernels 'reference'"
        )
    if not (weights.W_enc.is_contiguous() and weights.W_dec.is_contiguous()):
        raise ConfigError(
            "W_enc and W_dec must be contiguous [F, D]; call .contiguous() on them once"
        )
    return x.to(dtype).contiguous()


def _of_tokens(like: Tensor, token_weights: Tensor | None) -> Tensor:
    if token_weights is None:
        return torch.ones(len(like), dtype=torch.float32, device=like.device)
    return token_weights.float()


def _bias(weights: Weights) -> Float[Tensor, " F"]:
    """What is added to ``x @ W_encᵀ``: ``b_enc − W_enc @ b_dec``, in float32."""
    F, D = weights.W_enc.shape
    bias = torch.empty(F, dtype=torch.float32, device=weights.W_enc.device)
    (launch,) = LAUNCHES["bias"][1]
    _run("bias", launch, (F,), weights.W_enc, weights.b_enc, weights.b_dec, bias, D)
    return bias


def _filter(
    pre: Tensor, bias: Tensor, floors: Tensor, base: Tensor, col: Tensor, val: Tensor
) -> Int64[Tensor, " T"]:
    """Write entries that pass into ``col`` and ``val`` from ``base`` on; where each token ends."""
    T, F = pre.shape
    (launch,) = LAUNCHES["count"][1]
    grid = (T, triton.cdiv(F, launch.block))
    counts = torch.empty(grid, dtype=torch.int32, device=pre.device)
    _run("count", launch, grid, pre, bias, floors, counts, F)
    ends = counts.view(-1).cumsum(dim=0) + base
    _run("compact", launch, grid, pre, bias, floors, counts, ends, col, val, F, col.numel())
    return ends.view(grid)[:, -1]


def _filtered(pre: Tensor, bias: Tensor, floors: Tensor, capacity: int) -> _Entries:
    """The entries of one chunk that pass."""
    col = torch.empty(capacity, dtype=torch.int32, device=pre.device)
    val = torch.empty(capacity, dtype=torch.float32, device=pre.device)
    zero = torch.zeros(1, dtype=torch.int64, device=pre.device)
    row_ptr = torch.cat([zero, _filter(pre, bias, floors, zero, col, val)])
    total = int(row_ptr[-1])
    return _Entries(row_ptr, col[:total].clone(), val[:total].clone())


def _largest(entries: _Entries, count: int) -> _Entries:
    """The ``count`` largest entries and ties with the smallest of them, in the same order."""
    keep = entries.val >= entries.val.topk(count, sorted=False).values.min()
    kept = torch.cat([entries.row_ptr.new_zeros(1), keep.cumsum(dim=0)])
    return _Entries(kept[entries.row_ptr], entries.col[keep], entries.val[keep])


def _ends(code: Code, nested: Nested) -> Int64[Tensor, "B G+1"]:
    """Where each token's groups begin among the entries, and where its last one ends."""
    B, F = code.shape
    device = code.col.device
    edges = torch.tensor((0, *nested.prefixes), dtype=torch.int64, device=device)
    starts = torch.arange(B, device=device)[:, None] * F
    return torch.searchsorted(code.row() * F + code.col, starts + edges)


def _column_sums(weight: Tensor, columns: _Columns) -> Float[Tensor, " F"]:
    """Each latent's weights added up."""
    sums = weight.new_empty(columns.col_ptr.numel() - 1)
    (launch,) = LAUNCHES["sum"][1]
    _run("sum", launch, (sums.numel(),), weight, columns.col_ptr, sums)
    return sums


def _add_rows(target: Tensor, rows: Tensor, addition: Tensor) -> None:
    """``target[rows] += addition``; the rows are distinct, so this is deterministic."""
    target[rows] += addition.to(target.dtype)
