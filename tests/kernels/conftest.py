"""Small random dictionaries for the tests of kernels."""

import pytest
import torch

from sae.kernels import Weights


@pytest.fixture(scope="session")
def dictionary():
    """Random weights of F latents; decoder rows have unit length."""

    def make(d, latents, dtype=torch.float64, seed=0, bias=0.1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        W_dec = normal(latents, d)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        W_enc = W_dec + 0.3 * normal(latents, d) / d**0.5
        return Weights(W_enc, bias * normal(latents), W_dec, bias * normal(d))

    return make


@pytest.fixture(scope="session")
def tokens():
    """Random activations."""

    def make(batch, d, dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, d, generator=generator, dtype=torch.float64).to(dtype)

    return make
