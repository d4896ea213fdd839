"""A labeller that answers from the evidence in its prompt alone, for :mod:`scripted_server`.

It counts words: those that set the firing excerpts of a prompt apart from its silent ones are the
label, and an excerpt expresses a label that has most of its words there. It knows no truth file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autointerp.explainers import FIRES, SILENT_HEAD
from autointerp.fuzzing import FIT
from autointerp.statistics import FUNCTION_WORDS, distinctive_words, words_express, words_of


def reply(body: Mapping[str, Any]) -> str:
    """The answer to a request of an explainer, of detection or of fuzzing."""
    text = body["messages"][-1]["content"]
    if f"\n{SILENT_HEAD}\n" in text:
        return explain(text)
    _, _, rest = text.partition("Concept: ")
    label, _, rest = rest.partition("\nExcerpt: ")
    if rest.endswith(FIT):
        marked = " ".join(re.findall("<<(.*?)>>", rest.removesuffix(FIT)))
        return "yes" if touches(label, marked) else "no"
    return "yes" if words_express(label, rest.partition("\nExpressed?")[0]) else "no"


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


def touches(label: str, marked: str) -> bool:
    """Whether most of the marked words are a label's.

    >>> touches("nodule in the left lung", "left lung"), touches("nodule", "lung is")
    (True, False)
    """
    words, found = set(words_of(label)) - FUNCTION_WORDS, set(words_of(marked)) - FUNCTION_WORDS
    return 2 * len(words & found) > len(found)


def _share(label: str, excerpts: Sequence[str]) -> float:
    return sum(words_express(label, one) for one in excerpts) / len(excerpts) if excerpts else 0.0


def _lines(group: str) -> list[str]:
    # words_of takes what stands in < > for a grounding token, so marks must go first.
    group = group.replace("<<", "").replace(">>", "")
    return [line[2:] for line in group.splitlines() if line.startswith("- ")]
