"""Labels without a language model: the words that tell a latent's sentences from others.

A word's weight is its log-odds between the two sets of sentences, with an informative Dirichlet
prior of their union, over its standard error (Monroe, Colaresi and Quinn 2008, "Fightin' Words").
It is the baseline that any explainer has to beat, and costs nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import numpy as np

MAX_WORDS = 4
POOL = 6
"""Words that are tried together."""
LEAST_Z = 2.0
"""Standard errors by which a word must be commoner where the latent fires."""
OPPOSITES = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "at", "in", "is", "its", "of", "on", "or", "the", "there", "to", "with"]
)
_WORD = re.compile(r"[^\W\d_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, in order.

    >>> words_of("<obj> Small left effusion . <x12>")
    ['small', 'left', 'effusion']
    """
    return _WORD.findall(re.sub(r"<[^>]*>", " ", text.lower()))


def distinctive_words(inside: Sequence[str], outside: Sequence[str]) -> list[str]:
    """Words that set the texts ``inside`` apart, at most :data:`MAX_WORDS`, in reading order.

    A text counts a word once. Of the :data:`POOL` content words that are most standard errors
    commoner, at least :data:`LEAST_Z`, those are taken that together (:func:`words_express`) tell
    the two sides best by balanced accuracy; of equally good ones, most words. Empty when no word
    is commoner.

    >>> distinctive_words(["left effusion is seen"] * 30, ["no nodule is seen"] * 30)
    ['left', 'effusion']
    """
    one, two = ([set(words_of(text)) for text in texts] for texts in (inside, outside))
    counts = Counter(word for words in one for word in words)
    others = Counter(word for words in two for word in words)
    total, other_total = sum(counts.values()), sum(others.values())
    prior = counts + others
    weights = {}
    for word, n in counts.items():
        a, rest = prior[word], total + other_total - prior[word]
        m = others[word]
        odds = math.log((n + a) / (total + rest + a - n)) - math.log(
            (m + a) / (other_total + rest + a - m)
        )
        weights[word] = odds / math.sqrt(1 / (n + a) + 1 / (m + a))
    content = [word for word in weights if word not in FUNCTION_WORDS]
    best = sorted(content, key=lambda word: (-weights[word], word))[:POOL]
    chosen = _best_together([word for word in best if weights[word] >= LEAST_Z], one, two)
    return sorted(chosen, key=lambda word: _place(word, inside))


def _best_together(
    words: Sequence[str], inside: Sequence[set[str]], outside: Sequence[set[str]]
) -> list[str]:
    """The words that, as one label, tell two sides of texts best; ``words`` are best first."""
    if not words:
        return []
    has, against = [], []
    for texts in (inside, outside):
        shape = (len(texts), len(words))
        own = np.array([[w in text for w in words] for text in texts], dtype=bool).reshape(shape)
        other = [[OPPOSITES.get(w) in text for w in words] for text in texts]
        has.append(own)
        against.append(np.array(other, dtype=bool).reshape(shape) & ~own)
    scored: list[tuple[float, int, list[int], list[int]]] = []
    for size in range(1, min(MAX_WORDS, len(words)) + 1):
        for own in map(list, combinations(range(len(words)), size)):
            said = [
                (2 * h[:, own].sum(1) > size) & ~a[:, own].any(1)
                for h, a in zip(has, against, strict=True)
            ]
            hits, alarms = (float(side.mean()) if len(side) else 0.0 for side in said)
            scored.append((hits - alarms, size, [-i for i in own], own))
    best = max(scored)[3]
    return [words[i] for i in best]


def _place(word: str, texts: Sequence[str]) -> float:
    """Where in a text a word comes on average, 0 to 1."""
    places = []
    for text in texts:
        words = words_of(text)
        if word in words:
            places.append(words.index(word) / len(words))
    return mean(places)


def words_express(label: str, text: str) -> bool:
    """Whether a text has most of a label's words, and not the opposite of one instead.

    >>> words_express("nodule in the left lung", "left lung nodule .")
    True
    >>> words_express("left upper lung nodule", "right upper lung nodule .")
    False
    """
    words, found = set(words_of(label)) - FUNCTION_WORDS, set(words_of(text))
    against = any(OPPOSITES.get(word) in found for word in words - found)
    return not against and 2 * len(words & found) > len(words)
