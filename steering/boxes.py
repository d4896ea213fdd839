"""How boxes of grounded reports move under an edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hooks.grounding import Box, GroundedPhrase, parse_grounded
from steering.sentences import Judge, by_rule


class BoxShift(NamedTuple):
    """One box of the plain report with its match in the steered one."""

    before: str
    after: str
    iou: float
    distance: float
    """Between centres, in units of the film's side."""


def iou(a: Box, b: Box) -> float:
    """Intersection over union.

    >>> round(iou(Box(0, 0, 1, 1), Box(0.5, 0, 1.5, 1)), 3)
    0.333
    """
    width = max(0.0, min(a.x_max, b.x_max) - max(a.x_min, b.x_min))
    height = max(0.0, min(a.y_max, b.y_max) - max(a.y_min, b.y_min))
    areas = [(box.x_max - box.x_min) * (box.y_max - box.y_min) for box in (a, b)]
    either = sum(areas) - width * height
    return width * height / either if either else float(a == b)


def box_shifts(before: str, after: str, bins: int = 100, judge: Judge = by_rule) -> list[BoxShift]:
    """Boxes of phrases that both grounded reports state, each matched to the one it overlaps most.

    Phrases without a partner and boxes without one are left out: they are not moved but lost.

    Raises
    ------
    GroundingError
        Where a text leaves the grammar.
    """
    one, two = _phrases(before, bins), _phrases(after, bins)
    out, free = [], list(two)
    for phrase in one:
        partner = next((p for p in free if p.text == phrase.text), None) or next(
            (p for p in free if judge(phrase.text, p.text) == "same"), None
        )
        if partner is None:
            continue
        free.remove(partner)
        pairs = sorted(
            (
                (iou(a, b), i, j)
                for i, a in enumerate(phrase.boxes or ())
                for j, b in enumerate(partner.boxes or ())
            ),
            reverse=True,
        )
        used: tuple[set[int], set[int]] = (set(), set())
        for overlap, i, j in pairs:
            if i in used[0] or j in used[1]:
                continue
            used[0].add(i)
            used[1].add(j)
            a, b = (phrase.boxes or [])[i], (partner.boxes or [])[j]
            apart = math.dist(_centre(a), _centre(b))
            out.append(BoxShift(phrase.text, partner.text, overlap, apart))
    return out


def _phrases(text: str, bins: int) -> Sequence[GroundedPhrase]:
    found = parse_grounded(text, bins)
    return [] if isinstance(found, str) else found


def _centre(box: Box) -> tuple[float, float]:
    return (box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2
