"""Two reports aligned sentence by sentence: kept, lost, added, contradicted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hooks.grounding import TOKEN_PATTERN

Relation = Literal["same", "contradicts", "unrelated"]
Judge = Callable[[str, str], Relation]
"""What a sentence of the second report is to one of the first."""

_END = re.compile(r"(?<=[.!?])(?:\s+|$)|(?<=</obj>)\s*")
_WORD = re.compile(r"[a-z0-9]+")
_DENIALS = frozenset(
    [
        "no",
        "not",
        "without",
        "absent",
        "absence",
        "negative",
        "free",
        "clear",
        "resolved",
        "normal",
        "unremarkable",
        "never",
    ]
)
# Words that carry neither a finding nor its place. "either" and "both" are sides, so they stay out.
_EMPTY = frozenset(
    [
        "a",
        "an",
        "the",
        "there",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "of",
        "in",
        "on",
        "at",
        "to",
        "and",
        "or",
        "with",
        "for",
        "by",
        "from",
        "has",
        "have",
        "had",
        "seen",
        "noted",
        "identified",
        "present",
        "evidence",
        "again",
        "this",
        "that",
        "it",
        "its",
        "which",
        "as",
        "any",
        "evident",
    ]
)


def split_sentences(text: str) -> list[str]:
    """Sentences of a report, plain or grounded; words that no full stop ends are one too.

    >>> split_sentences("No effusion . The heart is 1.5 times as wide. Clear")
    ['No effusion .', 'The heart is 1.5 times as wide.', 'Clear']
    >>> split_sentences("<obj>Nodule.<box><x1><y2><x3><y4></box></obj><obj>No effusion.</obj>")
    ['Nodule.', 'No effusion.']
    """
    parts = (TOKEN_PATTERN.sub(" ", part) for part in _END.split(text))
    return [" ".join(part.split()) for part in parts if _WORD.search(part.lower())]


def content_of(sentence: str) -> tuple[frozenset[str], bool]:
    """Words that name a finding and its place, and whether the sentence denies it."""
    words = _WORD.findall(sentence.lower())
    kept = frozenset(w.removesuffix("s") for w in words if w not in _EMPTY | _DENIALS)
    return kept, any(w in _DENIALS for w in words)


def by_rule(before: str, after: str, least: float = 0.5) -> Relation:
    """The judge that needs no model: same subject by shared words, polarity by words of denial.

    The subject is the same where the sentences share ``least`` of their words, or where one denies
    and its words are all in the other, as "no effusion" denies "small left effusion". Synonyms are
    beyond it.

    >>> by_rule("No pleural effusion.", "Small left pleural effusion.")
    'contradicts'
    >>> by_rule("The heart is enlarged.", "The heart is mildly enlarged.")
    'same'
    >>> by_rule("Left pleural effusion.", "Left pneumothorax.")
    'unrelated'
    """
    (one, denied), (two, now_denied) = content_of(before), content_of(after)
    if not one or not two:
        return "same" if one == two and denied == now_denied else "unrelated"
    both = len(one & two)
    if denied != now_denied:
        inside = one <= two if denied else two <= one
        return "contradicts" if inside or both / len(one | two) >= least else "unrelated"
    return "same" if both / len(one | two) > least else "unrelated"


@dataclass(frozen=True)
class Alignment:
    """What became of the sentences of one report in another."""

    kept: tuple[tuple[str, str], ...]
    """Pairs that say the same."""
    lost: tuple[str, ...]
    added: tuple[str, ...]
    contradicted: tuple[tuple[str, str], ...]
    """Pairs with one subject and opposite polarity."""

    @property
    def n_before(self) -> int:
        """Sentences of the first report."""
        return len(self.kept) + len(self.lost) + len(self.contradicted)

    @property
    def changes(self) -> tuple[str, ...]:
        """Every sentence that is not kept, of either report."""
        both = (text for pair in self.contradicted for text in pair)
        return (*self.lost, *self.added, *both)


def align(
    before: str | Sequence[str], after: str | Sequence[str], judge: Judge = by_rule
) -> Alignment:
    """Match each sentence to at most one of the other report: equal ones, same, contradicted."""
    one = split_sentences(before) if isinstance(before, str) else list(before)
    two = split_sentences(after) if isinstance(after, str) else list(after)
    taken: dict[int, int] = {}
    free = dict.fromkeys(range(len(two)))

    def match(wanted: Callable[[str, str], bool]) -> list[tuple[str, str]]:
        pairs = []
        for i, text in enumerate(one):
            j = None if i in taken else next((j for j in free if wanted(text, two[j])), None)
            if j is not None:
                taken[i] = j
                del free[j]
                pairs.append((text, two[j]))
        return pairs

    kept = match(lambda a, b: a.lower() == b.lower())
    kept += match(lambda a, b: judge(a, b) == "same")
    against = match(lambda a, b: judge(a, b) == "contradicts")
    return Alignment(
        tuple(kept),
        tuple(text for i, text in enumerate(one) if i not in taken),
        tuple(two[j] for j in free),
        tuple(against),
    )
