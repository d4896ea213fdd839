"""Edits of latents that keep what the dictionary does not explain.

``h' = h + decode(z') − decode(z) = h + Σ_f (z'_f − z_f) · W_dec[f]``, so the reconstruction error
of the SAE never enters the model, and an edit that changes no latent changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError, nearest
from sae.model import MatryoshkaSAE

Mode = Literal["add", "clamp"]


@dataclass(frozen=True)
class Edit:
    """One latent turned up or down."""

    latent: int
    strength: float
    """In units of ``reference``."""
    reference: float
    """The latent's own scale, for example its 99th percentile where it fires."""
    mode: Mode = "add"
    """``add``: z' = z + strength · reference. ``clamp``: z' = strength · reference."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(
                f"unknown edit mode {self.mode!r}{nearest(self.mode, get_args(Mode))}; choose from "
                f"{list(get_args(Mode))}"
            )
        if self.reference <= 0:
            raise ConfigError(
                f"latent {self.latent} has reference activation {self.reference}; it never fires, "
                "so a strength has no unit: choose another latent"
            )

    @property
    def target(self) -> float:
        """What is added or clamped to, in activation units."""
        return self.strength * self.reference


def check_edits(sae: MatryoshkaSAE, edits: Sequence[Edit]) -> None:
    """Every latent exists, and none is edited twice."""
    latents = [edit.latent for edit in edits]
    for latent in latents:
        if not 0 <= latent < sae.config.n_latents:
            raise ConfigError(
                f"latent {latent} does not exist; this SAE has latents 0–{sae.config.n_latents - 1}"
            )
    if len(set(latents)) < len(latents):
        raise ConfigError(f"a latent is edited twice in {latents}; give one edit each")


@torch.no_grad()
def apply_edits(
    sae: MatryoshkaSAE, edits: Sequence[Edit], h: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """Edited activations, in the dtype of ``h``; ``h`` itself when there are no edits."""
    if not edits:
        return h
    latents = [edit.latent for edit in edits]
    z = sae.encode_some(h.to(sae.W_dec.dtype), latents)
    target = z.new_tensor([edit.target for edit in edits])
    adds = torch.tensor([edit.mode == "add" for edit in edits], device=z.device)
    changed = torch.where(adds, z + target, target.expand_as(z)).clamp_min(0)
    return h + ((changed - z) @ sae.W_dec[latents]).to(h.dtype)
