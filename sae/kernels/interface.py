"""What a set of training kernels computes, and the shapes it computes on.

Legend: B tokens, D width of the activations, F latents, G nested groups, n active entries.

For activations ``x`` [B, D], token weights ``t`` and a dictionary of nested prefixes
``m_1 < … < m_G = F`` (Bussmann et al., arXiv 2503.17547), with ``h(j)`` the group of latent ``j``:

    pre  = relu((x − b_dec) @ W_encᵀ + b_enc)
    z    = the entries of pre that the selection keeps
    r_g  = b_dec + z[:, :m_g] @ W_dec[:m_g] − x
    L    = Σ_g w_g · ℓ_g,   ℓ_g = Σ_b t_b ‖r_gb‖² / (B·D)

Its gradients need only the suffix sums ``S_h = ∂L/∂(decoder output of group h)``:

    S_hb          = 2 t_b / (B·D) · Σ_{g ≥ h} w_g r_gb
    ∂L/∂z_bj      = S_{h(j), b} · W_dec[j]
    ∂L/∂W_dec[j]  = Σ_b z_bj S_{h(j), b}
    ∂L/∂W_enc[j]  = Σ_b ∂L/∂z_bj · (x_b − b_dec)      over the entries kept
    ∂L/∂b_enc[j]  = Σ_b ∂L/∂z_bj
    ∂L/∂b_dec     = Σ_b S_{1, b} − W_encᵀ @ ∂L/∂b_enc

The selection itself gets no gradient. Latents come first in both matrices, so that what belongs
to one latent is one contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hooks.files import ConfigError


class Weights(NamedTuple):
    """The parameters of a dictionary, or their gradients."""

    W_enc: Float[Tensor, "F D"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, " D"]

    def zeros(self) -> Weights:
        """Zeros of the same shapes, for gradients or moments."""
        return Weights(*(torch.zeros_like(tensor) for tensor in self))


@dataclass(frozen=True)
class BatchTopK:
    """Keep the ``round(batch · k)`` largest positive pre-activations of the whole batch.

    Entries equal to the smallest one kept all stay (arXiv 2412.06410).
    """

    k: float
    """Mean active latents per token."""
    floor: float = 0.0
    """A guess below the smallest entry kept, in units of the pre-activations.

    The result is exact for any value; it comes fastest when the guess is just below the answer.
    """

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ConfigError(f"k is {self.k}; it must be positive")
        if not self.floor >= 0:
            raise ConfigError(f"floor is {self.floor}; it must not be negative")

    def count(self, batch: int) -> int:
        """Entries to keep in a batch of this many tokens; at least 1."""
        return max(1, round(batch * self.k))


@dataclass(frozen=True)
class TopK:
    """Keep each token's ``k`` largest positive pre-activations; ties with the smallest all stay."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; it must be at least 1")


Selection = BatchTopK | TopK


class Code(NamedTuple):
    """Active latents of a batch, sorted by token, then by latent (compressed sparse rows)."""

    row_ptr: Int64[Tensor, " B+1"]
    """Where each token's entries begin; the last is n."""
    col: Int64[Tensor, " n"]
    """Latent of each entry, ascending within a token."""
    val: Float[Tensor, " n"]
    """Its activation, positive."""
    shape: tuple[int, int]
    """Tokens and latents, (B, F)."""
    least: float
    """The smallest activation kept; 0 if none is."""

    def row(self) -> Int64[Tensor, " n"]:
        """Token of each entry."""
        tokens = torch.arange(self.shape[0], device=self.col.device)
        return tokens.repeat_interleave(self.row_ptr.diff(), output_size=self.col.numel())

    def dense(self) -> Float[Tensor, "B F"]:
        """The same code with its zeros written out.

        >>> code = Code(torch.tensor([0, 1, 1]), torch.tensor([2]), torch.ones(1), (2, 3), 1.0)
        >>> code.dense().tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
        """
        z = self.val.new_zeros(self.shape)
        z[self.row(), self.col] = self.val
        return z

    def firings(self) -> Int64[Tensor, " F"]:
        """How many tokens of the batch each latent is active on."""
        return torch.bincount(self.col, minlength=self.shape[1])


@dataclass(frozen=True)
class Nested:
    """The nested prefixes of a dictionary and the weight of each one's reconstruction loss."""

    prefixes: tuple[int, ...]
    """Where each prefix ends, ``m_1 … m_G = F``."""
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.prefixes or len(self.prefixes) != len(self.weights):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.prefixes)} prefixes; "
                "give at least one prefix, and one weight for each"
            )
        if any(high <= low for low, high in zip((0, *self.prefixes), self.prefixes, strict=False)):
            raise ConfigError(f"prefixes {self.prefixes} must be positive and strictly ascending")

    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 latent of each group.

        >>> Nested((2, 5), (0.5, 0.5)).spans()
        [(0, 2), (2, 5)]
        """
        return list(zip((0, *self.prefixes[:-1]), self.prefixes, strict=True))


class Decoded(NamedTuple):
    """Reconstruction errors of a batch."""

    losses: Float[Tensor, " G"]
    """``ℓ_g`` of each prefix: squared error per token and dimension, weighted by token."""
    residual: Float[Tensor, "B D"]
    """Of the whole dictionary, reconstruction − x."""
    inner: Float[Tensor, "G-1 B D"] | None = None
    """Of the prefixes before it, if the implementation keeps them; they spare the walk back."""


class Kernels(Protocol):
    """One implementation of a training step's mathematics (see the module's docstring).

    Equal inputs give bitwise equal outputs, for a fixed number of threads. Nothing here records
    autograd history; :mod:`sae.kernels.autograd` wraps an implementation for that.
    """

    name: str
    """Recorded with a run: ``reference``, ``cpu`` or ``triton``."""

    def encode(self, weights: Weights, x: Float[Tensor, "B D"], selection: Selection) -> Code:
        """The entries of the pre-activations that ``selection`` keeps."""
        ...

    def decode(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Decoded:
        """Reconstruct from every prefix, and compare with ``x``."""
        ...

    def suffixes(
        self,
        weights: Weights,
        code: Code,
        decoded: Decoded,
        nested: Nested,
        token_weights: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "G B D"]:
        """``S``, by walking back from the last residual through the groups."""
        ...

    def gradients(
        self,
        weights: Weights,
        code: Code,
        x: Float[Tensor, "B D"],
        S: Float[Tensor, "G B D"],
        nested: Nested,
        out: Weights | None = None,
    ) -> Weights:
        """Gradients of ``L`` from its suffix sums; written over ``out`` if that is given."""
        ...

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
        """:meth:`suffixes` and :meth:`gradients` in one; an implementation may fuse them."""
        S = self.suffixes(weights, code, decoded, nested, token_weights)
        return self.gradients(weights, code, x, S, nested, out)

    def contributions(self, weights: Weights, code: Code, nested: Nested) -> Float[Tensor, "G B D"]:
        """Each group's own decoder sum, without bias: what ranks that share a dictionary add up."""
        ...

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
        """How much of ``residual``'s variance the ``k`` strongest candidates leave unexplained.

        The auxiliary loss of arXiv 2406.04093, appendix A.2, on the latents ``candidates``
        (distinct indices). ``residual`` is x − reconstruction and gets no gradient. If ``out`` is
        given, ``scale`` times the gradients is added to it. The loss returned is not scaled; it
        is 0 when there are no candidates or the residual is constant.
        """
        ...
