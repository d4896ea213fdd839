"""The kernels written as their formulas: dense, slow, any floating type. Oracle and documentation.

Everything else in this package is tested against this file, and this file against autograd.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

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


class ReferenceKernels(Kernels):
    """See :class:`sae.kernels.interface.Kernels`."""

    name = "reference"

    @torch.no_grad()
    def encode(self, weights: Weights, x: Float[Tensor, "B D"], selection: Selection) -> Code:
        pre = torch.relu((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc)
        batch, latents = pre.shape
        if isinstance(selection, BatchTopK):
            count = min(selection.count(batch), pre.numel())
            least = pre.flatten().sort(descending=True).values[count - 1]
        elif isinstance(selection, TopK):
            count = min(selection.k, latents)
            least = pre.sort(dim=1, descending=True).values[:, count - 1 : count]
        else:
            return code_of(pre * (pre > selection.threshold))
        return code_of(pre * (pre >= least))

    @torch.no_grad()
    def decode(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Decoded:
        residual = weights.b_dec - x
        losses = []
        for contribution in self.contributions(weights, code, nested):
            residual = residual + contribution
            losses.append((_of_tokens(x, token_weights) * residual.square()).sum() / x.numel())
        return Decoded(torch.stack(losses), residual)

    @torch.no_grad()
    def suffixes(
        self,
        weights: Weights,
        code: Code,
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "G B D"]:
        residual = decoded.residual
        scale = 2 * _of_tokens(residual, token_weights) / residual.numel()
        contributions = self.contributions(weights, code, nested)
        S, suffix = torch.empty_like(contributions), torch.zeros_like(residual)
        for g in reversed(range(len(nested.prefixes))):
            suffix = suffix + nested.weights[g] * scale * residual
            S[g] = suffix
            residual = residual - contributions[g]
        return S

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
        z = code.dense()
        grads = weights.zeros() if out is None else out
        d = torch.empty_like(z)  # ∂L/∂z on the entries kept
        for (low, high), suffix in zip(nested.spans(), S, strict=True):
            grads.W_dec[low:high] = z[:, low:high].T @ suffix
            d[:, low:high] = (suffix @ weights.W_dec[low:high].T) * (z[:, low:high] > 0)
        grads.W_enc.copy_(d.T @ (x - weights.b_dec))
        grads.b_enc.copy_(d.sum(dim=0))
        grads.b_dec.copy_(S[0].sum(dim=0) - grads.b_enc @ weights.W_enc)
        return grads

    @torch.no_grad()
    def contributions(self, weights: Weights, code: Code, nested: Nested) -> Float[Tensor, "G B D"]:
        z = code.dense()
        return torch.stack([z[:, a:b] @ weights.W_dec[a:b] for a, b in nested.spans()])

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
        spread = (residual - residual.mean(dim=0)).square().sum()
        if candidates.numel() == 0 or float(spread) == 0:
            return residual.new_zeros(())
        W_enc, W_dec = weights.W_enc[candidates], weights.W_dec[candidates]
        centred = x - weights.b_dec
        pre = torch.relu(centred @ W_enc.T + weights.b_enc[candidates])
        least = pre.topk(min(k, candidates.numel()), dim=1).values[:, -1:]
        z = pre * (pre >= least)
        error = z @ W_dec - residual
        if out is not None:
            step = 2 * scale / spread * error
            d = (step @ W_dec.T) * (z > 0)
            d_bias = d.sum(dim=0)
            out.W_dec.index_add_(0, candidates, z.T @ step)
            out.W_enc.index_add_(0, candidates, d.T @ centred)
            out.b_enc.index_add_(0, candidates, d_bias)
            out.b_dec.sub_(d_bias @ W_enc)
        return error.square().sum() / spread


def code_of(z: Float[Tensor, "B F"]) -> Code:
    """The sparse form of a dense code.

    >>> code_of(torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 1.0]])).row_ptr.tolist()
    [0, 1, 1, 3]
    """
    row, col = z.nonzero(as_tuple=True)
    val = z[row, col]
    ends = torch.bincount(row, minlength=len(z)).cumsum(dim=0)
    row_ptr = torch.cat([ends.new_zeros(1), ends])
    least = float(val.min()) if val.numel() else 0.0
    return Code(row_ptr, col, val, (z.shape[0], z.shape[1]), least)


def _of_tokens(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """Weights of the tokens as a column, 1 where none are given."""
    return x.new_ones(len(x), 1) if token_weights is None else token_weights[:, None]
