"""A code sorted by latent, and sums over its columns by Triton programs.

A latent that is active on very many tokens would keep one program instance busy long after the
others are done, so its column is cut into segments of fixed length, summed first. The cut depends
on the column's length only: equal codes give equal bits.

Legend: B tokens, D width, F latents, n active entries, s segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae.kernels.interface import Code, Nested
from sae.kernels.launches import LAUNCHES, run, sliced


class Columns(NamedTuple):
    """A code by latent, then by token; see :func:`columns_of`."""

    order: Int64[Tensor, " n"]
    """Which entry of the code each one is."""
    row: Int64[Tensor, " n"]
    """Its token."""
    suffix_row: Int64[Tensor, " n"]
    """Its row in ``S`` seen as [G·B, D]."""
    col_ptr: Int64[Tensor, " F+1"]
    """Where each latent's entries begin."""
    seg_ptr: Int64[Tensor, " F+1"]
    """Where each latent's segments begin; a latent that is not cut has none."""
    seg_begin: Int64[Tensor, " s"]
    """Where each segment's entries begin; segments beyond those in use are empty."""
    seg_end: Int64[Tensor, " s"]


def columns_of(code: Code, nested: Nested, segment: int) -> Columns:
    """Sort by latent, stably, and cut latents of more than ``segment`` entries.

    Nothing waits for the device: sizes are bounds, not counts.
    """
    B, F = code.shape
    n, device = code.col.numel(), code.col.device
    col, order = code.col.int().sort(stable=True)
    row = code.row()[order]
    edges = torch.tensor(nested.prefixes, dtype=torch.int32, device=device)
    group = torch.bucketize(col, edges, right=True)
    latents = torch.arange(F + 1, dtype=torch.int32, device=device)
    col_ptr = torch.searchsorted(col, latents)

    length = col_ptr.diff()
    segments = torch.where(length > segment, (length + segment - 1) // segment, 0)
    seg_ptr = torch.cat([segments.new_zeros(1), segments.cumsum(dim=0)])
    # A column of L > segment entries makes fewer than 2L / segment segments.
    s = torch.arange(2 * n // segment, device=device)
    latent = torch.searchsorted(seg_ptr[1:], s, right=True).clamp_max(F - 1)
    used = s < seg_ptr[-1]
    begin = col_ptr[latent] + (s - seg_ptr[latent]) * segment
    end = torch.minimum(begin + segment, col_ptr[latent + 1])
    begin, end = torch.where(used, begin, 0), torch.where(used, end, 0)
    return Columns(order, row, group * B + row, col_ptr, seg_ptr, begin, end)


def column_sums(weight: Float[Tensor, " n"], columns: Columns) -> Float[Tensor, " F"]:
    """Each latent's weights added up."""
    sums = weight.new_empty(columns.col_ptr.numel() - 1)
    (launch,) = LAUNCHES["sum"][1]
    run("sum", launch, (sums.numel(),), weight, columns.col_ptr, sums)
    return sums


def range_sums(
    source: Float[Tensor, "rows D"],
    row: Int64[Tensor, " n"],
    weight: Float[Tensor, " n"],
    begin: Int64[Tensor, " s"],
    end: Int64[Tensor, " s"],
    cache_bytes: int,
) -> Float[Tensor, "s D"]:
    """``Σ weight[q] · source[row[q]]`` over each range ``begin ≤ q < end``, in float32."""
    s, D = begin.numel(), source.shape[1]
    sums = torch.empty(s, D, dtype=torch.float32, device=source.device)
    if s:
        launch, slices = sliced("segment", source, cache_bytes)
        run("segment", launch, (s, slices), source, row, weight, begin, end, sums, D)
    return sums
