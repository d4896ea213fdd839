"""Detection: does a label tell excerpts on which the latent fires from those on which it is silent?

One excerpt a request, so that one unreadable reply costs one answer. Excerpts are of the set
``score``: patients that no explainer saw. Bills et al. 2023; Paulo et al., arXiv 2410.13928.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from autointerp.batch import BatchConfig
from autointerp.client import Client, Request
from autointerp.explainers import plain_text
from autointerp.features import Example, Features
from autointerp.scores import Verdict, probability_of_yes
from autointerp.statistics import words_express
from hooks.studies import Study

MAX_TOKENS = 4
"""Of a yes or no."""
DETECT = (
    "You check whether excerpts of chest X-ray reports express a concept. Answer with one word: "
    "yes or no."
)
TOP_LOGPROBS = 5
"""As many as every endpoint that tells any will tell."""


@dataclass(frozen=True)
class Question:
    """A label held against one excerpt."""

    SYSTEM: ClassVar[str] = DETECT
    END: ClassVar[str] = "\nExpressed?"

    label: str
    text: str
    patient: str
    truth: bool
    """The right answer."""

    def request(self) -> Request:
        """What is asked of a language model."""
        asked = f"Concept: {self.label}\nExcerpt: {self.text}{self.END}"
        messages = [{"role": "system", "content": self.SYSTEM}, {"role": "user", "content": asked}]
        return Request(messages, MAX_TOKENS, top_logprobs=TOP_LOGPROBS)

    def expressed(self) -> bool:
        """The answer of word statistics: whether the excerpt has the label's words."""
        return words_express(self.label, self.text)


def questions(
    features: Features,
    latent: int,
    label: str,
    tokenizer: Any,
    modality: str = "report",
    side: str = "score",
    threshold: float = 0.0,
) -> list[Question]:
    """A label against every text example of one set.

    The latent counts as on where its peak exceeds ``threshold`` (:mod:`autointerp.operating`). A
    weaker firing counts as off: no example is left out.
    """
    examples: list[Example] = features.examples(latent, modality, set=side)
    return [
        Question(label, plain_text(one, tokenizer), one.patient, one.peak > threshold)
        for one in examples
    ]


def report_questions(
    features: Features,
    latent: int,
    label: str,
    studies: Mapping[str, Study],
    modality: str = "frontal",
    side: str = "score",
    threshold: float = 0.0,
) -> list[Question]:
    """A film latent's label against the reports of one set's studies, one question a study.

    ``threshold`` as in :func:`questions`. A study without a report is left out.
    """
    asked: dict[str, Question] = {}
    for one in features.examples(latent, modality, set=side):
        report = studies[one.study].report if one.study in studies else None
        if report:
            text = " ".join(report.split())
            asked.setdefault(one.study, Question(label, text, one.patient, one.peak > threshold))
    return list(asked.values())


def ask(
    client: Client,
    asked: Mapping[Any, Sequence[Question]],
    name: str = "score",
    *,
    batch: BatchConfig | None = None,
    wait: bool = True,
) -> dict[Any, list[Verdict]]:
    """Verdicts by key, all requests sent together; refusals and unreadable replies are ``None``.

    ``batch`` and ``wait`` are those of :meth:`autointerp.client.Client.ask_all`.
    """
    flat = [question for some in asked.values() for question in some]
    requests = [question.request() for question in flat]
    replies = iter(client.ask_all(requests, name, batch=batch, wait=wait))
    return {
        key: [
            Verdict(
                question.patient,
                question.truth,
                read_answer(reply.text),
                probability_of_yes(reply.logprobs),
            )
            for question, reply in zip(some, replies, strict=False)
        ]
        for key, some in asked.items()
    }


def read_answer(text: str) -> bool | None:
    """Yes or no, or ``None`` for anything else.

    >>> read_answer("Yes."), read_answer("**No**, it does not"), read_answer("Perhaps")
    (True, False, None)
    """
    word = re.match(r"\W*(yes|no)\b", text.strip(), flags=re.IGNORECASE)
    return None if word is None else word[1].lower() == "yes"
