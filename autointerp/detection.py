"""Detection: does a label tell excerpts on which the latent fires from those on which it is silent?

One excerpt a request, so that one unreadable reply costs one answer. Excerpts are of the set
``score``: patients that no explainer saw. Bills et al. 2023; Paulo et al., arXiv 2410.13928.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from autointerp.client import Client, Request
from autointerp.explainers import plain_text, strong_from
from autointerp.features import SILENT, Example, Features
from autointerp.prompts import DETECT
from autointerp.score import read_answer
from autointerp.scores import Verdict

MAX_TOKENS = 4
"""Of a yes or no."""


class Question(NamedTuple):
    """A label held against one excerpt."""

    label: str
    text: str
    patient: str
    truth: bool

    def request(self) -> Request:
        """What is asked."""
        asked = f"Concept: {self.label}\nExcerpt: {self.text}\nExpressed?"
        messages = [{"role": "system", "content": DETECT}, {"role": "user", "content": asked}]
        return Request(messages, MAX_TOKENS)


def questions(
    features: Features,
    latent: int,
    label: str,
    tokenizer: Any,
    modality: str = "report",
    side: str = "score",
    strong: bool = False,
) -> list[Question]:
    """A label against every text example of one set.

    With ``strong``, weak firings are left out, so that positives are excerpts on which the latent
    is strongly on (:func:`autointerp.explainers.strong_from`). Negatives are the same.
    """
    least = strong_from(features, latent, modality) if strong else 0.0
    examples: list[Example] = features.examples(latent, modality, set=side)
    return [
        Question(label, plain_text(one, tokenizer), one.patient, one.kind not in SILENT)
        for one in examples
        if one.kind in SILENT or one.peak >= least
    ]


def ask(client: Client, asked: Mapping[Any, Sequence[Question]]) -> dict[Any, list[Verdict]]:
    """Verdicts by key, all requests sent together; refusals and unreadable replies are ``None``."""
    flat = [question for some in asked.values() for question in some]
    replies = iter(client.ask_all([question.request() for question in flat], "detection"))
    return {
        key: [
            Verdict(question.patient, question.truth, read_answer(reply.text))
            for question, reply in zip(some, replies, strict=False)
        ]
        for key, some in asked.items()
    }
