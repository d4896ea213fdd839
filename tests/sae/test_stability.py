"""A dictionary shuffled is the same dictionary; one of noise is not."""

import pytest
import torch

from hooks.files import ConfigError
from sae import MatryoshkaSAE, SAEConfig, stability


def sae(seed, n_latents=48, d_model=16):
    return MatryoshkaSAE(SAEConfig(d_model, n_latents, 4, (n_latents,)), seed=seed)


@torch.no_grad()
def shuffled(original, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(original.config.n_latents, generator=generator)
    other = sae(99, original.config.n_latents, original.config.d_model)
    rows = original.W_dec[order]
    other.W_dec.copy_(rows + noise * torch.randn(rows.shape, generator=generator))
    return other, order


def test_a_shuffled_dictionary_is_found_again():
    original = sae(0)
    other, order = shuffled(original)
    got = stability(original, other)
    assert torch.equal(order[got.partners], got.latents)
    assert got.mean_cosine.value == pytest.approx(1)
    assert got.shared[:4] == (1, 1, 1, 48)


def test_lengths_of_decoder_rows_do_not_matter():
    original = sae(0)
    other, _ = shuffled(original)
    with torch.no_grad():
        other.W_dec.mul_(torch.linspace(0.1, 9, 48)[:, None])
    assert stability(original, other).mean_cosine.value == pytest.approx(1)


def test_noise_lowers_the_cosine_by_a_known_amount():
    original = sae(0, n_latents=64, d_model=128)
    other, order = shuffled(original, noise=0.5 / 128**0.5)
    got = stability(original, other)
    assert torch.equal(order[got.partners], got.latents)
    # A unit vector and itself with noise of length 1/2 added: 1 / sqrt(1 + 1/4).
    assert got.mean_cosine.value == pytest.approx(0.894, abs=0.01)
    assert got.mean_cosine.low < got.mean_cosine.value < got.mean_cosine.high
    assert stability(original, sae(5, 64, 128)).shared.value == 0


def test_no_partner_twice_even_where_two_latents_are_one():
    original = sae(0)
    with torch.no_grad():
        original.W_dec[1:] = original.W_dec[0]
    other, _ = shuffled(sae(0))
    got = stability(original, other)
    assert sorted(got.partners.tolist()) == list(range(48))
    assert got.mean_cosine.value < 0.5


def test_dead_latents_are_left_out_on_both_sides():
    original = sae(0)
    other, order = shuffled(original)
    rates = torch.zeros(48)
    rates[[3, 5, 7, 11]] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    got = stability(original, other, rates, most=3)
    assert got.latents.tolist() == [5, 7, 11]
    assert got.mean_cosine.n == 3
    alive = order != 5
    without = stability(original, other, rates, alive)
    assert not bool((order[without.partners] == 5).any())
    assert without.mean_cosine.value < 1
    with pytest.raises(ConfigError, match="nothing to match"):
        stability(original, other, torch.zeros(48))
    with pytest.raises(ConfigError, match="share no space"):
        stability(original, sae(0, 48, 12))
