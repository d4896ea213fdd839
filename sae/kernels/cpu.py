"""Kernels for a CPU: the formulas of the interface over the active entries only.

Legend: B tokens, D width, F latents, G groups, m latents of a group, n active entries.

A group's code is dense or sparse by its own share of active entries (:mod:`sae.kernels.cost`): the
innermost group of a Matryoshka dictionary may fire densely enough for matrix products to win.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hooks.files import ConfigError
from sae.kernels import cost, encoder
from sae.kernels.interface import (
    BatchTopK,
    Code,
    Decoded,
    Kernels,
    Nested,
    Selection,
    Weights,
)
from sae.kernels.sparse import Entries, dots, forward, split, transposed


class CPUKernels(Kernels):
    """See :class:`sae.kernels.interface.Kernels`.

    Parameters
    ----------
    screen
        Whether to find candidates by a bf16 product first; ``None`` decides by the processor. The
        entries kept are the same either way, their values equal up to rounding.
    """

    name = "cpu"

    def __init__(self, screen: bool | None = None) -> None:
        self.screen = screen

    @torch.no_grad()
    def encode(self, weights: Weights, x: Float[Tensor, "B D"], selection: Selection) -> Code:
        _check(weights, x)
        if isinstance(selection, BatchTopK):
            screen = cost.screens(x.dtype) if self.screen is None else self.screen
            count = selection.count(len(x))
            return encoder.batch_topk(weights, x, count, selection.floor, screen)
        return encoder.topk(weights, x, selection.k)

    @torch.no_grad()
    def decode(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Decoded:
        spans = nested.spans()
        inner = x.new_empty(len(spans) - 1, *x.shape)
        residual = weights.b_dec - x
        losses = []
        for g, entries in enumerate(split(code, nested)):
            low, high = spans[g]
            contribution = forward(entries, weights.W_dec[low:high], _dense(entries))
            kept = inner[g] if g < len(inner) else contribution
            residual = torch.add(residual, contribution, out=kept)
            squared = residual.norm(dim=1).square()
            losses.append(squared.sum() if token_weights is None else squared @ token_weights)
        return Decoded(torch.stack(losses) / x.numel(), residual, inner)

    @torch.no_grad()
    def suffixes(
        self,
        weights: Weights,
        code: Code,
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "G B D"]:
        S = decoded.residual.new_empty(len(nested.prefixes), *decoded.residual.shape)
        walk = _Walk(weights, decoded, nested, token_weights)
        groups = split(code, nested)
        for g in reversed(range(len(groups))):
            S[g] = walk.suffix(g)
            walk.leave(g, groups[g], _dense(groups[g]))
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
        grads = Weights(*map(torch.empty_like, weights)) if out is None else out
        centred = x - weights.b_dec
        groups = split(code, nested)
        for g, entries in enumerate(groups):
            _group_gradients(weights, entries, _dense(entries), centred, S[g], nested, g, grads)
        return _bias_gradient(weights, S[0], grads)

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
        """Suffixes and gradients in one walk: only one group's suffix exists at a time."""
        grads = Weights(*map(torch.empty_like, weights)) if out is None else out
        centred = x - weights.b_dec
        walk = _Walk(weights, decoded, nested, token_weights)
        groups = split(code, nested)
        for g in reversed(range(len(groups))):
            dense = _dense(groups[g])
            suffix = walk.suffix(g)
            _group_gradients(weights, groups[g], dense, centred, suffix, nested, g, grads)
            walk.leave(g, groups[g], dense)
        return _bias_gradient(weights, walk.sum, grads)

    @torch.no_grad()
    def contributions(self, weights: Weights, code: Code, nested: Nested) -> Float[Tensor, "G B D"]:
        width = weights.W_dec.shape[1]
        result = weights.W_dec.new_empty(len(nested.prefixes), code.shape[0], width)
        spans = nested.spans()
        for g, entries in enumerate(split(code, nested)):
            low, high = spans[g]
            result[g] = forward(entries, weights.W_dec[low:high], _dense(entries))
        return result

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
        some = Weights(
            weights.W_enc[candidates],
            weights.b_enc[candidates],
            weights.W_dec[candidates],
            weights.b_dec,
        )
        code = encoder.topk(some, x, k)
        whole = Nested((len(candidates),), (1.0,))
        error = self.contributions(some, code, whole)[0].sub_(residual)
        loss = error.square().sum() / spread
        if out is not None:
            error *= 2 * scale / spread
            grads = self.gradients(some, code, x, error[None], whole)
            out.W_enc.index_add_(0, candidates, grads.W_enc)
            out.b_enc.index_add_(0, candidates, grads.b_enc)
            out.W_dec.index_add_(0, candidates, grads.W_dec)
            out.b_dec.sub_(grads.b_enc @ some.W_enc)
        return loss


class _Walk:
    """From the last residual back through the groups, with the suffix sum of what was passed."""

    def __init__(
        self, weights: Weights, decoded: Decoded, nested: Nested, token_weights: Tensor | None
    ) -> None:
        self.weights, self.nested, self.inner = weights, nested, decoded.inner
        self.residual = decoded.residual
        self.sum = torch.zeros_like(self.residual)
        self.scale = 2 / self.residual.numel()
        self.tokens = None if token_weights is None else token_weights[:, None] * self.scale

    def suffix(self, g: int) -> Float[Tensor, "B D"]:
        """``S`` of group ``g``; overwritten by the next call."""
        weight = self.nested.weights[g]
        if self.tokens is None:
            return self.sum.add_(self.residual, alpha=self.scale * weight)
        return self.sum.addcmul_(self.residual, self.tokens, value=weight)

    def leave(self, g: int, entries: Entries, dense: Tensor | None) -> None:
        """Go on to the residual without group ``g``."""
        if g == 0:
            return
        if self.inner is not None:
            self.residual = self.inner[g - 1]
        else:
            low, high = self.nested.spans()[g]
            self.residual = self.residual - forward(entries, self.weights.W_dec[low:high], dense)


def _group_gradients(
    weights: Weights,
    entries: Entries,
    dense: Tensor | None,
    centred: Float[Tensor, "B D"],
    suffix: Float[Tensor, "B D"],
    nested: Nested,
    g: int,
    grads: Weights,
) -> None:
    low, high = nested.spans()[g]
    transposed(entries, entries.val, suffix, dense, grads.W_dec[low:high])
    d = dots(entries, suffix, weights.W_dec[low:high], dense)
    transposed(entries, d, centred, dense, grads.W_enc[low:high])
    grads.b_enc[low:high] = torch.bincount(entries.col, weights=d, minlength=high - low)


def _bias_gradient(weights: Weights, first: Float[Tensor, "B D"], grads: Weights) -> Weights:
    torch.sub(first.sum(dim=0), grads.b_enc @ weights.W_enc, out=grads.b_dec)
    return grads


def _dense(entries: Entries) -> Float[Tensor, "B m"] | None:
    """The group's code written out, where that makes its passes cheaper."""
    few = cost.sparse_below(len(entries.ptr) - 1, entries.latents)
    return None if len(entries.col) < few else entries.dense()


def _check(weights: Weights, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != weights.W_enc.dtype:
        raise ConfigError(
            f"kernels 'cpu' take float32 or float64 throughout, got x in {x.dtype} and weights in "
            f"{weights.W_enc.dtype}; convert both"
        )
