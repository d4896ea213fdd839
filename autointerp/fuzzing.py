"""Fuzzing: are the tokens on which a latent fires those that its label is about?

Every firing excerpt is asked about twice: with the tokens marked on which the latent fires, and
with as many marked that it is silent on, in the same sentence or in one where it never fires. A
label that only says what kind of sentence it is cannot tell them apart. Paulo et al.,
arXiv 2410.13928; unlike there, both classes are equally large for each latent, and one excerpt is
asked about at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from autointerp.detection import Question
from autointerp.evidence import marked_text, token_texts
from autointerp.features import SILENT, Example, Features
from autointerp.statistics import FUNCTION_WORDS, words_of

LEAST = 0.3
"""Share of an excerpt's peak from which a token is marked."""
FIT = "\nDo the marked words express it?"
FUZZ = (
    "In excerpts of chest X-ray reports some words are marked with << and >>. You check whether "
    "the marked words, and not only the rest of the excerpt, express a concept. Answer with one "
    "word: yes or no."
)


class Marked(Question):
    """A label held against the marked words of one excerpt; true where the latent fires there."""

    SYSTEM = FUZZ
    END = FIT

    def expressed(self) -> bool:
        """Whether most of the marked words are the label's."""
        marked = set(words_of(" ".join(re.findall("<<(.*?)>>", self.text)))) - FUNCTION_WORDS
        return 2 * len(marked & set(words_of(self.label))) > len(marked)


def questions(
    features: Features,
    latent: int,
    label: str,
    tokenizer: Any,
    modality: str = "report",
    side: str = "score",
    threshold: float = 0.0,
    seed: int = 0,
) -> list[Marked]:
    """Two questions for each firing excerpt of one set, marks right and wrong.

    Wrong marks are runs of the same lengths on tokens with letters on which the latent is silent:
    by turns in the same sentence and in a silent one, and where there is no room, in the other.
    An excerpt with room in neither is left out, and so is one on which the latent does not exceed
    ``threshold``: there are no marks there of which a label could be right.
    The same seed marks the same tokens whatever the label, so that labels can be compared.
    """
    examples = features.examples(latent, modality, set=side)
    silent = [one for one in examples if one.kind in SILENT]
    firing = [one for one in examples if one.peak > threshold]
    rng = np.random.default_rng([seed, latent])
    asked = []
    for i, one in enumerate(firing):
        lengths = _runs([value >= LEAST * one.peak for value in one.values])
        others = [silent[int(rng.integers(len(silent)))]] if silent else []
        for host in (one, *others) if i % 2 == 0 else (*others, one):
            wrong = _elsewhere(host, lengths, tokenizer, rng)
            if wrong is not None:
                right = marked_text(one, tokenizer, LEAST)
                asked.append(Marked(label, right, one.patient, True))
                asked.append(Marked(label, marked_text(wrong, tokenizer), host.patient, False))
                break
    return asked


def _runs(marks: Sequence[bool]) -> list[int]:
    """Lengths of the runs of marks.

    >>> _runs([True, True, False, True])
    [2, 1]
    """
    lengths, before = [], False
    for mark in marks:
        if mark and before:
            lengths[-1] += 1
        elif mark:
            lengths.append(1)
        before = mark
    return lengths


def _elsewhere(
    host: Example, lengths: Sequence[int], tokenizer: Any, rng: np.random.Generator
) -> Example | None:
    """The excerpt with runs marked where the latent is silent; ``None`` where they do not fit."""
    texts = token_texts(host, tokenizer)
    pairs = zip(host.values, texts, strict=True)
    free = np.array([value <= 0 and any(c.isalpha() for c in text) for value, text in pairs])
    marks = np.zeros(len(free))
    for length in sorted(lengths, reverse=True):
        starts = [s for s in range(len(free) - length + 1) if free[s : s + length].all()]
        if not starts:
            return None
        start = starts[int(rng.integers(len(starts)))]
        marks[start : start + length] = 1.0
        # Runs do not touch, or there would be fewer of them than where the latent fires.
        free[max(0, start - 1) : start + length + 1] = False
    return host._replace(values=marks.tolist(), peak=1.0)
