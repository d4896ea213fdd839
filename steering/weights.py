"""What each latent counts when two films are compared."""

from __future__ import annotations

import torch
from jaxtyping import Float

LEAST, MOST = 0.1, 1.5
LEAST_SHARE = 0.08
"""Share of the rows in which a latent fires, to count in a likeness."""


def film_weights(values: Float[torch.Tensor, "R F"]) -> Float[torch.Tensor, " F"]:
    """Skewness over the rows, between `LEAST` and `MOST`, over the largest activation.

    A latent that tells films apart is low on most and high on some, so its values are skewed to the
    right; anatomy, which every film has, spreads evenly about its mean. Latents that fire in a
    share of the rows below :data:`LEAST_SHARE` are left out, since two films that share a rare
    latent need not share a finding; no truth enters. Bounds and share were chosen on the phantom's
    training patients (see benchmarks/RESULTS.md, "Clinical functions").

    >>> film_weights(torch.tensor([[0.0, 3.0], [0.0, 4.0], [0.0, 3.0], [2.0, 2.0]]))
    tensor([0.5774, 0.0250])
    """
    kept = (values > 0).sum(0) >= LEAST_SHARE * len(values)
    largest = values.amax(0).clamp_min(1e-12)
    centred = values / largest - (values / largest).mean(0)
    spread = centred.square().mean(0).sqrt().clamp_min(1e-12)
    skewness = (centred / spread).pow(3).mean(0)
    return kept * skewness.clamp(LEAST, MOST) / largest
