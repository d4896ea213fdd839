"""Coordinates, windows and shapes of the sheet that views draw on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phantom import Factors, draw, sample_acquisition, sample_anatomy
from phantom.canvas import Canvas, Patch, cut, inside, texture, union

SEEDS = st.integers(0, 2**40)
PLACES = st.tuples(st.floats(-0.4, 0.4), st.floats(0.05, 0.95))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_coordinates_are_turned_shifted_and_magnified_rigidly(seed):
    take = sample_acquisition(seed)
    canvas = Canvas(take, 112)
    turn, step = np.radians(take.rotation), 1 / 112 / take.zoom
    cos, sin = np.cos(turn) * step, np.sin(turn) * step
    assert np.allclose(np.diff(canvas.u, axis=1), cos, atol=1e-6)
    assert np.allclose(np.diff(canvas.u, axis=0), sin, atol=1e-6)
    assert np.allclose(np.diff(canvas.v, axis=1), -sin, atol=1e-6)
    assert np.allclose(np.diff(canvas.v, axis=0), cos, atol=1e-6)
    centred = Canvas(replace(take, shift_right=0.0, shift_down=0.0), 112)
    middle = slice(55, 57), slice(55, 57)
    assert centred.u[middle].mean() == pytest.approx(0, abs=1e-6)
    assert centred.v[middle].mean() == pytest.approx(0.5, abs=1e-6)


def test_positive_rotation_turns_the_patient_clockwise():
    take = replace(sample_acquisition(0), shift_right=0.0, shift_down=0.0)
    for angle, sign in ((4.0, 1), (-4.0, -1)):
        turned = draw(Factors(), sample_anatomy(0), replace(take, rotation=angle))
        rows, cols = np.nonzero(turned.regions["spine"])
        slope = np.polyfit(rows, cols, 1)[0]
        assert slope == pytest.approx(-sign * np.tan(np.radians(4)), abs=0.01)


@given(SEEDS, st.lists(PLACES, min_size=1, max_size=4), st.floats(0.01, 0.1))
@settings(max_examples=40, deadline=None)
def test_a_window_holds_every_pixel_within_its_margin(seed, points, margin):
    canvas = Canvas(sample_acquisition(seed), 112)
    outside = np.ones((112, 112), bool)
    outside[canvas.window(points, margin)] = False
    for u, v in points:
        far = np.hypot(canvas.u - u, canvas.v - v)
        assert not (outside & (far < margin)).any()


@given(SEEDS, st.floats(0.1, 0.5))
@settings(max_examples=20, deadline=None)
def test_rows_hold_every_pixel_between_two_heights(seed, top):
    canvas = Canvas(sample_acquisition(seed), 112)
    outside = np.ones((112, 112), bool)
    outside[canvas.rows(top, top + 0.3)] = False
    assert not (outside & (canvas.v > top) & (canvas.v < top + 0.3)).any()


@given(SEEDS, PLACES, PLACES, st.floats(0.006, 0.05))
@settings(max_examples=30, deadline=None)
def test_shapes_agree_with_their_distance(seed, one, two, radius):
    canvas = Canvas(sample_acquisition(seed), 112)
    start = np.hypot(canvas.u - one[0], canvas.v - one[1])
    disc = canvas.disc(one, radius).spread(112)
    assert np.abs(disc - np.clip(0.5 + (radius - start) / canvas.fine, 0, 1)).max() < 1e-3

    along = np.array(two) - one
    length = max(along @ along, 1e-9)
    share = ((canvas.u - one[0]) * along[0] + (canvas.v - one[1]) * along[1]) / length
    share = np.clip(share, 0, 1)
    near = np.hypot(canvas.u - one[0] - share * along[0], canvas.v - one[1] - share * along[1])
    tube = canvas.tube([one, two], radius).spread(112)
    assert np.abs(tube - np.clip(0.5 + (radius - near) / canvas.fine, 0, 1)).max() < 1e-3


def test_union_covers_both_shapes():
    first = Patch((slice(2, 5), slice(1, 4)), np.full((3, 3), 0.5, np.float32))
    second = Patch((slice(4, 9), slice(3, 5)), np.full((5, 2), 1.0, np.float32))
    both = union(first, second).spread(12)
    assert np.array_equal(both, np.maximum(first.spread(12), second.spread(12)))


def test_inside_is_one_half_on_the_edge():
    edge = np.array([-1, -0.05, 0, 0.025, 0.05, 1], np.float32)
    assert inside(edge, 0.1) == pytest.approx([0, 0, 0.5, 0.75, 1, 1])


def test_a_cut_path_ends_at_the_height():
    path = [(0.0, 0.0), (0.1, 0.5), (0.3, 0.9)]
    assert cut(path, 0.7) == [(0.0, 0.0), (0.1, 0.5), pytest.approx((0.2, 0.7))]
    assert cut(path, 2.0) == path


def test_texture_is_exact_bounded_and_of_its_seed():
    one = texture(3, 112)
    # multiples of 2^-19 below 1 are exact in float32, in whatever order they were added
    assert np.array_equal(one * 2**19, np.rint(one * 2**19))
    assert np.abs(one).max() <= 1 and one.std() > 0.2
    assert not np.array_equal(one, texture(4, 112))
    with pytest.raises(ValueError, match="read-only"):
        one[0, 0] = 1
