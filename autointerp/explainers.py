"""What an explainer is asked, from a features folder: text, the reports of films, or words alone.

Every explainer sees examples of the set ``explain`` only, those on which the latent fires beside
those on which it is silent. "No clear concept" is an answer: the label is then ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from autointerp.client import Messages, Request
from autointerp.evidence import by_study, marked_text, token_texts
from autointerp.features import IMAGES, SILENT, Example, Features
from autointerp.statistics import distinctive_words
from hooks.studies import Study

MAX_TOKENS = 160
"""Of an explanation as JSON."""
FIRES, SILENT_HEAD = "Fires:", "Silent:"
TEXT = (
    "Below are excerpts of chest X-ray reports. One feature of a neural network is on in the "
    "first group, at the words between << and >>, and off in the whole second group. Name the one concept "
    "that the first group has and the second has not, in at most eight words. If there is none, "
    "the label is null."
)
REPORTS = (
    "Below are reports of chest X-rays. One feature of a neural network that sees only the films "
    "is on in the films of the first group, and off in those of the second. Name the one concept that "
    "the first group has and the second has not, in at most eight words. If there is none, the "
    "label is null."
)


class Explanation(BaseModel):
    """What an explainer answers."""

    model_config = ConfigDict(extra="forbid")

    label: str | None
    """The concept, or null for no clear concept."""
    confidence: float = Field(ge=0, le=1)
    evidence: str
    """The words that decided, in short."""


def shown(features: Features, latent: int, modality: str) -> tuple[list[Example], list[Example]]:
    """Examples on which a latent fires and on which it is silent, of the explaining patients."""
    own = features.examples(latent, modality, set="explain")
    fires = [one for one in own if one.kind not in SILENT]
    return fires, [one for one in own if one.kind in SILENT]


def text_request(features: Features, latent: int, tokenizer: Any, modality: str) -> Request | None:
    """Marked excerpts with contrast; ``None`` where there is nothing to show, or for all to show.

    A latent that fires everywhere (:meth:`Features.dense`) has no name and is not asked about.
    """
    if features.dense(latent):
        return None
    fires, silent = shown(features, latent, modality)
    if not fires:
        return None
    on = [marked_text(one, tokenizer) for one in fires]
    off = [plain_text(one, tokenizer) for one in silent]
    return Request(_grouped(TEXT, on, off), MAX_TOKENS, Explanation)


def report_request(
    features: Features, latent: int, studies: Mapping[str, Study], modality: str = "frontal"
) -> Request | None:
    """Reports of the studies whose films a latent fires on, with those of silent ones."""
    if features.dense(latent) or modality not in IMAGES:
        return None
    on, off = reports_of(features, latent, studies, modality)
    return Request(_grouped(REPORTS, on, off), MAX_TOKENS, Explanation) if on else None


def reports_of(
    features: Features, latent: int, studies: Mapping[str, Study], modality: str
) -> tuple[list[str], list[str]]:
    """Reports of firing and of silent studies, one line each; a study without one is left out."""
    sides = []
    for examples in shown(features, latent, modality):
        found = [one.report for one in by_study(examples, studies)]
        sides.append([" ".join(report.split()) for report in found if report])
    return sides[0], sides[1]


def words_label(on: Sequence[str], off: Sequence[str]) -> str | None:
    """The explainer without a language model, of texts or of reports."""
    return " ".join(distinctive_words(on, off)) or None


def plain_text(example: Example, tokenizer: Any) -> str:
    """The excerpt without marks."""
    return "".join(token_texts(example, tokenizer)).strip()


def _grouped(question: str, on: Sequence[str], off: Sequence[str]) -> Messages:
    groups = "\n".join([FIRES, *(f"- {t}" for t in on), "", SILENT_HEAD, *(f"- {t}" for t in off)])
    return [{"role": "user", "content": f"{question}\n\n{groups}"}]
