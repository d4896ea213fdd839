"""Triton programs of the training step; :mod:`sae.kernels.launches` has the shapes they run in.

Legend: B tokens, D width, F latents, G groups, n active entries; ``c`` numbers slices of ``BLOCK``
columns of the width. All tensors are row-major.

Four rules hold for all of them.

- Tokens or latents lie on grid axis 0, which runs fastest, and slices of the width on axis 1. So
  one slice of the gathered matrix, which fits the cache, serves every row before the next begins.
- Everything is converted to float32 right after it is loaded and accumulated there.
- Offsets are 64-bit: ``B·F`` and ``G·B·D`` pass 2³¹ at sizes people use.
- No atomics: the order of every sum is fixed, so equal inputs give equal bits. Each entry's sum
  over slices, and long columns' sums over segments, are finished in a second stage.

No program multiplies matrices; the encoder's product belongs to cuBLAS.
"""

# To a type checker a program called from a program never returns.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("B", "G", "n", "capacity")
"""Sizes of which compiled code knows nothing; of ``D`` and ``F`` it knows whether 16 divides them,
which decides how wide a load may be. So what a test compiles ahead of time is what runs."""


@triton.jit
def _wide(pointer, offsets, inside):
    """Load and convert at once: the interpreter computes wrongly on bfloat16."""
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _passing(pre, bias, floors, t, f, F):
    """Biased pre-activations of row ``t``, and which are positive and at or above its floor."""
    inside = f < F
    value = _wide(pre, t * F + f, inside) + _wide(bias, f, inside)
    return value, inside & (value > 0) & (value >= tl.load(floors + t))


@triton.jit(do_not_specialize=SIZES)
def bias_program(W_enc, b_enc, b_dec, bias, D, BLOCK: tl.constexpr):
    """``bias[j] = b_enc[j] − W_enc[j] · b_dec``, in float32 whatever the weights are."""
    j = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        total += _wide(W_enc, j * D + d, d < D) * _wide(b_dec, d, d < D)
    tl.store(bias + j, tl.load(b_enc + j).to(tl.float32) - tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def count_program(pre, bias, floors, counts, F, BLOCK: tl.constexpr):
    """``counts[t, c]``: entries of a slice of row ``t`` that pass its floor."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    _, keep = _passing(pre, bias, floors, t, c * BLOCK + tl.arange(0, BLOCK), F)
    tl.store(counts + t * tl.num_programs(1) + c, tl.sum(keep.to(tl.int32), 0))


@triton.jit(do_not_specialize=SIZES)
def compact_program(pre, bias, floors, counts, ends, col, val, F, capacity, BLOCK: tl.constexpr):
    """Write the passing entries side by side, in order; ``ends`` are running sums of counts.

    What lies beyond ``capacity`` is dropped; the launcher compares the last end with it.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    slot = t * tl.num_programs(1) + c
    count = tl.load(counts + slot)
    if count > 0:
        f = c * BLOCK + tl.arange(0, BLOCK)
        value, keep = _passing(pre, bias, floors, t, f, F)
        rank = tl.cumsum(keep.to(tl.int32), 0)
        at = tl.load(ends + slot) - count + rank - 1
        keep = keep & (at < capacity)
        tl.store(col + at, f, mask=keep)
        tl.store(val + at, value, mask=keep)


@triton.jit(do_not_specialize=SIZES)
def decode_program(
    x, b_dec, W_dec, col, val, ends, residual, partial,
    B, D, G, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Residuals of every prefix in one pass over a token's entries; only the last is stored.

    ``ends[b, g]`` is where group ``g``'s entries begin, ``ends[b, G]`` where the token ends.
    ``partial[c, b, g]`` is the squared error of prefix ``g`` within slice ``c``.
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    tokens = B.to(tl.int64)
    d = c.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    error = _wide(b_dec, d, inside) - _wide(x, b * D + d, inside)
    begin = tl.load(ends + b * (G + 1))
    for g in range(0, G):
        end = tl.load(ends + b * (G + 1) + g + 1)
        for first in range(begin, end, UNROLL):
            for u in tl.static_range(UNROLL):
                live = first + u < end
                j = tl.load(col + first + u, mask=live, other=0)
                z = tl.load(val + first + u, mask=live, other=0.0).to(tl.float32)
                error += z * _wide(W_dec, j * D + d, inside & live)
        tl.store(partial + (c * tokens + b) * G + g, tl.sum(error * error, 0))
        begin = end
    tl.store(residual + b * D + d, error.to(residual.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def contribute_program(
    W_dec, col, val, ends, sums, B, D, G, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """``sums[g, b]``: the decoder rows of group ``g`` that token ``b`` uses, weighted."""
    b = tl.program_id(0).to(tl.int64)
    tokens = B.to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    begin = tl.load(ends + b * (G + 1))
    for g in range(0, G):
        end = tl.load(ends + b * (G + 1) + g + 1)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(begin, end, UNROLL):
            for u in tl.static_range(UNROLL):
                live = first + u < end
                j = tl.load(col + first + u, mask=live, other=0)
                z = tl.load(val + first + u, mask=live, other=0.0).to(tl.float32)
                total += z * _wide(W_dec, j * D + d, inside & live)
        at = (g * tokens + b) * D + d
        tl.store(sums + at, total.to(sums.dtype.element_ty), mask=inside)
        begin = end


@triton.jit(do_not_specialize=SIZES)
def reverse_program(
    W_dec, col, val, ends, residual, S, scale, group_weights, partial,
    B, D, G, n, WALK: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Suffix sums and their products with decoder rows, from the last group to the first.

    With ``WALK``, ``S`` is made and stored: each earlier residual is the later one less the
    group between them, so none but the last was kept. Without it ``S`` is read.
    ``partial[c, q]`` is slice ``c`` of ``S_h(j) · W_dec[j]`` for entry ``q``; ``scale[b]`` is
    ``2 t_b / (B·D)``.
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    tokens = B.to(tl.int64)
    d = c.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    end = tl.load(ends + b * (G + 1) + G)
    suffix = tl.zeros([BLOCK], tl.float32)
    if WALK:
        error = _wide(residual, b * D + d, inside)
        token = tl.load(scale + b)
    for back in range(0, G):
        g = G - 1 - back
        at = (g * tokens + b) * D + d
        if WALK:
            suffix += token * tl.load(group_weights + g) * error
            tl.store(S + at, suffix.to(S.dtype.element_ty), mask=inside)
        else:
            suffix = _wide(S, at, inside)
        begin = tl.load(ends + b * (G + 1) + g)
        for first in range(begin, end, UNROLL):
            for u in tl.static_range(UNROLL):
                live = first + u < end
                j = tl.load(col + first + u, mask=live, other=0)
                row = _wide(W_dec, j * D + d, inside & live)
                dot = tl.sum(suffix * row, 0)
                tl.store(partial + c * n + first + u, dot, mask=live)
                if WALK:
                    error -= tl.load(val + first + u, mask=live, other=0.0).to(tl.float32) * row
        end = begin


@triton.jit
def _gather(
    source, row, weight, begin, end, D, d, inside, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """``Σ_q weight[q] · source[row[q]]`` over ``begin ≤ q < end``."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, UNROLL):
        for u in tl.static_range(UNROLL):
            live = first + u < end
            r = tl.load(row + first + u, mask=live, other=0)
            w = tl.load(weight + first + u, mask=live, other=0.0).to(tl.float32)
            total += w * _wide(source, r * D + d, inside & live)
    return total


@triton.jit
def _column(
    source, row, weight, col_ptr, seg_ptr, partial, j, D, d, inside,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Latent ``j``'s sum: over its entries, or over its segments if it was split."""
    begin = tl.load(col_ptr + j)
    end = tl.load(col_ptr + j + 1)
    first = tl.load(seg_ptr + j)
    last = tl.load(seg_ptr + j + 1)
    end = tl.where(last > first, begin, end)
    total = _gather(source, row, weight, begin, end, D, d, inside, BLOCK, UNROLL)
    for s in range(first, last):
        total += _wide(partial, s * D + d, inside)
    return total


@triton.jit(do_not_specialize=SIZES)
def segment_program(
    source, row, weight, seg_begin, seg_end, partial,
    D, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """First stage of long columns: ``partial[s]`` is the sum of one segment."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    begin = tl.load(seg_begin + s)
    end = tl.load(seg_end + s)
    total = _gather(source, row, weight, begin, end, D, d, inside, BLOCK, UNROLL)
    tl.store(partial + s * D + d, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def column_program(
    source, row, weight, col_ptr, seg_ptr, partial, bias_grad, b_dec, grad,
    D, CENTRE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A weight gradient: ``grad[j]`` is latent ``j``'s sum of weighted rows of ``source``.

    With ``CENTRE`` the rows are meant less ``b_dec``: ``Σ d (x − b) = Σ d x − (Σ d) b``.
    """
    j = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = _column(source, row, weight, col_ptr, seg_ptr, partial, j, D, d, inside, BLOCK, UNROLL)
    if CENTRE:
        total -= tl.load(bias_grad + j) * _wide(b_dec, d, inside)
    tl.store(grad + j * D + d, total.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_program(weight, col_ptr, sums, BLOCK: tl.constexpr):
    """``sums[j]``: a column's weights added up."""
    j = tl.program_id(0).to(tl.int64)
    end = tl.load(col_ptr + j + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(col_ptr + j), end, BLOCK):
        q = first + tl.arange(0, BLOCK)
        total += _wide(weight, q, q < end)
    tl.store(sums + j, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def update_program(
    source, row, weight, col_ptr, seg_ptr, partial, bias_grad, b_dec,
    W, exp_avg, exp_avg_sq, shadow,
    step, rest_1, beta_2, rest_2, root_2, eps,
    D, DECODER: tl.constexpr, SHADOW: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """:func:`column_program` and Adam on one latent's row, the gradient never stored.

    ``step`` is lr / (1 − β₁ᵗ), ``rest`` are 1 − β, ``root_2`` is √(1 − β₂ᵗ), as in
    ``torch.optim.Adam``. With ``DECODER`` the gradient first loses its part along the row and
    the row is afterwards scaled to unit length, so there one slice must hold it. ``SHADOW`` keeps
    a copy in another type.
    """
    j = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    grad = _column(source, row, weight, col_ptr, seg_ptr, partial, j, D, d, inside, BLOCK, UNROLL)
    at = j * D + d
    w = _wide(W, at, inside)
    if DECODER:
        grad -= tl.sum(grad * w, 0) * w
    else:
        grad -= tl.load(bias_grad + j) * _wide(b_dec, d, inside)
    m = _wide(exp_avg, at, inside)
    m += rest_1 * (grad - m)
    v = _wide(exp_avg_sq, at, inside) * beta_2 + rest_2 * grad * grad
    w -= tl.div_rn(step * m, tl.div_rn(tl.sqrt_rn(v), root_2) + eps)
    if DECODER:
        w = tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-12))
    tl.store(W + at, w.to(W.dtype.element_ty), mask=inside)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
    if SHADOW:
        tl.store(shadow + at, w.to(shadow.dtype.element_ty), mask=inside)
