"""What a method finds without learning, or without sparsity: the figures beside a dictionary's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.model import MatryoshkaSAE


@torch.no_grad()
def random_dictionary(
    sae: MatryoshkaSAE, x: Float[Tensor, "rows d"], seed: int = 0
) -> MatryoshkaSAE:
    """A dictionary of random directions: what a method finds without any learning.

    Shape, site and decoder bias are those of ``sae``. Every latent fires on the same share of
    ``x``, so that both have the same L0 there: with one threshold for all, the directions that
    happen to lie along the largest variance would fire almost everywhere and the rest never.
    """
    random = MatryoshkaSAE(sae.config, seed=seed, dtype=sae.W_dec.dtype).to(sae.W_dec.device)
    random.b_dec.copy_(sae.b_dec)
    active = round(float((sae.encode(x) > 0).sum()) / sae.config.n_latents)
    scores = (x - random.b_dec) @ random.W_enc
    random.b_enc.copy_(-scores.kthvalue(len(x) - active, dim=0).values)
    return random.eval()
