"""Detection scoring: can the label tell sentences on which the latent fires from others?

Bills et al. 2023 and arXiv 2410.13928, with the defects of earlier tools left out: examples are
of patients the explainer did not see, the score is balanced (always answering "no" scores 0.5),
an answer that cannot be read is missing, not wrong, and every score stands beside the score that
another latent's label reaches on the same sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from autointerp.client import Client
from autointerp.collect import Example, LatentExamples
from autointerp.prompts import detect_messages

MAX_TOKENS = 4
"""Of a yes or no."""


class Detection(NamedTuple):
    """How a label did; accuracies are ``None`` when a class has no readable answer."""

    balanced_accuracy: float | None
    n: int
    """Readable answers."""
    coverage: float
    """Their share of all questions."""


def read_answer(text: str) -> bool | None:
    """Yes or no, or ``None`` for anything else.

    >>> read_answer("Yes."), read_answer("**No**, it does not"), read_answer("Perhaps")
    (True, False, None)
    """
    word = re.match(r"\W*(yes|no)\b", text.strip(), flags=re.IGNORECASE)
    return None if word is None else word[1].lower() == "yes"


def detect(label: str, examples: LatentExamples, client: Client, tokenizer: object) -> Detection:
    """Ask about every held-out sentence of ``examples``, one request each."""

    def answers(sentences: Sequence[Example]) -> list[bool | None]:
        return [
            read_answer(client.ask(detect_messages(label, sentence, tokenizer), MAX_TOKENS))
            for sentence in sentences
        ]

    return summarize(answers(examples.positives), answers(examples.negatives))


def summarize(
    on_positives: Sequence[bool | None], on_negatives: Sequence[bool | None]
) -> Detection:
    """Balanced accuracy over readable answers.

    >>> summarize([True, None], [False, True]).balanced_accuracy
    0.75
    """
    hits = [answer for answer in on_positives if answer is not None]
    alarms = [answer for answer in on_negatives if answer is not None]
    n = len(hits) + len(alarms)
    asked = len(on_positives) + len(on_negatives)
    accuracy = None
    if hits and alarms:
        accuracy = (sum(hits) / len(hits) + 1 - sum(alarms) / len(alarms)) / 2
    return Detection(accuracy, n, n / asked if asked else 0.0)
