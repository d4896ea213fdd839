"""Activations of a few latents on every row of a folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE


@torch.no_grad()
def latent_activations(
    sae: MatryoshkaSAE, folder: ActivationFolder, latents: Sequence[int], batch: int = 8192
) -> Float[Tensor, "n_tokens n"]:
    """Activations of a few latents on every row of the folder.

    >>> from phantom.tour import activations, dictionary
    >>> rows = latent_activations(dictionary(), activations(), [3, 5])
    >>> len(rows) == activations().n_tokens, rows.shape[1]
    (True, 2)
    """
    for latent in latents:
        if not 0 <= latent < sae.config.n_latents:
            raise ConfigError(f"latent {latent} is outside 0–{sae.config.n_latents - 1}")
    folder.check_trained(sae.config.policy)
    site = folder.check_site(sae.config.site)
    pieces = [
        sae.encode_some(
            folder.rows(site, start, min(start + batch, folder.n_tokens)).to(sae.W_dec), latents
        ).cpu()
        for start in range(0, folder.n_tokens, batch)
    ]
    return torch.cat(pieces)
