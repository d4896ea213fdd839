"""Examples of every latent: chosen among the studies, cut around their peaks, tabled by latent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from autointerp.contrast import Contrast, label_groups
from autointerp.excerpts import Excerpt, Excerpts
from autointerp.features import IMAGES, KINDS, MODALITIES, SETS
from autointerp.layout import Layout
from autointerp.neighbours import neighbours
from autointerp.sweep import PerModality, Sweep

CHUNK_VALUES = 1 << 20
"""Values of examples that are read back and written together."""
CHAPTERS = 128
"""Most parts in which the activations of examples are read back: an open file each."""
CHAPTER_CHUNKS = 16
"""Chunks of a part, at least."""
N_NEIGHBOURS = 4
NAMED = ["latent", "modality", "kind", "set", "study", "patient", "view", "sentence"]
"""Columns of few values each, stored as numbers of a dictionary."""
EXACT_BITS = 11
"""Bits after the point that the values of examples keep; the rest is zero, to compress well."""
VALUE_RESOLUTION = 2.0**-EXACT_BITS
"""A value of an example is at most this share below the exact one; its peak is exact."""
_KEPT = np.uint32(0xFFFFFFFF << (23 - EXACT_BITS) & 0xFFFFFFFF)


class Examples(NamedTuple):
    """Chosen examples as columns."""

    latent: np.ndarray
    modality: np.ndarray
    set: np.ndarray
    kind: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    peak: np.ndarray


def _columns(modality: int, kind: str, F: int, slot: Any, row: Any, peak: Any) -> Examples:
    def full(number: int) -> np.ndarray:
        return np.full(len(slot), number, dtype=np.int64)

    rank = np.arange(len(slot))
    kinds = full(KINDS.index(kind))
    return Examples(slot % F, full(modality), slot // F, kinds, rank, row, peak)


def _fired(modality: int, state: PerModality, F: int, n: int) -> Iterator[Examples]:
    """The top examples, and others at even ranks among a sample of all that fired."""
    top = state.top
    slot, at = np.nonzero(top.row >= 0)
    yield _columns(modality, "top", F, slot, top.row[slot, at], top.value[slot, at])
    if n == 0:
        return
    sample = state.sample
    free = sample.row >= 0
    for rank in range(top.k):
        free &= sample.row != top.row[:, rank : rank + 1]
    value = np.where(free, sample.value, -1)
    order = np.argsort(-value, axis=1, kind="stable")
    count = free.sum(axis=1)
    wanted = np.minimum(count, n)
    j = np.arange(n)
    place = ((j + 0.5) * count[:, None] / np.maximum(wanted, 1)[:, None]).astype(np.int64)
    slot, j = np.nonzero(j < wanted[:, None])
    at = order[slot, place[slot, j]]
    yield _columns(modality, "quantile", F, slot, sample.row[slot, at], sample.value[slot, at])


def choose(
    run: Sweep,
    layout: Layout,
    labels: Mapping[str, tuple[str, ...]],
    directions: Float[Tensor, "F d"],
) -> Examples:
    """All examples, by latent, modality, set and kind."""
    config, F = run.config, run.F
    alive = np.flatnonzero(
        np.any([one.studies_fired > 0 for one in run.modalities.values()] or [np.zeros(F)], axis=0)
    )
    nearest = neighbours(directions, alive, N_NEIGHBOURS)
    set_of = np.array(run.sets, dtype=np.int64)
    group = label_groups([labels.get(study) for study in layout.studies])
    found: list[Examples] = []
    for modality, state in sorted(run.modalities.items()):
        found += _fired(modality, state, F, config.n_quantile)
        if config.n_contrast == 0:
            continue
        cells = run.spool.array(f"cells-{modality}", np.int64)
        own = np.flatnonzero(state.studies_fired)
        contrast = Contrast(
            layout,
            modality,
            cells,
            state.top.row,
            own,
            set_of,
            group,
            nearest,
            config.n_contrast,
            config.seed,
        )
        for kind, (slot, row) in contrast.all():
            zero = np.zeros(len(slot), dtype=np.float32)
            found.append(_columns(modality, kind, F, slot, row, zero))
    if not found:
        return Examples(*(np.zeros(0, dtype=np.int64) for _ in Examples._fields))
    whole = Examples(*(np.concatenate(c) for c in zip(*found, strict=True)))
    order = np.lexsort((whole.rank, whole.kind, whole.set, whole.modality, whole.latent))
    return Examples(*(column[order] for column in whole))


class _Cut(NamedTuple):
    """What examples show, as columns."""

    unit: np.ndarray
    first: np.ndarray
    """Row in the folder."""
    last: np.ndarray
    image: np.ndarray
    length: np.ndarray
    """Values: tokens, or patches of the whole grid."""

    def part(self, own: slice) -> _Cut:
        return _Cut(*(column[own] for column in self))


def _cut(layout: Layout, examples: Examples, starts: np.ndarray, max_tokens: int) -> _Cut:
    """Films whole, texts of at most ``max_tokens`` around the peak."""
    unit = layout.unit[examples.row]
    first, last = starts[unit], starts[unit + 1] - 1
    image = np.isin(examples.modality, [MODALITIES.index(name) for name in IMAGES])
    begin = np.maximum(first, np.minimum(examples.row - max_tokens // 2, last + 1 - max_tokens))
    first = np.where(image, first, begin)
    last = np.where(image, last, np.minimum(last, first + max_tokens - 1))
    length = np.where(image, _grids(layout)[examples.modality].prod(axis=1), last + 1 - first)
    return _Cut(unit, first, last, image, length)


def _grids(layout: Layout) -> np.ndarray:
    return np.array([layout.grid(m) or (0, 0) for m in range(len(MODALITIES))])


def tables(run: Sweep, layout: Layout, examples: Examples, max_tokens: int) -> Iterator[Any]:
    """The examples in chunks of about :data:`CHUNK_VALUES` values; at least one table."""
    starts = layout.unit_starts
    cut = _cut(layout, examples, starts, max_tokens)
    ends = np.cumsum(cut.length)
    bounds = np.searchsorted(
        ends, np.arange(CHUNK_VALUES, ends[-1] if len(ends) else 0, CHUNK_VALUES)
    )
    edges = np.unique(np.concatenate([[0], bounds, [len(cut.length)]]))
    per = max(CHAPTER_CHUNKS, -(-len(edges) // CHAPTERS))
    fired = np.flatnonzero(examples.peak > 0)
    excerpts = Excerpts(
        run.spool,
        run.spooled(),
        starts,
        run.F,
        fired,
        cut.unit[fired].astype(np.int64),
        examples.latent[fired],
        np.append(edges[:-1:per], edges[-1]),
    )
    tabler = _Tabler(layout)
    if len(edges) == 1:
        yield tabler.table(examples, cut, 0, excerpts.chapter(0))
    for n, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        if n % per == 0:
            chapter = excerpts.chapter(n // per)
        own = slice(low, high)
        part = Examples(*(column[own] for column in examples))
        yield tabler.table(part, cut.part(own), low, chapter.between(low, high))


def _spans(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The whole numbers of each span, one span after the other."""
    before = np.cumsum(length) - length
    return np.arange(length.sum()) + np.repeat(first - before, length)


class _Tabler:
    """Makes tables of examples; names are looked up once."""

    def __init__(self, layout: Layout) -> None:
        import pyarrow as pa

        self.layout, self.grids = layout, _grids(layout)
        self.sequences = np.array(layout.sequences, dtype=np.int64)
        views = [name if name in IMAGES else None for name in MODALITIES]
        lists = {
            "modality": MODALITIES,
            "kind": KINDS,
            "set": SETS,
            "study": layout.studies,
            "patient": layout.patients,
            "view": views,
        }
        self.lists = {name: pa.array(values, pa.string()) for name, values in lists.items()}

    def table(self, part: Examples, cut: _Cut, number: int, excerpt: Excerpt) -> Any:
        """Examples whose first has this number, with the activations they hold."""
        import pyarrow as pa

        layout = self.layout
        offsets = np.append(0, np.cumsum(cut.length))
        words = np.flatnonzero(~cut.image)
        n_words = np.where(cut.image, 0, cut.length)
        study = layout.study[part.row]
        sentence = layout.sentence[part.row].astype(np.int16)

        def names(name: str, place: np.ndarray) -> Any:
            return self.lists[name].take(pa.array(place.astype(np.int32)))

        def lists(ends: np.ndarray, values: np.ndarray) -> Any:
            return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))

        return pa.table(
            {
                "latent": part.latent.astype(np.int32),
                "modality": names("modality", part.modality),
                "kind": names("kind", part.kind),
                "set": names("set", part.set),
                "study": names("study", study),
                "patient": names("patient", study),
                "sequence": self.sequences[study],
                "view": names("view", part.modality),
                "first_row": cut.first.astype(np.int64),
                "last_row": cut.last.astype(np.int64),
                "peak_row": part.row.astype(np.int64),
                "peak": part.peak.astype(np.float32),
                "values": lists(offsets, self._values(part, cut, offsets, number, excerpt)),
                "token_ids": lists(
                    np.append(0, np.cumsum(n_words)),
                    layout.token_id[_spans(cut.first[words], cut.length[words])],
                ),
                "sentence": pa.array(sentence, mask=(sentence < 0) | cut.image),
            }
        )

    def _values(
        self, part: Examples, cut: _Cut, offsets: np.ndarray, number: int, excerpt: Excerpt
    ) -> np.ndarray:
        """Zero but for the excerpt; NaN at patches that the harvest did not keep."""
        values = np.zeros(offsets[-1], dtype=np.float32)
        n_rows = cut.last + 1 - cut.first
        some = np.flatnonzero(cut.image & (n_rows < cut.length))
        if len(some):
            values[_spans(offsets[some], cut.length[some])] = np.nan
            rows = _spans(cut.first[some], n_rows[some])
            owner = np.repeat(some, n_rows[some])
            values[offsets[owner] + self._patch(part.modality[owner], rows)] = 0
        own, row = excerpt.example - number, excerpt.row
        place = np.where(cut.image[own], self._patch(part.modality[own], row), row - cut.first[own])
        inside = (row >= cut.first[own]) & (row <= cut.last[own])
        # Cut, not rounded, so that none exceeds the peak.
        short = (excerpt.value.view(np.uint32) & _KEPT).view(np.float32)
        value = np.where(row == part.row[own], excerpt.value, short)
        values[(offsets[own] + place)[inside]] = value[inside]
        return values

    def _patch(self, modality: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Where each row's patch is on its film."""
        layout, columns = self.layout, self.grids[modality, 1]
        return layout.patch_row[row].astype(np.int64) * columns + layout.patch_column[row]
