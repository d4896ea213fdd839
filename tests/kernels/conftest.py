"""Small random dictionaries for the tests of kernels."""

import pytest
import torch

from sae.kernels import Nested, Weights


def dictionary(d, prefixes, dtype=torch.float64, seed=0, bias=0.1):
    """Random weights of ``prefixes[-1]`` latents; decoder rows have unit length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    latents = prefixes[-1]
    W_dec = normal(latents, d)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return Weights(
        W_enc=(W_dec + 0.3 * normal(latents, d) / d**0.5).contiguous(),
        b_enc=bias * normal(latents),
        W_dec=W_dec,
        b_dec=bias * normal(d),
    )


def tokens(batch, d, dtype=torch.float64, seed=1):
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def nested():
    return Nested((5, 17, 40), (0.2, 0.3, 0.7))
