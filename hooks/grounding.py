"""MAIRA-2's grounded reports: phrases with boxes, and boxes on the original film.

Grammar: ``<obj>phrase<box><x12><y40><x50><y77></box>…</obj>``; a coordinate token stands for the
centre of one of ``bins`` equal intervals, (bin + 0.5) / bins.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hooks.files import MairaSaeError

BINS = 100
TOKENS = (
    *("<obj>", "</obj>", "<box>", "</box>"),
    *(f"<x{i}>" for i in range(BINS)),
    *(f"<y{i}>" for i in range(BINS)),
)
"""Every grounding token of the released vocabulary."""

TOKEN_PATTERN = re.compile(r"</?(?:obj|box)>|<[xy]\d+>")
_PHRASE = re.compile(r"\s*<obj>(?P<text>[^<]*)(?P<boxes>(?:\s*<box>[^/]*</box>)*)\s*</obj>\s*")
_BOX = re.compile(r"\s*<box>\s*<x(\d+)>\s*<y(\d+)>\s*<x(\d+)>\s*<y(\d+)>\s*</box>")


class GroundingError(MairaSaeError, ValueError):
    """Generated text breaks the grounding grammar."""


class Box(NamedTuple):
    """Corners as fractions of width and height, origin top left."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class GroundedPhrase(NamedTuple):
    """One finding; ``boxes`` is ``None`` where none was written."""

    text: str
    boxes: list[Box] | None


def parse_grounded(text: str, bins: int = BINS) -> str | list[GroundedPhrase]:
    """Phrases with their boxes, or the text itself when it holds no grounding token.

    Raises
    ------
    GroundingError
        Where the text leaves the grammar; the error quotes the place.

    Examples
    --------
    >>> parse_grounded("<obj>Clear lungs.</obj>")
    [GroundedPhrase(text='Clear lungs.', boxes=None)]
    >>> parse_grounded("No effusion.")
    'No effusion.'
    """
    text = text.strip()
    if not TOKEN_PATTERN.search(text):
        return text
    phrases, cursor = [], 0
    while cursor < len(text):
        match = _PHRASE.match(text, cursor)
        if match is None:
            raise GroundingError(
                f"expected '<obj>phrase[<box>…</box>]</obj>' at character {cursor}, found "
                f"{text[cursor : cursor + 40]!r}; generate more tokens, or read it as plain text"
            )
        boxes = _parse_boxes(match["boxes"], bins)
        phrases.append(GroundedPhrase(match["text"].strip(), boxes or None))
        cursor = match.end()
    return phrases


def _parse_boxes(text: str, bins: int) -> list[Box]:
    boxes, cursor = [], 0
    while cursor < len(text):
        match = _BOX.match(text, cursor)
        if match is None:
            raise GroundingError(
                f"expected '<box><x…><y…><x…><y…></box>', found {text[cursor : cursor + 40]!r}"
            )
        corners = [int(corner) for corner in match.groups()]
        if max(corners) >= bins:
            raise GroundingError(f"box bin {max(corners)} is outside 0–{bins - 1} in {match[0]!r}")
        box = Box(*((corner + 0.5) / bins for corner in corners))
        if box.x_min > box.x_max or box.y_min > box.y_max:
            raise GroundingError(f"box corners are in the wrong order in {match[0]!r}")
        boxes.append(box)
        cursor = match.end()
    return boxes


def write_grounded(phrases: list[GroundedPhrase], bins: int = BINS) -> str:
    """The grounded text of ``phrases``; :func:`parse_grounded` reads it back.

    >>> write_grounded([GroundedPhrase("Effusion.", [Box(0.1, 0.2, 0.35, 0.4)])])
    '<obj>Effusion.<box><x10><y20><x35><y40></box></obj>'
    """

    def token(axis: str, value: float) -> str:
        return f"<{axis}{min(int(value * bins + 1e-9), bins - 1)}>"

    pieces = []
    for text, boxes in phrases:
        written = "".join(
            f"<box>{token('x', b[0])}{token('y', b[1])}{token('x', b[2])}{token('y', b[3])}</box>"
            for b in boxes or ()
        )
        pieces.append(f"<obj>{text}{written}</obj>")
    return "".join(pieces)


def uncrop_box(box: Box | tuple[float, float, float, float], width: int, height: int) -> Box:
    """A box on the model's square crop, as fractions of the original film.

    The processor scales the shortest edge and crops the centre square, so along the longer edge
    the crop covers ``min(width, height)`` pixels in the middle. Not rounded to whole pixels.

    >>> uncrop_box((0.0, 0.0, 1.0, 1.0), width=200, height=100)
    Box(x_min=0.25, y_min=0.0, x_max=0.75, y_max=1.0)
    """
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    x_min, y_min, x_max, y_max = box
    return Box(
        (x_min * side + left) / width,
        (y_min * side + top) / height,
        (x_max * side + left) / width,
        (y_max * side + top) / height,
    )


def crop_box(box: Box, width: int, height: int) -> Box | None:
    """The inverse of :func:`uncrop_box`, cut at the crop's edge; ``None`` if it lies outside.

    >>> crop_box(Box(0.0, 0.5, 0.5, 1.0), width=200, height=100)
    Box(x_min=0.0, y_min=0.5, x_max=0.5, y_max=1.0)
    """
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2

    def cut(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    cropped = Box(
        cut((box.x_min * width - left) / side),
        cut((box.y_min * height - top) / side),
        cut((box.x_max * width - left) / side),
        cut((box.y_max * height - top) / side),
    )
    return cropped if cropped.x_min < cropped.x_max and cropped.y_min < cropped.y_max else None
