"""What a method finds without learning, or without sparsity: the figures beside a dictionary's."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE


class PCA(NamedTuple):
    """Principal components: of all linear codes of a rank, the one of least FVU."""

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "r d"]
    """Orthonormal rows, largest variance first."""

    def encode(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch 2r"]:
        """Positive parts of the projections and of their negatives, so that large means present."""
        x = x.to(self.mean.dtype)
        along = (x - self.mean.to(x.device)) @ self.components.T.to(x.device)
        return torch.relu(torch.cat([along, -along], dim=1))

    def decode(self, z: Float[Tensor, "batch 2r"]) -> Float[Tensor, "batch d"]:
        """Back from :meth:`encode`: the projection onto the components."""
        positive, negative = z.chunk(2, dim=1)
        return (positive - negative) @ self.components.to(z.device) + self.mean.to(z.device)


def fit_pca(
    folder: ActivationFolder,
    site: str,
    mask: Bool[np.ndarray, " n"],
    rank: int,
    batch: int = 4096,
) -> PCA:
    """Components of the rows of ``mask``, from their covariance in float64.

    Raises
    ------
    ConfigError
        If ``rank`` is not in 1 … d, or there are fewer than two rows.
    """
    d = folder.width(site)
    if not 1 <= rank <= d or mask.sum() < 2:
        raise ConfigError(
            f"PCA of rank {rank} asked of {int(mask.sum())} rows of width {d}; ask for a rank of "
            "1 to the width, and give at least two rows"
        )
    # Moments about the folder's mean, not about 0: a large mean would swallow the covariance.
    centre = folder.moments(site).mean
    total, outer = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        chosen = torch.from_numpy(mask[start:stop])
        if chosen.any():
            x = folder.rows(site, start, stop)[chosen].double() - centre
            total += x.sum(0)
            outer += x.T @ x
    n = int(mask.sum())
    covariance = outer / n - torch.outer(total, total) / n**2
    vectors = torch.linalg.eigh(covariance).eigenvectors
    components = vectors.flip(1)[:, :rank].T.contiguous()
    return PCA((centre + total / n).float(), components.float())


FAR_SEED = 2**31
"""Added to seeds of random directions: a training run of the same seed starts from others. Torch's
CPU generator takes seeds modulo 2^32."""


@torch.no_grad()
def random_dictionary(
    sae: MatryoshkaSAE, x: Float[Tensor, "rows d"], seed: int = 0
) -> MatryoshkaSAE:
    """A dictionary of random directions: what a method finds without any learning.

    Shape, site and decoder bias are those of ``sae``. Every latent fires on the same share of
    ``x``, so that both have the same L0 there: with one threshold for all, the directions that
    happen to lie along the largest variance would fire almost everywhere and the rest never.
    """
    config = replace(sae.config, activation="threshold")
    random = MatryoshkaSAE(config, seed=seed + FAR_SEED, dtype=sae.W_dec.dtype).to(sae.W_dec.device)
    random.b_dec.copy_(sae.b_dec)
    active = round(float((sae.encode(x) > 0).sum()) / sae.config.n_latents)
    scores = (x - random.b_dec) @ random.W_enc
    random.b_enc.copy_(-scores.kthvalue(len(x) - active, dim=0).values)
    return random.eval()
