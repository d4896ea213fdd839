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
from statistics import mean
from typing import Any

from autointerp.collect import Example, LatentExamples
from autointerp.prompts import plain
from autointerp.score import Detection, summarize

MAX_WORDS = 4
LEAST_Z = 2.0
"""Standard errors by which a word must be commoner where the latent fires."""
_WORD = re.compile(r"[^\W\d_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, in order.

    >>> words_of("<obj> Small left effusion . <x12>")
    ['small', 'left', 'effusion']
    """
    return _WORD.findall(re.sub(r"<[^>]*>", " ", text.lower()))


def distinctive_words(inside: Sequence[str], outside: Sequence[str]) -> list[str]:
    """Words that set the texts ``inside`` apart, at most :data:`MAX_WORDS`, in reading order.

    A text counts a word once. Empty when no word is :data:`LEAST_Z` standard errors commoner.

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
    best = sorted(weights, key=lambda word: (-weights[word], word))[:MAX_WORDS]
    chosen = [word for word in best if weights[word] >= LEAST_Z]
    return sorted(chosen, key=lambda word: _place(word, inside))


def _place(word: str, texts: Sequence[str]) -> float:
    """Where in a text a word comes on average, 0 to 1."""
    places = []
    for text in texts:
        words = words_of(text)
        if word in words:
            places.append(words.index(word) / len(words))
    return mean(places)


def statistics_label(examples: LatentExamples, tokenizer: Any) -> str | None:
    """Distinctive words of the sentences a latent fires on most; ``None`` if there are none."""
    inside = [plain(example, tokenizer) for example in examples.explain]
    outside = [plain(example, tokenizer) for example in examples.contrast]
    return " ".join(distinctive_words(inside, outside)) or None


def detect_by_words(label: str, examples: LatentExamples, tokenizer: Any) -> Detection:
    """Detection score of a word label: a sentence expresses it when it has most of its words."""
    words = set(words_of(label))

    def answers(sentences: Sequence[Example]) -> list[bool | None]:
        texts = [set(words_of(plain(sentence, tokenizer))) for sentence in sentences]
        return [2 * len(words & text) > len(words) for text in texts]

    return summarize(answers(examples.positives), answers(examples.negatives))
