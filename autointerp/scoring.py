"""Labels through a scorer, each beside another latent's label on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autointerp.detection import Question
from autointerp.scores import Said, Score, Verdict, judge, other_labels

QuestionsOf = Callable[[int, str], Sequence[Question]]
"""Questions about a latent by a label, such as :func:`autointerp.fuzzing.questions`."""


Answers = Callable[[Mapping[Any, Sequence[Question]]], Mapping[Any, Sequence[Verdict]]]
"""Who answers: verdicts by key, such as :meth:`autointerp.labellers.Labeller.detect`."""


def score_labels(
    answers: Answers,
    scorer: str,
    labels: Mapping[int, str | None],
    questions_of: QuestionsOf,
    modality: str = "report",
    seed: int = 0,
    heard: list[Said] | None = None,
) -> list[Score]:
    """A score for every latent with its shuffled baseline; everything is asked together.

    The verdicts on the labels themselves are added to ``heard``.

    No clear concept predicts nothing: it is taken to answer no to every question, which is chance,
    and nothing is sent.
    """
    others = other_labels(labels, seed)
    named = {latent: label for latent, label in labels.items() if label is not None}
    asked = {(latent, "own"): questions_of(latent, label) for latent, label in named.items()}
    for latent, other in others.items():
        if other is not None:
            asked[latent, "other"] = questions_of(latent, other)
    said = answers(asked)
    scores = []
    for latent, label in labels.items():
        if label is None:
            silent = [Verdict(q.patient, q.truth, False) for q in questions_of(latent, "")]
            scores.append(judge(latent, scorer, modality, silent, seed))
            continue
        own = said[latent, "own"]
        score = judge(latent, scorer, modality, own, seed)
        if heard is not None:
            heard.append(Said(latent, scorer, modality, tuple(own)))
        if (latent, "other") in said:
            other = judge(latent, scorer, modality, said[latent, "other"], seed)
            score = replace(score, baseline=other.value)
        scores.append(score)
    return scores
