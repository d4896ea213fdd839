"""Nearest directions against float64 arithmetic, found in full precision and by screening."""

import numpy as np
import pytest
import torch

from autointerp.neighbours import BLOCK, neighbours


def cosines(directions, alive):
    unit = directions.double()[alive]
    unit = unit / unit.norm(dim=1, keepdim=True)
    found = (unit @ unit.T).numpy()
    np.fill_diagonal(found, -2)
    return found


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_none_has_a_larger_cosine_than_those_found(screen, spread):
    """Scattered directions, and a bundle so narrow that bf16 cannot order it."""
    generator = torch.Generator().manual_seed(0)
    directions = 5 * torch.ones(BLOCK + 90, 24) / 24**0.5 * (spread < 1)
    directions = directions + spread * torch.randn(BLOCK + 90, 24, generator=generator)
    alive = np.flatnonzero(np.arange(len(directions)) % 7 != 3)
    found = neighbours(directions, alive, 4, screen)
    dead = np.setdiff1d(np.arange(len(directions)), alive)
    assert (found[dead] == -1).all() and np.isin(found[alive], alive).all()
    exact = cosines(directions, alive)
    place = np.searchsorted(alive, found[alive])
    assert (np.diff(np.sort(place, axis=1), axis=1) > 0).all()
    got = np.take_along_axis(exact, place, axis=1)
    best = -np.sort(-exact, axis=1)[:, :4]
    np.testing.assert_allclose(got, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("screen", [False, True])
def test_where_there_are_fewer(screen):
    directions = torch.eye(5)
    found = neighbours(directions, np.array([1, 4]), 3, screen)
    assert found[1].tolist() == [4, -1, -1] and found[4].tolist() == [1, -1, -1]
    assert (neighbours(directions, np.array([2]), 3, screen) == -1).all()
