"""Maps against masks, where the answer is known."""

import numpy as np
import pytest
import torch

from hooks.files import ConfigError
from sae.latent_scores import auroc
from sae.localisation import box_masks, clustered_mean, localise


def films(n=40, side=6, scale=4, seed=0):
    """A 2-by-2-patch square at a place of its own in each film, and half of the films held out."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((n, side, side))
    for grid in maps:
        row, column = rng.integers(side - 1, size=2)
        grid[row : row + 2, column : column + 2] = rng.uniform(1, 2)
    masks = np.repeat(np.repeat(maps > 0, scale, 1), scale, 2)
    patients = [f"p{i}" for i in range(n)]
    return maps, masks, patients, np.arange(n) % 2 == 0


def test_a_perfect_map_scores_one_and_another_films_map_does_not():
    found = localise(*films())
    for mean in (found.pixel_auroc, found.pointing, found.iou):
        assert mean == (1.0, 0.0)
    assert found.pixel_auroc_other_film.value < 0.65
    assert found.pointing_other_film.value < 0.5
    assert found.iou_other_film.value < 0.3
    assert (found.n, found.n_patients, found.n_left_out) == (20, 20, 0)


def test_a_map_that_shows_nothing_of_the_film_is_at_chance():
    maps, masks, patients, heldout = films()
    found = localise(np.ones_like(maps), masks, patients, heldout)
    assert found.pixel_auroc.value == 0.5
    assert found.pixel_auroc_permuted.value == found.pixel_auroc_other_film.value == 0.5
    meeting = masks.reshape(40, 6, 4, 6, 4).any((2, 4))[heldout].mean()
    assert found.pointing.value == pytest.approx(meeting)


def test_permuted_patches_know_nothing_whatever_the_map():
    maps, masks, patients, heldout = films(side=8)
    for shown in (maps, maps + np.random.default_rng(1).random(maps.shape)):
        found = localise(shown, masks, patients, heldout)
        assert found.pixel_auroc_permuted.value == pytest.approx(0.5, abs=0.03)
        # A map of 4 high patches in 64 points at the 4 patches of the mask once in 16 times.
        assert found.pointing_permuted.value == pytest.approx(1 / 16, abs=0.04)
        again = localise(shown, masks, patients, heldout)
        assert again.pixel_auroc_permuted == found.pixel_auroc_permuted
    other = localise(shown, masks, patients, heldout, seed=1)
    assert other.pixel_auroc_permuted != found.pixel_auroc_permuted


def test_the_area_of_shares_is_the_area_of_pixels():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, (12, 3, 5)).astype(float)  # of many ties
    masks = rng.random((12, 12, 10)) < rng.random((12, 1, 1)) * 0.8 + 0.1
    heldout = np.arange(12) < 6
    found = localise(maps, masks, [f"p{i}" for i in range(12)], heldout).pixel_auroc.value
    pixels = torch.from_numpy(maps.repeat(4, 1).repeat(2, 2).reshape(12, -1, 1))
    truth = torch.from_numpy(masks.reshape(12, -1))
    areas = [float(auroc(pixels[i], truth[i])[0]) for i in range(6)]
    assert found == pytest.approx(np.mean(areas), abs=1e-6)


def test_a_map_above_its_habit_shows_what_is_new_on_the_film():
    """A latent that also fires at one place on every film hides a thing that moves."""
    maps, masks, patients, heldout = films()
    habit = np.zeros(maps.shape[1:])
    habit[0] = 5.0
    found = localise(maps + habit, masks, patients, heldout)
    assert found.pixel_auroc.value < 0.95 and found.pixel_auroc_above.value > 0.99
    assert found.pixel_auroc_above_other_film.value < 0.65
    never_new = np.broadcast_to((maps[:1] > 0).astype(float), maps.shape)
    fixed = localise(never_new, masks, patients, heldout)
    assert fixed.pixel_auroc_above.value == 0.5  # nothing is left of a map that never changes


def test_what_is_always_at_one_place_is_known_to_all_baselines_but_the_permutation():
    maps, masks, patients, heldout = films()
    maps[:], masks[:] = maps[0], masks[0]
    found = localise(maps, masks, patients, heldout)
    assert found.pixel_auroc.value == found.pixel_auroc_other_film.value == 1.0
    assert found.pixel_auroc_permuted.value < 0.55
    assert found.pixel_auroc_prior.value == found.iou_prior.value == 1.0


def test_the_threshold_does_not_see_the_films_it_is_measured_on():
    maps, masks, patients, heldout = films()
    before = localise(maps, masks, patients, heldout)
    changed = masks.copy()
    changed[heldout] = masks[heldout][::-1]
    maps = maps + 0.5 * (maps == 0)  # a ground that the threshold must clear
    one = localise(maps, masks, patients, heldout)
    two = localise(maps, changed, patients, heldout)
    assert one.threshold == two.threshold > 0
    assert one.iou.value == before.iou.value == 1.0
    assert two.iou.value < 0.3


def test_films_with_nothing_to_find_are_left_out_not_scored_zero():
    maps, masks, patients, heldout = films()
    masks[0], masks[2] = False, True
    found = localise(maps, masks, patients, heldout)
    assert (found.n, found.n_left_out, found.pixel_auroc.value) == (18, 2, 1.0)


def test_copies_of_a_patients_film_do_not_make_the_error_smaller():
    values = np.random.default_rng(0).random(30)
    names = [f"p{i}" for i in range(30)]
    one = clustered_mean(values, names)
    assert one.standard_error == pytest.approx(values.std(ddof=1) / 30**0.5)
    copied = clustered_mean(np.tile(values, 5), names * 5)
    assert copied == pytest.approx(one)
    assert np.isnan(clustered_mean(values, ["p"] * 30).standard_error)


def test_a_single_patient_has_no_other_patients_film():
    maps, masks, patients, heldout = films()
    patients = ["one" if out else name for name, out in zip(patients, heldout, strict=True)]
    found = localise(maps, masks, patients, heldout)
    assert np.isnan(found.pixel_auroc_other_film.value) and found.pixel_auroc.value == 1.0
    assert np.isnan(found.pixel_auroc_same.value)
    assert np.isnan(found.pixel_auroc_above_other_film.value)
    assert found.pixel_auroc_permuted.value < 0.6


def test_boxes_become_masks():
    masks = box_masks([[(1, 0, 3, 1), (0, 2, 1, 4)], []], (4, 4))
    assert masks[0].sum() == 4 and masks[0, 0, 1:3].all() and masks[0, 2:, 0].all()
    assert not masks[1].any()


def test_any_film_is_an_easier_baseline_than_one_that_has_the_thing_too():
    maps, masks, patients, heldout = films()
    maps[:], masks[:] = maps[0], masks[0]
    maps[8:], masks[8:] = 0, False
    found = localise(maps, masks, patients, heldout)
    assert found.n == 4 and found.pixel_auroc_same.value == 1.0
    assert found.pixel_auroc_other_film.value < 0.9


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: (a[0][:, :5], *a[1:]), "do not fit"),
        (lambda a: (np.where(a[0] > 0, np.nan, 0), *a[1:]), "finite"),
        (lambda a: (a[0], a[1].astype(int), *a[2:]), "give bool"),
        (lambda a: (*a[:2], ["p"] * 40, a[3]), "both sides"),
        (lambda a: (a[0], np.zeros_like(a[1]), *a[2:]), "something to find"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        localise(*change(films()))
