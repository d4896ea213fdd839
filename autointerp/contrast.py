"""Contrast examples: studies in which a latent is silent, chosen to be mistaken for its own.

Candidates are drawn with a hash of latent, set and try, so that equal folders give equal examples,
and kept if the latent is silent in the whole study, in that modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from autointerp.features import IMAGES, MODALITIES, SETS
from autointerp.layout import Layout

TRIES = 4
"""Candidates drawn for each example wanted."""
SLOTS = 1 << 14
"""Slots for which candidates are drawn together."""


class Chosen(NamedTuple):
    """Examples of one kind: their slot, and the row that each is about."""

    slot: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]


def mixed(*numbers: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of integers, elementwise (the finaliser of SplitMix64 after each)."""
    out = np.asarray(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            out = (out ^ np.asarray(number, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            out = out ^ (out >> np.uint64(31))
    return np.asarray(out)


def fraction(*numbers: np.ndarray | int) -> np.ndarray:
    """A hash of integers as a float32 in (0, 1]."""
    return ((mixed(*numbers) >> np.uint64(40)).astype(np.float32) + 1) * np.float32(2**-24)


class Contrast:
    """Draws silent examples of one modality.

    Parameters
    ----------
    cells
        ``study · F + latent`` of every study in which a latent fires, ascending.
    top
        Rows of each slot's strongest examples ``[sets · F, k]``; -1 where there are none.
    group
        Of each study: the number of its set of labels; -1 where labels are not known.
    """

    def __init__(
        self,
        layout: Layout,
        modality: int,
        cells: Int64[np.ndarray, " cells"],
        top: Int64[np.ndarray, "slots k"],
        alive: Int64[np.ndarray, " a"],
        set_of: np.ndarray,
        group: np.ndarray,
        nearest: Int64[np.ndarray, "F n"],
        n: int,
        seed: int,
    ) -> None:
        self.layout, self.modality, self.cells, self.top = layout, modality, cells, top
        self.set_of, self.group, self.nearest = set_of, group, nearest
        self.n, self.seed, self.tries = n, seed, n * TRIES
        self.F = len(nearest)
        self.slots = (np.arange(len(SETS))[:, None] * self.F + alive).ravel()
        starts = layout.unit_starts
        first, last = starts[:-1], starts[1:] - 1
        own = layout.modality[first] == modality
        self.first, self.last = first[own], last[own]
        self.unit_study = layout.study[self.first]
        self.ranges = _Ranges(set_of[np.unique(self.unit_study)], np.unique(self.unit_study))

    def all(self) -> Iterator[tuple[str, Chosen]]:
        """Every kind that the data allow."""
        if (self.group >= 0).any():
            yield "same_finding_absent", self._drawn(self._same_finding())
        yield "neighbour", self._drawn(self._neighbour)
        region = self._same_patch if MODALITIES[self.modality] in IMAGES else self._same_word()
        yield "same_region", self._drawn(region)
        yield "random_silent", self._drawn(self._random)

    def _drawn(self, draw: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Chosen:
        """Candidate rows ``[slots, tries]`` of ``draw``, the first ``n`` silent ones, a study once.

        ``draw`` gives -1 where there is no candidate.
        """
        slots, rows = [], []
        tries = np.arange(self.tries)[None, :]
        for start in range(0, len(self.slots), SLOTS):
            slot = self.slots[start : start + SLOTS, None]
            row = draw(slot, tries)
            study = np.where(row >= 0, self.layout.study[row], -1).astype(np.int64)
            good = (row >= 0) & self._silent(study, slot % self.F)
            same = study[:, :, None] == study[:, None, :]
            earlier = np.tril(np.ones((self.tries, self.tries), dtype=bool), -1)
            good &= ~(same & earlier & good[:, None, :]).any(axis=2)
            good &= good.cumsum(axis=1) <= self.n
            at, which = np.nonzero(good)
            slots.append(slot[at, 0])
            rows.append(row[at, which])
        if not slots:
            return Chosen(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        return Chosen(np.concatenate(slots), np.concatenate(rows))

    def _silent(self, study: np.ndarray, latent: np.ndarray) -> np.ndarray:
        key = study * self.F + latent
        if len(self.cells) == 0:
            return np.ones(key.shape, dtype=bool)
        flat = key.ravel()
        order = np.argsort(flat)  # neighbouring keys are looked up in neighbouring pages
        place = np.empty(len(flat), dtype=np.int64)
        place[order] = np.searchsorted(self.cells, flat[order])
        found = self.cells[np.minimum(place, len(self.cells) - 1)] == flat
        return ~found.reshape(key.shape)

    def _row_of(self, study: np.ndarray, slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
        """Some row of each study; -1 for study -1."""
        low = np.searchsorted(self.unit_study, study, side="left")
        high = np.searchsorted(self.unit_study, study, side="right")
        unit = low + _below(mixed(self.seed, 2, slot, tries), high - low)
        unit = np.clip(unit, 0, len(self.first) - 1)
        length = self.last[unit] + 1 - self.first[unit]
        row = self.first[unit] + _below(mixed(self.seed, 3, slot, tries), length)
        return np.where((study >= 0) & (high > low), row, -1)

    def _set(self, slot: np.ndarray) -> np.ndarray:
        return slot // self.F

    def _random(self, slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
        study = self.ranges.pick(self._set(slot), mixed(self.seed, 1, slot, tries))
        return self._row_of(study, slot, tries)

    def _own(self, slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
        """The slot's own strong examples in turn; -1 where it has none."""
        rows = self.top[slot[:, 0]]
        count = np.maximum((rows >= 0).sum(axis=1), 1)
        return np.take_along_axis(rows, tries % count[:, None], axis=1)

    def _same_finding(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        n_groups = int(self.group.max()) + 1
        studies = self.ranges.values
        known = studies[self.group[studies] >= 0]
        ranges = _Ranges(self.set_of[known] * n_groups + self.group[known], known)

        def draw(slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
            own = self._own(slot, tries)
            group = np.where(own >= 0, self.group[self.layout.study[own]], -1)
            key = np.where(group >= 0, self._set(slot) * n_groups + group, -1)
            study = ranges.pick(key, mixed(self.seed, 4, slot, tries))
            return self._row_of(study, slot, tries)

        return draw

    def _neighbour(self, slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
        width = self.nearest.shape[1]
        other = self.nearest[slot % self.F, tries % width]
        rank = np.minimum(tries // width, self.top.shape[1] - 1)
        row = self.top[self._set(slot) * self.F + other, rank]
        return np.where(other >= 0, row, -1)

    def _same_word(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """A silent sentence with the word of the peak, or with the rarest word around it."""
        layout = self.layout
        rows = np.flatnonzero(layout.modality == self.modality)
        word, n_words = layout.token_id, int(layout.token_id.max()) + 1
        ranges = _Ranges(self.set_of[layout.study[rows]] * n_words + word[rows], rows)
        commonness = np.bincount(word[rows].clip(min=0), minlength=n_words)
        # A row's commonness and the row in one number, so that the least of a unit names its row.
        packed = commonness[word[rows].clip(min=0)] * len(layout) + rows
        begins = np.searchsorted(rows, self.first)
        rarest = np.minimum.reduceat(packed, begins) % len(layout)

        def draw(slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
            own = self._own(slot, tries // 2)
            unit = np.searchsorted(self.first, own, side="right") - 1
            about = np.where(tries % 2 == 0, own, rarest[unit])
            key = np.where(own >= 0, self._set(slot) * n_words + word[about], -1)
            return ranges.pick(key, mixed(self.seed, 5, slot, tries))

        return draw

    def _same_patch(self, slot: np.ndarray, tries: np.ndarray) -> np.ndarray:
        """The patch of the peak on a silent film."""
        layout = self.layout
        own = self._own(slot, tries)
        film = np.searchsorted(self.first, own, side="right") - 1
        offset = own - self.first[np.maximum(film, 0)]
        study = self.ranges.pick(self._set(slot), mixed(self.seed, 6, slot, tries))
        other = np.searchsorted(self.unit_study, study)
        row = self.first[np.minimum(other, len(self.first) - 1)] + offset
        row = np.where((own >= 0) & (study >= 0) & (row < len(layout)), row, -1)
        same = (layout.patch_row[row] == layout.patch_row[own]) & (
            layout.patch_column[row] == layout.patch_column[own]
        )
        inside = (layout.study[row] == study) & (layout.modality[row] == self.modality)
        return np.where(same & inside, row, -1)


class _Ranges:
    """Values by key, of which one is picked by a hash."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self.keys, self.values = np.asarray(keys)[order].astype(np.int64), values[order]

    def pick(self, key: np.ndarray, random: np.ndarray) -> np.ndarray:
        """A value of each key; -1 where it has none."""
        low = np.searchsorted(self.keys, key, side="left")
        count = np.searchsorted(self.keys, key, side="right") - low
        if len(self.values) == 0:
            return np.full(np.broadcast(key, random).shape, -1, dtype=np.int64)
        place = np.minimum(low + _below(random, count), len(self.values) - 1)
        return np.where(count > 0, self.values[place], -1).astype(np.int64)


def _below(random: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Integers from 0 to ``bound - 1`` (0 for bound 0)."""
    return (random % np.maximum(bound, 1).astype(np.uint64)).astype(np.int64)


def label_groups(labels: Sequence[tuple[str, ...] | None]) -> np.ndarray:
    """A number for each distinct set of labels; -1 for ``None``."""
    numbers: dict[frozenset[str], int] = {}
    found = [
        -1 if one is None else numbers.setdefault(frozenset(one), len(numbers)) for one in labels
    ]
    return np.array(found, dtype=np.int64)
