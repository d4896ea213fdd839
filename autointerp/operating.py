"""A latent's operating point: the activation above which its label holds.

A dictionary's latents fire weakly on much that they are not about, so "the latent is above zero"
and "the excerpt expresses the label" are different statements even for a latent that is perfect
above a threshold. A label is therefore stated with one. It is chosen like the label, on patients of
the set ``explain``: several labels are asked for, from excerpts above higher and lower shares of
the latent's maximum; each is held against every excerpt of those patients; and the label and
threshold are kept for which "above the threshold" and "expressed" agree best. Scores then use the
threshold on other patients, with weaker firings counted as off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from autointerp.detection import questions
from autointerp.features import Features
from autointerp.scoring import Answers

STRENGTHS = (0.5, 0.75)
"""Shares of a latent's maximum from which excerpts are shown as strongly on, one explanation each:
the lower for what it fires on in general, the higher for what it fires on most."""


class Point(NamedTuple):
    """Where a label holds, and how well."""

    threshold: float
    """The latent is on above it; 0 where any firing counts."""
    value: float
    """Balanced accuracy of the label there, with one right and one wrong answer added a side."""


class Offer(NamedTuple):
    """A label that a latent might have."""

    label: str
    strong: float
    """Share of the maximum from which excerpts were shown for it."""


def operating_point(
    peaks: Sequence[float], answers: Sequence[bool | None], most: float
) -> Point | None:
    """The threshold, at most ``most``, above which peaks and answers agree best.

    Agreement is the balanced accuracy of the answers. One right and one wrong answer are added to
    each side (Laplace's rule), so that a threshold that leaves a handful of excerpts above it is
    not taken for its luck. Thresholds are tried half-way between peaks; of equally good ones the
    lowest is taken. ``None`` where it cannot be told: no readable answer on an excerpt above a
    threshold, or none below.

    Parameters
    ----------
    peaks
        Largest activation of each excerpt; 0 where the latent is silent.
    answers
        Whether it expresses the label; ``None`` for what could not be read.

    >>> operating_point([9.0, 8.0, 2.0, 0.0], [True, True, False, False], most=6.0)
    Point(threshold=5.0, value=0.75)
    """
    read = [i for i, answer in enumerate(answers) if answer is not None]
    peak = np.array([peaks[i] for i in read], dtype=np.float64)
    said = np.array([bool(answers[i]) for i in read], dtype=bool)
    values = np.unique(peak[peak > 0])
    best = None
    for threshold in (0.0, *((values[1:] + values[:-1]) / 2).tolist()):
        on = peak > threshold
        if threshold > most or not on.any() or on.all():
            continue
        sides = said[on], ~said[~on]
        value = sum((int(side.sum()) + 1) / (len(side) + 2) for side in sides) / 2
        if best is None or value > best.value:
            best = Point(threshold, value)
    return best


def calibrate(
    features: Features,
    offered: Mapping[int, Sequence[Offer]],
    answers: Answers,
    tokenizer: Any,
    modality: str = "report",
) -> dict[int, tuple[str, Point]]:
    """Of each latent's labels the one that agrees best with it, and above which threshold.

    Patients of the set ``explain`` alone are asked about, all together. A threshold never exceeds
    the excerpts that its label was found from. Of equally good labels the first is taken; a latent
    none of whose labels could be tested is left out.
    """
    asked = {
        (latent, offer): questions(features, latent, offer.label, tokenizer, modality, "explain")
        for latent, offers in offered.items()
        for offer in offers
    }
    said = answers(asked)
    found: dict[int, tuple[str, Point]] = {}
    for latent, offers in offered.items():
        peaks = [one.peak for one in features.examples(latent, modality, set="explain")]
        for offer in offers:
            replies = [verdict.answer for verdict in said[latent, offer]]
            point = operating_point(peaks, replies, offer.strong * max(peaks, default=0.0))
            if point and (latent not in found or point.value > found[latent][1].value):
                found[latent] = offer.label, point
    return found
