"""The kernels on a CUDA device: cuBLAS for the encoder's product, Triton programs for the rest.

A step touches the dense ``[B, F]`` pre-activations only in chunks of tokens, on their way through
a filter; everything after works on the n active entries. Reductions are ordered and no program
uses atomics, so equal inputs give equal bits.

Legend: B tokens, D width, F latents, G groups, n active entries, T tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae.kernels.adam import DictionaryAdam
from sae.kernels.columns import column_sums, columns_of, range_sums
from sae.kernels.filtering import Tuning, checked, selected
from sae.kernels.interface import Code, Decoded, Kernels, Nested, Selection, Weights
from sae.kernels.launches import run, sliced, whole_row


class _ColumnInputs(NamedTuple):
    """What the weights' gradients are summed from."""

    d_b_enc: Float[Tensor, " F"]
    d_b_dec: Float[Tensor, " D"]
    matrices: dict[str, tuple[Tensor, ...]]
    """Of ``W_dec`` and ``W_enc``, the leading arguments of their programs."""


class TritonKernels(Kernels):
    """See :class:`sae.kernels.interface.Kernels`.

    Takes float32 or bfloat16; sums are in float32. The code's values and the residual
    are float32, ``S`` has the weights' type, gradients that of ``out``.
    """

    name = "triton"

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()

    @torch.no_grad()
    def encode(self, weights: Weights, x: Float[Tensor, "B D"], selection: Selection) -> Code:
        return selected(weights, checked(weights, x), selection, self.tuning)

    @torch.no_grad()
    def decode(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Decoded:
        x = checked(weights, x)
        B, D = x.shape
        G = len(nested.prefixes)
        launch, slices = sliced("decode", weights.W_dec, self.tuning.cache_bytes)
        residual = torch.empty(B, D, dtype=torch.float32, device=x.device)
        partial = torch.empty(slices, B, G, dtype=torch.float32, device=x.device)
        run(
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
        launch, slices = sliced("contribute", weights.W_dec, self.tuning.cache_bytes)
        sums = torch.empty(G, B, D, dtype=torch.float32, device=code.col.device)
        tensors = (weights.W_dec, code.col, code.val, _ends(code, nested), sums)
        run("contribute", launch, (B, slices), *tensors, B, D, G)
        return sums

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
        x, S = checked(weights, x, out), S.contiguous()
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
        x = checked(weights, x, out)
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
        launch, slices = sliced("reverse", weights.W_dec, self.tuning.cache_bytes)
        partial = torch.empty(slices, n, dtype=torch.float32, device=S.device)
        group_weights = torch.tensor(nested.weights, dtype=torch.float32, device=S.device)
        unused = group_weights
        run(
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
        sums = self._column_inputs(weights, code, x, S, dval, nested)
        grads.b_enc.copy_(sums.d_b_enc)
        grads.b_dec.copy_(sums.d_b_dec)
        for name, inputs in sums.matrices.items():
            grad: Tensor = getattr(grads, name)
            launch, slices = sliced("column", inputs[0], self.tuning.cache_bytes)
            grid = (len(grad), slices)
            run("column", launch, grid, *inputs, grad, grad.shape[1], CENTRE=name == "W_enc")
        return grads

    def _column_inputs(
        self, weights: Weights, code: Code, x: Tensor, S: Tensor, dval: Tensor, nested: Nested
    ) -> _ColumnInputs:
        columns = columns_of(code, nested, self.tuning.segment)
        dval = dval[columns.order]
        d_b_enc = column_sums(dval, columns)

        # Σ_b S_1b − W_encᵀ d_b_enc, the product as sums over ranges of latents.
        F, device = len(d_b_enc), S.device
        begin = torch.arange(0, F, self.tuning.segment, device=device)
        ranges = (begin, (begin + self.tuning.segment).clamp_max(F))
        cache = self.tuning.cache_bytes
        latents = torch.arange(F, device=device)
        product = range_sums(weights.W_enc, latents, d_b_enc, *ranges, cache).sum(dim=0)
        d_b_dec = S[0].sum(dim=0, dtype=torch.float32) - product

        matrices = {}
        for name, source, row, weight in (
            ("W_dec", S.view(-1, S.shape[-1]), columns.suffix_row, code.val[columns.order]),
            ("W_enc", x, columns.row, dval),
        ):
            gathered = (source, row, weight)
            partial = range_sums(*gathered, columns.seg_begin, columns.seg_end, cache)
            pointers = (columns.col_ptr, columns.seg_ptr)
            matrices[name] = (*gathered, *pointers, partial, d_b_enc, weights.b_dec)
        return _ColumnInputs(d_b_enc, d_b_dec, matrices)

    @torch.no_grad()
    def update(
        self,
        optimizer: DictionaryAdam,
        lr: float,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> None:
        """:meth:`backward` and ``optimizer.update(gradients, lr)`` in one, gradients never stored.

        The same step up to rounding. There is no clipping, which needs the norm of all gradients
        first, and nothing can be added to the gradients, so it is for steps without an auxiliary
        loss. ``weights`` are the optimizer's own, or a copy of them in another type, which is
        brought up to date.

        Raises
        ------
        ConfigError
            If the width is more than a program instance holds.
        """
        x = checked(weights, x)
        master, D = optimizer.weights, x.shape[1]
        whole = whole_row("update", D)
        S, dval = self._walk(weights, code, decoded, nested, token_weights)
        sums = self._column_inputs(weights, code, x, S, dval, nested)
        optimizer.steps += 1
        beta_1, beta_2 = optimizer.betas
        step = lr / (1 - beta_1**optimizer.steps)
        root_2 = (1 - beta_2**optimizer.steps) ** 0.5
        scalars = (step, 1 - beta_1, beta_2, 1 - beta_2, root_2, optimizer.eps)
        for name, inputs in sums.matrices.items():
            tensors = [getattr(w, name) for w in (master, optimizer.exp_avg, optimizer.exp_avg_sq)]
            shadow: Tensor = getattr(weights, name)
            switches = {"DECODER": name == "W_dec", "SHADOW": shadow is not tensors[0]}
            launch, slices = (
                (whole, 1)
                if name == "W_dec"
                else sliced("update", inputs[0], self.tuning.cache_bytes)
            )
            grid = (len(shadow), slices)
            run("update", launch, grid, *inputs, *tensors, shadow, *scalars, D, **switches)
        for name, grad in (("b_enc", sums.d_b_enc), ("b_dec", sums.d_b_dec)):
            bias, m, v = (
                getattr(w, name) for w in (master, optimizer.exp_avg, optimizer.exp_avg_sq)
            )
            m.lerp_(grad, 1 - beta_1)
            v.mul_(beta_2).addcmul_(grad, grad, value=1 - beta_2)
            bias.addcdiv_(m, v.sqrt().div_(root_2).add_(optimizer.eps), value=-step)
            if getattr(weights, name) is not bias:
                getattr(weights, name).copy_(bias)

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
        x = checked(weights, x)
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


def _of_tokens(like: Tensor, token_weights: Tensor | None) -> Tensor:
    if token_weights is None:
        return torch.ones(len(like), dtype=torch.float32, device=like.device)
    return token_weights.float()


def _ends(code: Code, nested: Nested) -> Int64[Tensor, "B G+1"]:
    """Where each token's groups begin among the entries, and where its last one ends."""
    B, F = code.shape
    device = code.col.device
    edges = torch.tensor((0, *nested.prefixes), dtype=torch.int64, device=device)
    starts = torch.arange(B, device=device)[:, None] * F
    return torch.searchsorted(code.row() * F + code.col, starts + edges)


def _add_rows(target: Tensor, rows: Tensor, addition: Tensor) -> None:
    """``target[rows] += addition``; the rows are distinct, so this is deterministic."""
    target[rows] += addition.to(target.dtype)
