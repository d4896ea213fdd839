"""What an edit did to some reports: whether the finding turned, and what else changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from phantom import read_report
from phantom.language import sentences
from sae.intervals import mean_interval, patient_draws, ratio
from steering.sentences import split_sentences


class Trial(NamedTuple):
    """One entry a study."""

    hits: list[bool]
    """Whether the finding turned."""
    changed: list[int]
    """Sentences about other findings that changed."""
    total: list[int]
    """Sentences about other findings."""

    @classmethod
    def of(cls, before: Sequence[str], after: Sequence[str], label: str, on: bool) -> Trial:
        """Reports of the same studies without and with an edit that should turn ``label``."""
        out = cls([], [], [])
        for was, now in zip(before, after, strict=True):
            changed, total = changed_sentences(was, now, label)
            out.hits.append((label in read_report(now).findings.seen) is on)
            out.changed.append(changed)
            out.total.append(total)
        return out

    @property
    def rate(self) -> float:
        """Share of studies in which the finding turned."""
        return float(np.mean(self.hits)) if self.hits else 0.0

    @property
    def side(self) -> float:
        """Share of other findings' sentences that changed."""
        return sum(self.changed) / max(1, sum(self.total))

    @property
    def score(self) -> float:
        """What choices are made by: a finding turned is worth more than a sentence spared."""
        return self.rate - 2 * max(0.0, self.side - 0.05)

    @property
    def settled(self) -> bool:
        """Nothing that is tried later could be much better."""
        return self.rate > 0.98 and self.side < 0.03

    def __add__(self, other: object) -> Trial:
        assert isinstance(other, Trial)
        return Trial(self.hits + other.hits, self.changed + other.changed, self.total + other.total)

    def replaced(self, places: Sequence[int], by: Trial) -> Trial:
        """Other results of the studies at ``places``.

        >>> Trial([True, False], [0, 1], [2, 2]).replaced([1], Trial([True], [2], [3]))
        Trial(hits=[True, True], changed=[0, 2], total=[2, 3])
        """
        new = dict(zip(places, zip(*by, strict=True), strict=True))
        rows = [new.get(i, row) for i, row in enumerate(zip(*self, strict=True))]
        return Trial(*map(list, zip(*rows, strict=True))) if rows else Trial([], [], [])

    def rate_interval(self) -> dict[str, Any]:
        """``rate`` with 95 % over studies."""
        return mean_interval(torch.tensor([float(hit) for hit in self.hits])).record()

    def side_interval(self) -> dict[str, Any]:
        """``side`` with 95 % over studies."""
        top, bottom = torch.tensor(self.changed), torch.tensor(self.total)
        return ratio(top, bottom, int(bottom.sum()), patient_draws(len(top))).record()


def changed_sentences(before: str, after: str, label: str) -> tuple[int, int]:
    """How many sentences about other findings changed, and how many there are.

    A sentence changes when the other report gives any finding it names, but for ``label``, another
    state (grade, certainty and comparison included). One that is new counts in both numbers.
    """
    was, now = read_report(before), read_report(after)
    changed = total = 0
    named: set[str] = set()
    for text in split_sentences(before):
        others = [(name, state) for name, state in sentences().get(text, ()) if name != label]
        named |= {name for name, _ in others}
        if others or text not in sentences():
            total += 1
            lost = any(now.findings[name] != state for name, state in others)
            changed += lost if others else text not in after
    for text in split_sentences(after):
        meaning = sentences().get(text)
        new = [n for n, _ in meaning or () if n != label and n not in named]
        if any(was.findings[name] != now.findings[name] for name in new) or (
            meaning is None and text not in before
        ):
            total += 1
            changed += 1
    return changed, total
