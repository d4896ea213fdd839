"""What an explainer is asked, from a features folder: text, the reports of films, or words alone.

Every explainer sees examples of the set ``explain`` only, those on which the latent fires beside
those on which it is silent. "No clear concept" is an answer: the label is then ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from autointerp.client import Messages, Request
from autointerp.evidence import by_study, marked_text
from autointerp.features import IMAGES, SILENT, Example, Features
from autointerp.statistics import distinctive_words
from hooks.studies import Study

MAX_TOKENS = 160
"""Of an explanation as JSON."""
FIRES, SILENT_HEAD = "On:", "Off:"
STRONG = 0.5
"""Share of a latent's maximum from which it is strongly on."""
BETWEEN = 0.25
"""Shares of the maximum below strongly on that say neither on nor off."""
TEXT = (
    "Below are excerpts of chest X-ray reports. One feature of a neural network is strongly on in "
    "the first group, at the words between << and >>, and off or barely on in the second. Name the "
    "one concept that the first group has and the second has not, in at most eight words. If there "
    "is none, the label is null."
)
REPORTS = (
    "Below are reports of chest X-rays. One feature of a neural network that sees only the films "
    "is strongly on in the films of the first group, and off or barely on in the second. Name the "
    "one concept that the first group has and the second has not, in at most eight words. If there "
    "is none, the label is null."
)


class Explanation(BaseModel):
    """What an explainer answers."""

    model_config = ConfigDict(extra="forbid")

    label: str | None
    """The concept, or null for no clear concept."""
    confidence: float = Field(ge=0, le=1)
    evidence: str
    """The words that decided, in short."""


def shown(
    features: Features, latent: int, modality: str, strong: float = STRONG
) -> tuple[list[Example], list[Example]]:
    """Examples on which a latent is strongly on, and off or barely on, of the explaining patients.

    Most firings are weak and of other concepts: spread over ranks they would outnumber what the
    latent is about. What is in between says neither and is left out. ``strong`` is a share of the
    latent's largest activation on these patients.
    """
    own = features.examples(latent, modality, set="explain")
    largest = max((one.peak for one in own), default=0.0)
    least, barely = strong * largest, (strong - BETWEEN) * largest
    on = [one for one in own if one.kind not in SILENT and one.peak >= least]
    return on, [one for one in own if one.kind in SILENT or one.peak < barely]


def text_request(
    features: Features, latent: int, tokenizer: Any, modality: str, strong: float = STRONG
) -> Request | None:
    """Marked excerpts with contrast; ``None`` where there is nothing to show, or for all to show.

    A latent that fires everywhere (:meth:`Features.dense`) has no name and is not asked about.
    """
    if features.dense(latent):
        return None
    fires, silent = shown(features, latent, modality, strong)
    if not fires:
        return None
    on = [marked_text(one, tokenizer) for one in fires]
    off = [plain_text(one, tokenizer) for one in silent]
    return Request(grouped(TEXT, on, off), MAX_TOKENS, Explanation)


def report_request(
    features: Features, latent: int, studies: Mapping[str, Study], modality: str = "frontal"
) -> Request | None:
    """Reports of the studies whose films a latent fires on, with those of silent ones."""
    if features.dense(latent) or modality not in IMAGES:
        return None
    on, off = reports_of(features, latent, studies, modality)
    return Request(grouped(REPORTS, on, off), MAX_TOKENS, Explanation) if on else None


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
    return tokenizer.decode(example.token_ids, clean_up_tokenization_spaces=False).strip()


def grouped(question: str, on: Sequence[str], off: Sequence[str]) -> Messages:
    """A question over two groups of texts, as one message."""
    groups = "\n".join([FIRES, *(f"- {t}" for t in on), "", SILENT_HEAD, *(f"- {t}" for t in off)])
    return [{"role": "user", "content": f"{question}\n\n{groups}"}]
