import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks.grounding import (
    Box,
    GroundedPhrase,
    GroundingError,
    crop_box,
    parse_grounded,
    uncrop_box,
    write_grounded,
)


def test_phrases_with_and_without_boxes():
    text = (
        "<obj>Left effusion.<box><x10><y20><x30><y40></box><box><x0><y0><x99><y99></box></obj>"
        " <obj>Clear.</obj>"
    )
    assert parse_grounded(text) == [
        GroundedPhrase(
            "Left effusion.", [Box(0.105, 0.205, 0.305, 0.405), Box(0.005, 0.005, 0.995, 0.995)]
        ),
        GroundedPhrase("Clear.", None),
    ]


def test_plain_text_is_returned_as_it_is():
    assert parse_grounded(" The lungs are clear. ") == "The lungs are clear."


@pytest.mark.parametrize(
    "text",
    [
        "<obj>never closed",
        "Heart. <obj>A.</obj>",
        "<obj>A.<box><x1><y1><x2></box></obj>",
        "<obj>A.<box><x5><y1><x2><y2></box></obj>",
        "<obj>A.<box><x1><y1><x2><y2></box> tail</obj>",
        "<x3>",
        "</obj>",
    ],
)
def test_malformed_text_is_a_typed_error(text):
    with pytest.raises(GroundingError):
        parse_grounded(text)


def test_bin_out_of_range():
    with pytest.raises(GroundingError, match="outside 0–19"):
        parse_grounded("<obj>A.<box><x1><y1><x20><y2></box></obj>", bins=20)


corner = st.integers(0, 99)
boxes = st.builds(
    lambda x, y, u, v: Box(
        *((b + 0.5) / 100 for b in (min(x, u), min(y, v), max(x, u), max(y, v)))
    ),
    corner,
    corner,
    corner,
    corner,
)
words = st.text(st.characters(whitelist_categories=("L", "N")), min_size=1).map(str.strip)
phrases = st.builds(
    GroundedPhrase, words.filter(bool), st.none() | st.lists(boxes, min_size=1, max_size=3)
)


@given(st.lists(phrases, min_size=1, max_size=4))
def test_write_then_parse_is_the_identity(value):
    assert parse_grounded(write_grounded(value)) == value


@given(st.integers(1, 4000), st.integers(1, 4000), boxes)
def test_uncropped_box_lies_in_the_centre_square(width, height, box):
    got = uncrop_box(box, width, height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    assert got.x_min * width == pytest.approx(box.x_min * side + left)
    assert got.y_max * height == pytest.approx(box.y_max * side + top)
    assert 0 <= got.x_min <= got.x_max <= 1 and 0 <= got.y_min <= got.y_max <= 1


@given(
    st.tuples(*[st.floats(0, 1)] * 4).map(lambda c: Box(*c)),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_a_box_on_the_crop_comes_back_from_the_film(box, width, height):
    (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
    box = Box(left, top, right, bottom)
    if box.x_max - box.x_min < 1e-3 or box.y_max - box.y_min < 1e-3:
        return
    back = crop_box(uncrop_box(box, width, height), width, height)
    assert back is not None
    assert max(abs(a - b) for a, b in zip(back, box, strict=True)) < 1e-9


def test_what_lies_outside_the_crop_is_cut_or_gone():
    assert crop_box(Box(0.0, 0.0, 0.5, 1.0), 200, 100) == Box(0.0, 0.0, 0.5, 1.0)
    assert crop_box(Box(0.0, 0.0, 0.25, 1.0), 200, 100) is None
    assert crop_box(Box(0.2, 0.8, 0.4, 1.0), 100, 200) is None
