"""A training step's loss as a differentiable function of the dictionary, by any implementation."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from hooks.files import ConfigError
from sae.kernels.interface import Decoded, Kernels, Nested, Selection, Weights


def nested_loss(
    kernels: Kernels,
    weights: Weights,
    x: Float[Tensor, "B D"],
    selection: Selection,
    nested: Nested,
    token_weights: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " G"]]:
    """``L = Σ_g w_g ℓ_g`` and its ``ℓ_g`` (see :mod:`sae.kernels.interface`).

    ``L`` has gradients with respect to the four weights, once; ``ℓ_g`` have none.

    Raises
    ------
    ConfigError
        If a gradient with respect to ``x`` or ``token_weights`` would be needed.
    """
    if x.requires_grad or (token_weights is not None and token_weights.requires_grad):
        raise ConfigError(
            "nested_loss has no gradients with respect to x or token_weights, but one requires "
            "them; detach it"
        )
    return _NestedLoss.apply(*weights, x, kernels, selection, nested, token_weights)  # type: ignore[return-value]


class _NestedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        kernels: Kernels,
        selection: Selection,
        nested: Nested,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weights = Weights(W_enc, b_enc, W_dec, b_dec)
        code = kernels.encode(weights, x, selection)
        decoded = kernels.decode(weights, code, x, nested, token_weights)
        ctx.save_for_backward(*weights, x, *decoded, token_weights)
        ctx.kernels, ctx.code, ctx.nested = kernels, code, nested
        ctx.mark_non_differentiable(decoded.losses)
        total = decoded.losses @ decoded.losses.new_tensor(nested.weights)
        return total, decoded.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        *four, x, losses, residual, inner, token_weights = ctx.saved_tensors
        decoded = Decoded(losses, residual, inner)
        gradients = ctx.kernels.backward(
            Weights(*four), ctx.code, x, decoded, ctx.nested, token_weights
        )
        return (*(outer[0] * gradient for gradient in gradients), None, None, None, None, None)
