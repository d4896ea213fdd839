"""What each row of a stream of activations is: its modality, its study, and its stretch of text.

A *unit* is what an example shows: a sentence, one field of the prompt, or a film. Its rows are
contiguous. At 15 bytes a row, the layout of 10M rows takes 150 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from autointerp.features import IMAGES, MODALITIES
from hooks.files import ConfigError
from hooks.roles import NONE, Role, View
from hooks.store import ActivationFolder, StudyRows

PROMPT, REPORT, GENERATED = (MODALITIES.index(name) for name in ("prompt", "report", "generated"))
READ_ROWS = 8192
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Columns ``[n_rows]``, and names by the number of a study in order of the rows."""

    modality: np.ndarray
    """Index in :data:`autointerp.features.MODALITIES`, int8."""
    study: np.ndarray
    """Number of the study, int32; ascending."""
    unit: np.ndarray
    """Number of the unit, int32; ascending."""
    token_id: np.ndarray
    patch_row: np.ndarray
    patch_column: np.ndarray
    sentence: np.ndarray
    studies: list[str]
    patients: list[str]
    sequences: list[int]

    def __len__(self) -> int:
        return len(self.modality)

    @property
    def unit_starts(self) -> np.ndarray:
        """First row of each unit, and the number of rows."""
        first = np.flatnonzero(np.diff(self.unit, prepend=-1))
        return np.append(first, len(self))

    def grid(self, modality: int) -> tuple[int, int] | None:
        """Patch rows and columns of the films of an image modality; ``None`` for text."""
        own = self.modality == modality
        if MODALITIES[modality] not in IMAGES or not own.any():
            return None
        return int(self.patch_row[own].max()) + 1, int(self.patch_column[own].max()) + 1


class Piece(NamedTuple):
    """Rows in order, with what the pass must know of each."""

    x: Float[Tensor, "n d"]
    modality: np.ndarray
    study: np.ndarray

    def part(self, start: int, stop: int) -> Piece:
        """Some of the rows, as views."""
        own = slice(start, stop)
        return Piece(self.x[own], self.modality[own], self.study[own])


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread while the one before is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = worker.submit(next, source, end)
            yield cast(T, item)


def _modalities(role: np.ndarray, view: np.ndarray, generated: bool) -> np.ndarray:
    out = np.full(len(role), PROMPT, dtype=np.int8)
    image = role == int(Role.IMAGE)
    out[image] = np.maximum(view[image], 0)
    written = np.isin(role, [int(Role.REPORT), int(Role.GROUNDING)])
    out[written] = GENERATED if generated else REPORT
    return out


def _layout(
    sequence: np.ndarray,
    position: np.ndarray,
    role: np.ndarray,
    modality: np.ndarray,
    token_id: np.ndarray,
    patch_row: np.ndarray,
    patch_column: np.ndarray,
    sentence: np.ndarray,
    studies: Sequence[str],
    patients: Sequence[str],
) -> Layout:
    """Columns of the token table, and names of the studies in order."""

    def changes(values: np.ndarray) -> np.ndarray:
        return np.diff(values, prepend=values[:1]) != 0

    new_study = changes(sequence)
    begins = new_study | changes(modality)
    begins |= (modality >= REPORT) & changes(sentence)
    apart = changes(role) | (np.diff(position, prepend=position[:1] - 1) != 1)
    begins |= (modality == PROMPT) & apart
    firsts = np.append(0, np.flatnonzero(new_study))
    return Layout(
        modality=modality,
        study=np.cumsum(new_study, dtype=np.int32),
        unit=np.cumsum(begins | (np.arange(len(begins)) == 0), dtype=np.int32) - 1,
        token_id=token_id.astype(np.int32),
        patch_row=patch_row.astype(np.int16),
        patch_column=patch_column.astype(np.int16),
        sentence=sentence.astype(np.int16),
        studies=list(studies),
        patients=list(patients),
        sequences=sequence[firsts].tolist(),
    )


class FolderSource:
    """Rows of a site of an activation folder; a thread reads ahead."""

    def __init__(self, folder: ActivationFolder, site: str, read_rows: int = READ_ROWS) -> None:
        self.folder, self.site, self.read_rows = folder, folder.check_site(site), read_rows
        if folder.n_tokens == 0:
            raise ConfigError(f"{folder.folder} has no rows; harvest studies that can be read")
        generated = any(name.startswith("generations-") for name in folder.manifest["files"])
        names = ("sequence", "position", "token_id", "patch_row", "patch_column", "sentence")
        # One column at a time: together, and as the table has them, they take far more memory.
        columns = {name: self._column(name).fill_null(NONE).to_numpy() for name in names}
        view = self._column("view")
        codes = np.array([int(View[name.upper()]) for name in view.dictionary.to_pylist()])
        place = view.indices.fill_null(NONE).to_numpy()
        role = folder.roles()
        views = np.where(place >= 0, codes[place], NONE).astype(np.int16)
        begins = np.flatnonzero(np.diff(columns["sequence"], prepend=columns["sequence"][0] - 1))
        owners = []
        for name in ("study", "patient"):
            column = self._column(name)
            known = column.dictionary.to_pylist()
            owners.append([known[i] for i in column.indices.to_numpy()[begins]])
        self.layout = _layout(
            role=role,
            modality=_modalities(role, views, generated),
            studies=owners[0],
            patients=owners[1],
            **columns,
        )

    def _column(self, name: str) -> Any:
        return self.folder.tokens([name])[name].combine_chunks()

    def patients(self) -> Sequence[str]:
        """Of all studies that have come, in order; here, of all."""
        return self.layout.patients

    def pieces(self) -> Iterator[Piece]:
        n, layout = self.folder.n_tokens, self.layout
        spans = [(i, min(i + self.read_rows, n)) for i in range(0, n, self.read_rows)]
        yield from ahead(
            Piece(self.folder.rows(self.site, i, j), layout.modality[i:j], layout.study[i:j])
            for i, j in spans
        )


class LiveSource:
    """Rows as a model makes them; the layout is known when all have come."""

    def __init__(self, rows: Iterable[StudyRows], site: str) -> None:
        self.rows, self.site = rows, site
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._owners: list[tuple[str, str]] = []
        self._patients: list[str] = []

    def patients(self) -> Sequence[str]:
        """Of the studies that have come, in order."""
        return self._patients

    def pieces(self) -> Iterator[Piece]:
        for one in self.rows:
            t, number = one.tokens, len(self._owners)
            if len(t) == 0:
                continue
            modality = _modalities(t.role, t.view, one.generation is not None)
            sequence = np.full(len(t), one.sequence)
            self._parts.append(
                (sequence, one.positions, t.role, modality, t.ids, t.row, t.column, t.sentence)
            )
            self._owners.append((one.study, one.patient))
            self._patients.append(one.patient)
            if self.site not in one.activations:
                raise ConfigError(
                    f"rows of study {one.study} have sites {list(one.activations)}, the dictionary "
                    f"reads {self.site!r}; capture that site"
                )
            study = np.full(len(t), number, dtype=np.int32)
            yield Piece(one.activations[self.site], modality, study)

    @property
    def layout(self) -> Layout:
        """Of all rows that came."""
        if not self._parts:
            raise ConfigError("no rows came; give at least one study")
        columns = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        studies, patients = zip(*self._owners, strict=True)
        return _layout(*columns, studies=studies, patients=patients)
