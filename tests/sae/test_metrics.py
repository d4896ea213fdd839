"""Known answers: a metric that is wrong by a mean or a square shows here."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.latent_scores import auroc
from sae.maxima import StudyMaxima, best_latent
from sae.metrics import QualityMeter


def quality(x, reconstruction, z, pieces=1):
    meter = QualityMeter(x.shape[1], z.shape[1])
    for a, b, c in zip(x.chunk(pieces), reconstruction.chunk(pieces), z.chunk(pieces), strict=True):
        meter.update(a, b, c)
    return meter.compute()


def test_fvu_known_answers():
    x = torch.tensor([[1.0, 0], [3, 0], [1, 4], [3, 4]])
    z = torch.zeros(4, 1)
    assert quality(x, x, z).fvu == 0
    assert quality(x, x.mean(0).expand(4, 2), z).fvu == pytest.approx(1)
    assert quality(x, torch.zeros(4, 2), z).fvu == pytest.approx(52 / 20)
    half = x.mean(0) + (x - x.mean(0)) / 2
    assert quality(x, half, z).fvu == pytest.approx(0.25)


def test_fvu_does_not_depend_on_the_mean_or_on_batching():
    """A second moment in place of a variance reads 0.0 here, or an explained variance above 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 8, generator=generator) + 100
    noisy = x + 0.3 * torch.randn(4096, 8, generator=generator)
    z = torch.zeros(4096, 1)
    assert quality(x, noisy, z).fvu == pytest.approx(0.09, rel=0.05)
    assert quality(x, noisy, z, pieces=8).fvu == pytest.approx(quality(x, noisy, z).fvu, rel=1e-9)


def test_constant_tokens_have_no_fvu():
    x = torch.ones(3, 2)
    assert quality(x, x * 0, torch.zeros(3, 1)).fvu == float("inf")


def test_l0_dead_and_firing_rates():
    z = torch.tensor([[0.0, 2, 1, 0], [0, 0, 5, 0]])
    x = torch.tensor([[0.0], [1]])
    got = quality(x, x, z)
    assert got.l0 == 1.5
    assert got.dead_fraction == 0.5
    assert got.firing_rates.tolist() == [0, 0.5, 1, 0]
    assert set(got.summary()) == {"n_tokens", "fvu", "l0", "dead_fraction"}


def pairwise(scores, labels):
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels] for n in scores[~labels]
    ]
    return float(np.mean(wins))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_order(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    got = float(auroc(scores[:, None], labels)[0])
    if labels.all() or not labels.any():
        assert np.isnan(got)
    else:
        assert got == pytest.approx(pairwise(scores.numpy(), labels.numpy()))


def test_best_latent_is_chosen_without_the_held_out_studies():
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    heldout = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    good_on_train = torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 1])
    good_on_test = torch.tensor([0.0, 1, 0, 1, 1, 1, 0, 0])
    maxima = StudyMaxima(list("abcdefgh"), torch.stack([good_on_test, good_on_train], dim=1))
    probe = best_latent(maxima, labels, heldout)
    assert probe.latent == 1
    assert probe.auroc_chosen_on == 1
    assert probe.auroc == pytest.approx(0.5)
    assert probe.n_positive == 2
