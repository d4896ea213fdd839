"""The linear probe on streams whose answer is known."""

import math

import pytest
import torch

from hooks.files import ConfigError
from hooks.studies import split_of
from sae.dense_probe import _logits, dense_probe


def world(n=600, d=8, noise=0.0, seed=0):
    """Rows of which coordinate 2 carries the factor; three rows a patient, split by patient."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw)
    truth = x[:, 2] + noise * torch.randn(n, generator=draw) > 0
    patients = [f"p{i // 3}" for i in range(n)]
    heldout = torch.tensor([split_of(p, 0.3) == "heldout" for p in patients])
    nearer = torch.tensor([split_of(p, 0.6) == "heldout" for p in patients])
    return x, truth, heldout, ~heldout & nearer, patients


def test_a_factor_that_one_coordinate_carries_is_read_on_other_patients():
    x, truth, heldout, inner, patients = world()
    sides = [
        {p for p, is_in in zip(patients, side, strict=True) if is_in}
        for side in (heldout, inner, ~heldout & ~inner)
    ]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    found = dense_probe(x, truth, heldout, inner)
    assert found.auroc > 0.99 and len(found.scores) == int(heldout.sum())
    shuffled = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(1))]
    assert abs(dense_probe(x, shuffled, heldout, inner).auroc - 0.5) < 0.1


def test_heldout_labels_are_not_seen():
    x, truth, heldout, inner, _ = world(noise=1.0)
    found = dense_probe(x, truth, heldout, inner)
    turned = dense_probe(x, torch.where(heldout, ~truth, truth), heldout, inner)
    assert torch.equal(found.scores, turned.scores) and found.ridge == turned.ridge
    assert turned.auroc == pytest.approx(1 - found.auroc, abs=1e-6)


def test_the_ridge_is_the_best_on_the_inner_rows_alone():
    x, truth, heldout, inner, _ = world(n=150, d=60, noise=1.0)
    fitting = ~heldout & ~inner
    tried = (1e-3, 1.0)
    gains = []
    for ridge in tried:
        scores = _logits(x[fitting], truth[fitting], x[inner], ridge)
        wins = scores[truth[inner]][:, None] > scores[~truth[inner]][None, :]
        gains.append(float(wins.double().mean()))
    assert gains[0] != gains[1]
    found = dense_probe(x, truth, heldout, inner, tried)
    assert found.ridge == tried[gains.index(max(gains))]


def test_the_optimum_is_that_of_newtons_method_in_float64():
    """One weight a coordinate and a free bias: ∇ = mean((σ(zw + b) − y) z) + ridge·w = 0."""
    x, truth, _, _, _ = world(n=120, d=5, noise=1.0)
    ridge = 0.1
    z = x.double()
    z = (z - z.mean(0)) / z.std(0, correction=0)
    design = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
    penalty = torch.diag(torch.tensor([ridge] * 5 + [0.0], dtype=torch.float64))
    w = torch.zeros(6, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(design @ w)
        slope = design.T @ (p - truth.double()) / len(z) + penalty @ w
        curve = (design * (p * (1 - p))[:, None]).T @ design / len(z) + penalty
        w = w - torch.linalg.solve(curve, slope)
    assert torch.linalg.norm(slope) < 1e-12
    found = _logits(x, truth, x, ridge)
    assert found.dtype == torch.float64
    assert torch.allclose(found, design @ w, atol=1e-4, rtol=0)


def test_a_constant_coordinate_and_scale_change_nothing():
    x, truth, heldout, inner, _ = world(noise=1.0)
    found = dense_probe(x, truth, heldout, inner)
    scaled = torch.cat([x * torch.logspace(-3, 3, 8) + 5, torch.full((len(x), 1), 7.0)], 1)
    other = dense_probe(scaled.double(), truth, heldout, inner)
    assert other.auroc == pytest.approx(found.auroc, abs=2e-3) and not math.isnan(other.auroc)


def test_overlap_and_one_class_are_refused():
    x, truth, heldout, inner, _ = world()
    with pytest.raises(ConfigError, match="inner and held out"):
        dense_probe(x, truth, heldout, heldout)
    with pytest.raises(ConfigError, match="inner rows carry the factor"):
        dense_probe(x, truth & ~inner, heldout, inner)
    with pytest.raises(ConfigError, match="held-out rows carry the factor"):
        dense_probe(x, truth | heldout, heldout, inner)
