"""The causal explainer: what does a report say when a latent is turned up, and not otherwise?

The reports are written by the caller, by steering a model that looks at a blank film, so that
nothing but the latent can bring a finding into them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from autointerp.client import Request
from autointerp.explainers import MAX_TOKENS, Explanation, grouped
from autointerp.statistics import MAX_WORDS, words_of

WriteReport = Callable[[int], str]
"""A latent's number to the report that the model writes of a blank film with it turned up."""
CAUSAL = (
    "Below are chest X-ray reports that a neural network wrote of a blank film: in the first group "
    "with one of its features turned up, in the second without. Name the one concept that turning "
    "the feature up brought into the report, in at most eight words. Do not name what is garbled "
    "or only worded differently. If there is none, the label is null."
)


class SteeredReports(NamedTuple):
    """Reports of one blank film."""

    steered: Mapping[int, str]
    """With a latent turned up, by latent."""
    unsteered: str
    """Without any edit."""


def steered_reports(write_report: WriteReport, latents: Sequence[int]) -> dict[int, str]:
    """A report with each latent turned up."""
    return {latent: write_report(latent) for latent in dict.fromkeys(latents)}


def causal_request(steered: str, unsteered: str) -> Request | None:
    """Reports with and without a latent; ``None`` where it changes no sentence."""
    if not new_sentences(steered, unsteered):
        return None
    on, off = " ".join(steered.split()), " ".join(unsteered.split())
    return Request(grouped(CAUSAL, [on], [off]), MAX_TOKENS, Explanation)


def steering_words(steered: Mapping[int, str], unsteered: str) -> dict[int, str | None]:
    """Labels without a language model: words of new sentences that the plain report has not.

    At most :data:`autointerp.statistics.MAX_WORDS`, those that the fewest other latents bring, in
    reading order. ``None`` where there are none: a sentence that went away has left no words.

    >>> plain = "The lungs are clear. Heart size is normal."
    >>> steering_words({7: "Small left effusion. Heart size is normal.", 8: plain}, plain)
    {7: 'small left effusion', 8: None}
    """
    usual = set(words_of(unsteered))
    brought = {
        latent: list(
            dict.fromkeys(
                word
                for sentence in new_sentences(report, unsteered)
                for word in words_of(sentence)
                if word not in usual
            )
        )
        for latent, report in steered.items()
    }
    shared = Counter(word for words in brought.values() for word in words)
    labels: dict[int, str | None] = {}
    for latent, words in brought.items():
        rarest = set(sorted(words, key=lambda word: (shared[word], words.index(word)))[:MAX_WORDS])
        labels[latent] = " ".join(word for word in words if word in rarest) or None
    return labels


def new_sentences(steered: str, unsteered: str) -> list[str]:
    """Sentences of a report that the other has not, by their words.

    >>> new_sentences("No effusion. Tube is seen.", "no effusion.")
    ['Tube is seen.']
    """
    known = {tuple(words_of(sentence)) for sentence in _sentences(unsteered)}
    return [s for s in _sentences(steered) if words_of(s) and tuple(words_of(s)) not in known]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
