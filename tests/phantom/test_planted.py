"""Planted rows are what their truth says, and absorption on them has known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooks.files import FolderError, verify
from phantom.absorption import hierarchy_absorption
from phantom.factors import PhantomError
from phantom.planted import (
    SITE,
    PlantedConfig,
    coefficients_of,
    directions_of,
    plant,
    read_planted,
)
from sae import TrainConfig, train

SMALL = PlantedConfig(
    d_model=12,
    n_parents=3,
    children=3,
    n_flat=4,
    parent_rate=0.25,
    child_rate=0.3,
    block=3,
    n_studies=40,
    rows_per_study=100,
    studies_per_part=15,
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant(SMALL, tmp_path_factory.mktemp("planted"))


def test_more_features_than_dimensions_and_none_alike():
    directions = directions_of(PlantedConfig())
    assert directions.shape == (84, 48)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    cosines = directions @ directions.T - np.eye(84)
    assert np.abs(cosines).max() < 0.25
    with pytest.raises(PhantomError, match="no superposition"):
        replace(SMALL, d_model=16)


def test_rows_are_the_features_that_are_on(planted):
    """Least squares on the directions that are on leaves the noise, and no more."""
    folder = planted.activations
    assert planted.on.shape == (folder.n_tokens, SMALL.n_features) == (4000, 16)
    for row in range(0, 4000, 500):
        x = folder.rows(SITE, row, row + 1)[0].double()
        basis = planted.directions[planted.on[row]].double()
        fit = torch.linalg.lstsq(basis.T, x).solution if len(basis) else basis.new_zeros(0)
        left = x - fit @ basis
        assert float(left.norm()) < 4 * SMALL.noise * SMALL.d_model**0.5
        assert bool((fit > 0).all())


def test_children_are_on_only_where_their_parent_is(planted):
    assert planted.children_of(1) == [6, 7, 8]
    for child in range(3, 12):
        parent = int(planted.parents[child])
        assert not bool((planted.on[:, child] & ~planted.on[:, parent]).any())
        share = planted.on[planted.on[:, parent], child].double().mean()
        assert float(share) == pytest.approx(SMALL.child_rate, abs=0.08)
    assert float(planted.on.sum(1).double().mean()) == pytest.approx(SMALL.expected_l0, rel=0.15)


def test_features_of_a_block_are_on_together():
    config = replace(SMALL, n_studies=100, studies_per_part=100, correlation=0.5, patient_share=0)
    on = coefficients_of(config, 0) > 0
    both = (on[:, 0] & on[:, 1]).mean()
    assert both > 1.5 * on[:, 0].mean() * on[:, 1].mean()
    apart = (on[:, 0] & on[:, 15]).mean()
    assert apart == pytest.approx(on[:, 0].mean() * on[:, 15].mean(), rel=0.2)


def test_the_seed_decides_and_parts_do_not_depend_on_order(planted, tmp_path):
    again = plant(SMALL, tmp_path / "again")
    x = planted.activations.rows(SITE, 0, 4000)
    assert torch.equal(again.activations.rows(SITE, 0, 4000), x)
    other = plant(replace(SMALL, seed=1), tmp_path / "other")
    assert not torch.equal(other.activations.rows(SITE, 0, 4000), x)
    with pytest.raises(FolderError, match="another harvest"):
        plant(replace(SMALL, seed=2), tmp_path / "other")
    read = read_planted(tmp_path / "again")
    assert read.config == SMALL
    assert torch.equal(read.on, planted.on)
    assert verify(tmp_path / "again" / "truth") == 1


def test_an_ordinary_activation_folder(planted, tmp_path):
    heldout = planted.activations.heldout(0.2)
    assert 0 < heldout.mean() < 0.5
    config = TrainConfig(SITE, expansion=2, k=3, steps=3, batch=64)
    sae = train(planted.activations, config, tmp_path / "sae")
    assert sae.config.d_model == 12


def activations(planted, absorbed):
    """An ideal dictionary, but for children that stand in for their parents where they are on."""
    z = planted.on.float()
    directions = planted.directions.clone()
    for child in absorbed:
        parent = int(planted.parents[child])
        z[planted.on[:, child], parent] = 0
        directions[child] += planted.directions[parent]
    return z, torch.nn.functional.normalize(directions, dim=1)


@pytest.mark.parametrize(
    ("absorbed", "expected"), [((), 0.0), (range(3, 12), 1.0), ((3, 6, 9), None)]
)
def test_absorption_known_answers(planted, absorbed, expected):
    heldout = torch.from_numpy(planted.activations.heldout(0.3))
    z, directions = activations(planted, absorbed)
    got = hierarchy_absorption(
        z, planted.on, planted.parents, heldout, directions=directions, probes=planted.directions
    )
    on = planted.on[heldout]
    assert got.n == int(on[:, 3:12].sum())
    assert {pair: one.child_latent for pair, one in got.pairs.items()} == {
        (int(planted.parents[child]), child): child for child in range(3, 12)
    }
    if expected is None:  # rows of the absorbing children; siblings beside them do not absorb
        expected = int(on[:, [3, 6, 9]].sum()) / got.n
        assert all(got.pairs[p, c].rate == (c in absorbed) for p, c in got.pairs)
    assert got.rate == pytest.approx(expected)
    assert got.silent >= got.rate


def test_a_silent_parent_is_not_absorbed_by_a_latent_that_does_not_carry_it(planted):
    heldout = torch.from_numpy(planted.activations.heldout(0.3))
    z, _ = activations(planted, range(3, 12))
    directions = planted.directions.clone()
    for child in range(3, 12):
        p = planted.directions[int(planted.parents[child])]
        directions[child] -= (directions[child] @ p) * p
    got = hierarchy_absorption(
        z, planted.on, planted.parents, heldout, directions=directions, probes=planted.directions
    )
    assert (got.rate, got.silent, got.silent_alone) == (0, 1, 0)


def test_without_a_hierarchy_nothing_is_absorbed(planted):
    heldout = torch.from_numpy(planted.activations.heldout(0.3))
    with pytest.raises(PhantomError, match="no factor has a parent"):
        hierarchy_absorption(planted.on.float(), planted.on, planted.parents * 0 - 1, heldout)
    broken = planted.on.clone()
    broken[:, 0] = False
    with pytest.raises(PhantomError, match="but not the factor"):
        hierarchy_absorption(planted.on.float(), broken, planted.parents, heldout)


def test_silence_without_children_is_counted_apart(planted):
    heldout = torch.from_numpy(planted.activations.heldout(0.3))
    z = planted.on.float()
    for parent in range(3):
        children = planted.on[:, planted.children_of(parent)].any(1)
        z[~children, parent] = 0
    got = hierarchy_absorption(z, planted.on, planted.parents, heldout)
    on = planted.on[heldout]
    alone = sum(
        int((on[:, parent] & ~on[:, planted.children_of(parent)].any(1)).sum())
        for parent in range(3)
    )
    assert (got.rate, got.silent, got.silent_alone, got.n_alone) == (0, 0, 1, alone)
