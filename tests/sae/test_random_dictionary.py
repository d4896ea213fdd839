"""Random directions fire as often as the dictionary they stand beside, each as often as another."""

import torch

from sae import MatryoshkaSAE, SAEConfig, random_dictionary


def test_random_directions_with_the_same_l0():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) + 3
    sae = MatryoshkaSAE(SAEConfig(d_model=12, n_latents=64, k=6), seed=1)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.threshold.fill_(0.9)
    random = random_dictionary(sae, x, seed=5)
    assert random.config == sae.config
    assert torch.equal(random.b_dec, sae.b_dec)
    assert not torch.equal(random.W_dec, sae.W_dec)
    active = (sae.encode(x) > 0).sum()
    fired = (random.encode(x) > 0).sum(0)
    assert fired.unique().numel() == 1
    assert abs(int(fired.sum()) - int(active)) <= 32
    again = random_dictionary(sae, x, seed=5)
    assert torch.equal(again.W_enc, random.W_enc)
    assert torch.equal(again.b_enc, random.b_enc)


def test_directions_are_not_those_a_dictionary_of_the_seed_starts_from():
    sae = MatryoshkaSAE(SAEConfig(16, 64, 4), seed=3).eval()
    random = random_dictionary(sae, torch.randn(500, 16), seed=3)
    between = (random.W_dec * sae.W_dec).sum(dim=1).abs().mean()
    assert float(between.detach()) < 0.4
