"""A labeller that answers from the evidence in its prompt alone, for :mod:`scripted_server`.

It counts words: those that set the firing excerpts of a prompt apart from its silent ones are the
label, and an excerpt expresses a label that has most of its words there. It knows no truth file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autointerp.explainers import FIRES, SILENT_HEAD
from autointerp.statistics import distinctive_words, words_of

OPPOSITE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "at", "in", "is", "its", "of", "on", "or", "the", "there", "to", "with"]
)


def reply(body: Mapping[str, Any]) -> str:
    """The answer to a request of :mod:`autointerp.explainers` or :mod:`autointerp.detection`."""
    text = body["messages"][-1]["content"]
    if f"\n{SILENT_HEAD}\n" in text:
        return explain(text)
    _, _, rest = text.partition("Concept: ")
    label, _, rest = rest.partition("\nExcerpt: ")
    return "yes" if expresses(label, rest.partition("\nExpressed?")[0]) else "no"


def explain(text: str) -> str:
    """An :class:`autointerp.explainers.Explanation` of the two groups in a prompt."""
    _, _, groups = text.partition(f"\n{FIRES}\n")
    on, _, off = groups.partition(f"\n{SILENT_HEAD}\n")
    fires, silent = _lines(on), _lines(off)
    words = distinctive_words(fires, silent)
    label = " ".join(words) or None
    confidence = 0.0
    if label:
        hits = _share(label, fires)
        confidence = (hits + 1 - _share(label, silent)) / 2
    return json.dumps({"label": label, "confidence": confidence, "evidence": ", ".join(words)})


def expresses(label: str, excerpt: str) -> bool:
    """Whether an excerpt has most of a label's words, and not the opposite of one instead.

    >>> expresses("nodule in the left lung", "left lung nodule .")
    True
    >>> expresses("left upper lung nodule", "right upper lung nodule .")
    False
    """
    words, found = set(words_of(label)) - FUNCTION_WORDS, set(words_of(excerpt))
    against = any(OPPOSITE.get(word) in found for word in words - found)
    return not against and 2 * len(words & found) > len(words)


def _share(label: str, excerpts: Sequence[str]) -> float:
    return sum(expresses(label, one) for one in excerpts) / len(excerpts) if excerpts else 0.0


def _lines(group: str) -> list[str]:
    # words_of takes what stands in < > for a grounding token, so marks must go first.
    group = group.replace("<<", "").replace(">>", "")
    return [line[2:] for line in group.splitlines() if line.startswith("- ")]
