"""What a language model is asked. A changed prompt is a changed request, so answers never mix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from autointerp.client import Messages
from autointerp.collect import Example

MARK_ABOVE = 0.3
"""Tokens above this share of the example's peak are marked."""

EXPLAIN = (
    "Below are excerpts of chest X-ray reports. In each, the words that switch on one feature of a "
    "neural network stand between << and >>. Name the one concept those marked words share, in at "
    "most eight words. Answer with the concept only. If there is no shared concept, answer: none."
)
DETECT = (
    "You check whether excerpts of chest X-ray reports express a concept. Answer with one word: "
    "yes or no."
)


def marked(example: Example, tokenizer: Any) -> str:
    """The sentence's text with the words that hold strongly activating tokens in ``<<`` ``>>``."""
    least = max(example.peak * MARK_ABOVE, 1e-12)
    words: list[tuple[str, bool]] = []
    for text, activation in zip(
        token_texts(example.token_ids, tokenizer), example.activations, strict=True
    ):
        active = activation >= least
        if words and text and not text[0].isspace() and text[0].isalnum():
            before, was_active = words[-1]
            words[-1] = (before + text, was_active or active)
        else:
            words.append((text, active))
    pieces = []
    for text, active in words:
        body = text.strip()
        pieces.append(text.replace(body, f"<<{body}>>", 1) if active and body else text)
    return "".join(pieces).replace(">> <<", " ").strip()


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the decoded text, blanks included."""
    texts = [tokenizer.decode(list(ids[:n])) for n in range(len(ids) + 1)]
    return [now[len(before) :] for before, now in pairwise(texts)]


def plain(example: Example, tokenizer: Any) -> str:
    """The sentence's text."""
    return tokenizer.decode(example.token_ids).strip()


def explain_messages(examples: Sequence[Example], tokenizer: Any) -> Messages:
    """Ask for the concept behind marked excerpts."""
    listing = "\n".join(f"{i}. {marked(e, tokenizer)}" for i, e in enumerate(examples, start=1))
    return [{"role": "user", "content": f"{EXPLAIN}\n\n{listing}\n\nConcept:"}]


def detect_messages(label: str, example: Example, tokenizer: Any) -> Messages:
    """Ask whether one unmarked excerpt expresses ``label``."""
    question = f"Concept: {label}\nExcerpt: {plain(example, tokenizer)}\nExpressed?"
    return [{"role": "system", "content": DETECT}, {"role": "user", "content": question}]
