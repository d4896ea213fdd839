"""One group's code as a sparse matrix Z [B, m], and the three products a training step takes of it.

Legend: B tokens, D width, m latents of the group, n active entries of the group.

Nothing of size n × D is ever made, and nothing is scattered: sums run over entries sorted by their
destination, so every output row is written once, by one thread, in a fixed order.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sae.kernels.interface import Code, Nested

BLOCK = 2**20
"""Elements of a result that are made at once, then copied out while they are in the cache."""

with warnings.catch_warnings():
    # Torch warns once a process that sparse compressed tensors are in beta.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
    )


class Entries(NamedTuple):
    """Active entries of one group, in both orders."""

    latents: int
    """m, the width of the group."""
    ptr: Int32[Tensor, " B+1"]
    """Where each token's entries begin."""
    col: Int32[Tensor, " n"]
    """Latent of each entry within its group, ascending in a token."""
    row: Int32[Tensor, " n"]
    """Token of each entry."""
    val: Float[Tensor, " n"]
    place: Int64[Tensor, " n"]
    """Where each entry stands in the whole code."""
    by_latent: Int64[Tensor, " n"]
    """The order that sorts entries by latent, then token."""
    latent_ptr: Int32[Tensor, " m+1"]
    """Where each latent's entries begin in that order."""
    latent_row: Int32[Tensor, " n"]
    """``row`` in that order."""

    def dense(self) -> Float[Tensor, "B m"]:
        z = self.val.new_zeros(len(self.ptr) - 1, self.latents)
        z[self.row, self.col] = self.val
        return z


def split(code: Code, nested: Nested) -> list[Entries]:
    """The entries of each group, by one stable sort of the code by group and one by latent."""
    batch, latents = code.shape
    spans = nested.spans()
    col = code.col.int()
    prefixes = torch.tensor(nested.prefixes, dtype=torch.int32)
    group = torch.bucketize(col, prefixes, right=True, out_int32=True)
    place = group.to(torch.int16).argsort(stable=True)  # group, token, latent
    row = code.row()[place].int()
    col = col[place]
    val = code.val[place]
    by_latent = col.argsort(stable=True)  # group, latent, token
    latent_row = row[by_latent]
    sizes = torch.bincount(group, minlength=len(spans)).tolist()
    per_latent = torch.bincount(col, minlength=latents)
    groups, begin = [], 0
    for (low, high), size in zip(spans, sizes, strict=True):
        part = slice(begin, begin + size)
        groups.append(
            Entries(
                latents=high - low,
                ptr=offsets(torch.bincount(row[part], minlength=batch)),
                col=col[part] - low,
                row=row[part],
                val=val[part],
                place=place[part],
                by_latent=by_latent[part] - begin,
                latent_ptr=offsets(per_latent[low:high]),
                latent_row=latent_row[part],
            )
        )
        begin += size
    return groups


def offsets(counts: Int64[Tensor, " n"]) -> Int32[Tensor, " n+1"]:
    """Where each of consecutive runs begins, and where the last ends.

    >>> offsets(torch.tensor([2, 0, 1])).tolist()
    [0, 2, 2, 3]
    """
    ptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, dim=0, out=ptr[1:])
    return ptr


def bag(
    index: Int32[Tensor, " n"],
    table: Float[Tensor, "rows D"],
    ptr: Int32[Tensor, " bags+1"],
    weight: Float[Tensor, " n"],
) -> Float[Tensor, "bags D"]:
    """Weighted sum of the rows of ``table`` in each bag; bag i is ``index[ptr[i] : ptr[i+1]]``."""
    return functional.embedding_bag(
        index, table, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def sampled_dots(
    ptr: Int32[Tensor, " B+1"],
    col: Int32[Tensor, " n"],
    left: Float[Tensor, "B D"],
    right: Float[Tensor, "m D"],
) -> Float[Tensor, " n"]:
    """``left[b] · right[j]`` at the entries (b, j) of a matrix in compressed rows."""
    pattern = torch.sparse_csr_tensor(
        ptr, col, left.new_zeros(len(col)), (len(left), len(right)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def forward(
    entries: Entries, table: Float[Tensor, "m D"], dense: Float[Tensor, "B m"] | None
) -> Float[Tensor, "B D"]:
    """``Z @ table``. Here and below, ``dense`` is Z written out if products are to be dense."""
    if dense is not None:
        return dense @ table
    return bag(entries.col, table, entries.ptr, entries.val)


def dots(
    entries: Entries,
    left: Float[Tensor, "B D"],
    table: Float[Tensor, "m D"],
    dense: Float[Tensor, "B m"] | None,
) -> Float[Tensor, " n"]:
    """``left @ tableᵀ`` at the entries of Z."""
    if dense is not None:
        return (left @ table.T)[entries.row, entries.col]
    return sampled_dots(entries.ptr, entries.col, left, table)


def transposed(
    entries: Entries,
    values: Float[Tensor, " n"],
    table: Float[Tensor, "B D"],
    dense: Float[Tensor, "B m"] | None,
    out: Float[Tensor, "m D"],
) -> None:
    """``Vᵀ @ table`` into ``out``, for a matrix V with ``values`` at the entries of Z."""
    if dense is not None:
        v = torch.zeros_like(dense)
        v[entries.row, entries.col] = values
        torch.mm(v.T, table, out=out)
        return
    values = values[entries.by_latent]
    step = max(1, BLOCK // table.shape[1])
    bounds = [*entries.latent_ptr[::step].tolist(), len(values)]
    for i, begin in enumerate(range(0, entries.latents, step)):
        end = min(begin + step, entries.latents)
        part = slice(bounds[i], bounds[i + 1])
        ptr = entries.latent_ptr[begin : end + 1] - bounds[i]
        out[begin:end] = bag(entries.latent_row[part], table, ptr, values[part])
