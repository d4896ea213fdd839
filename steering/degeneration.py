"""Signs that a text fell apart: words that repeat."""

from __future__ import annotations

from typing import Any, NamedTuple

from steering.sentences import split_sentences


class Degeneration(NamedTuple):
    """How much of a text repeats itself; all are 0 of a text that never does."""

    repeated_4grams: float
    """Share of its runs of four words that occurred before."""
    longest_loop: int
    """Words of the longest stretch that repeats what is right before it."""
    repeated_sentences: float
    """Share of its sentences that occurred before."""
    n_words: int


def degeneration(text: str) -> Degeneration:
    """Measure one text.

    >>> degeneration("no effusion . no effusion . no effusion .").longest_loop
    6
    >>> degeneration("the heart is normal .")[:3]
    (0.0, 0, 0.0)
    """
    words = text.lower().split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    sentences = [sentence.lower() for sentence in split_sentences(text)]
    longest = 0
    for period in range(1, len(words) // 2 + 1):
        same = 0
        for i in range(period, len(words)):
            same = same + 1 if words[i] == words[i - period] else 0
            if same >= period:
                longest = max(longest, same)
    return Degeneration(_repeated(runs), longest, _repeated(sentences), len(words))


def _repeated(items: list[Any]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0
