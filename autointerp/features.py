"""The features folder: what every latent fires on, by modality, with examples of patients.

``latents.parquet``
    one row per latent and modality: rates, means and quantiles (:class:`Stats`)
``examples.parquet``
    one row per example, ordered by latent (:class:`Example`)
``config.json``, ``manifest.json``
    how it was made; the manifest is written last

:func:`autointerp.collect.collect` writes it. Labels, scores, pages and notebooks read it, and never
the activations again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from hooks.files import ConfigError, nearest, open_sealed
from hooks.html import bars, facts, picture

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "features"
FORMAT_VERSION = 1
REMEDY = "run `maira-sae collect` to make it"
MODALITIES = ("frontal", "lateral", "prior", "prompt", "report", "generated")
"""Patches of the three films, words of the prompt, of the report, and of one the model wrote."""
IMAGES = MODALITIES[:3]
KINDS = (
    "top",
    "quantile",
    "same_finding_absent",
    "neighbour",
    "same_region",
    "random_silent",
)
"""How an example was chosen; in the last four the latent is silent in the whole study, in that
modality."""
SILENT = KINDS[2:]
SETS = ("explain", "score", "steer")
"""Disjoint by patient: what explains a latent neither scores its label nor steers."""
NAMES = {"modality": MODALITIES, "kind": KINDS, "set": SETS}


class Stats(NamedTuple):
    """How a latent fires on the rows of one modality."""

    n_rows: int
    """Rows of the modality."""
    n_fired: int
    """Rows on which the latent is above zero."""
    rate: float
    """Their share."""
    mean: float
    """Over all rows, zeros included."""
    mean_fired: float
    """Over the rows on which it fires; 0 where there are none, as are all below."""
    max: float
    p50: float
    """Quantiles of the values that fired, within :data:`autointerp.tally.RESOLUTION` of exact."""
    p90: float
    p99: float
    n_studies: int
    """Studies with rows of the modality."""
    n_studies_fired: int
    """Studies in which the latent fires on at least one of them."""


class Example(NamedTuple):
    """A sentence, or a film, with the latent's activation on each token or patch."""

    latent: int
    modality: str
    kind: str
    set: str
    study: str
    patient: str
    sequence: int
    """Number of the study in the harvest."""
    view: str | None
    """``frontal``, ``lateral`` or ``prior``; ``None`` for text."""
    sentence: int | None
    """Index of the sentence in its report; ``None`` for films and prompts."""
    token_ids: list[int]
    """Of the text; empty for a film."""
    values: list[float]
    """One per token; of a film the whole patch map, row by row, NaN at patches that the harvest
    did not keep."""
    peak: float
    """Largest value; 0 where the latent is silent."""
    peak_row: int
    """Row of the activation folder with the peak. In silent examples the row that it is about:
    the neighbour's peak, the same word, the same patch."""
    rows: tuple[int, int]
    """First and last row in the activation folder."""
    patch_shape: tuple[int, int] | None
    """Patch rows and columns of a film; ``None`` for text."""

    def __repr__(self) -> str:
        shape = self.patch_shape
        size = f"{shape[0]}×{shape[1]} patches" if shape else f"{len(self.token_ids)} tokens"
        return (
            f"Example(latent {self.latent}, {self.kind} of {self.modality}, study {self.study!r}, "
            f"{size}, peak {self.peak:.4g})"
        )

    def _repr_html_(self) -> str:
        """The patch map in shades of grey, or the activation of every token."""
        if self.patch_shape is None:
            return bars(self.values, [str(i) for i in self.token_ids], f"{self!r}, by token id")
        values = np.nan_to_num(np.array(self.values, dtype=float)).reshape(self.patch_shape)
        grey = np.rint(255 * values / max(self.peak, 1e-9)).clip(0, 255).astype(np.uint8)
        heat = Image.fromarray(grey).resize((160, 160), Image.Resampling.NEAREST)
        return picture(heat, repr(self))

    @property
    def peak_index(self) -> int:
        """Where :attr:`peak_row` is among :attr:`values`, of text and of whole films."""
        return self.peak_row - self.rows[0]


class Features:
    """A finished features folder.

    Raises
    ------
    FolderError
        If the folder is missing, unfinished, damaged, or of another format version.
    """

    def __init__(self, folder: Path | str) -> None:
        import pyarrow.parquet as pq

        self.folder = Path(folder)
        self.manifest = open_sealed(self.folder, KIND, FORMAT_VERSION, REMEDY)
        self.n_latents: int = self.manifest["n_latents"]
        self.site: str = self.manifest["site"]
        self.modalities: tuple[str, ...] = tuple(self.manifest["modalities"])
        """Those of which the harvest kept rows."""
        self._latents = pq.read_table(self.folder / "latents.parquet")
        self._columns = {
            name: self._latents[name].to_numpy() for name in (*Stats._fields, "latent", "dense")
        }
        self._file = pq.ParquetFile(self.folder / "examples.parquet", memory_map=True)
        metadata = self._file.metadata
        column = self._file.schema_arrow.get_field_index("latent")
        groups = [metadata.row_group(i).column(column) for i in range(metadata.num_row_groups)]
        self._first = np.array([group.statistics.min for group in groups], dtype=np.int64)
        self._last = np.array([group.statistics.max for group in groups], dtype=np.int64)
        self._group = lru_cache(maxsize=4)(self._file.read_row_group)
        self._of = lru_cache(maxsize=4)(self._read)

    @classmethod
    def open(cls, folder: Path | str) -> Features:
        """The folder, checked."""
        return cls(folder)

    def __repr__(self) -> str:
        return (
            f"Features({self.folder}, site {self.site!r}, {self.n_latents:,} latents, "
            f"{self._file.metadata.num_rows:,} examples)"
        )

    def _repr_html_(self) -> str:
        alive = self.alive()
        dense = sum(self.dense(latent) for latent in range(self.n_latents))
        shown = {
            "folder": self.folder,
            "site": self.site,
            "latents": self.n_latents,
            "fire": len(alive),
            "dense": dense,
            "modalities": self.modalities,
            "examples": self._file.metadata.num_rows,
        }
        rates = self._columns["rate"][self._columns["n_fired"] > 0]
        edges = (0, 1e-4, 1e-3, 1e-2, 1e-1, 1)
        counts = np.histogram(rates, edges)[0].tolist()
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        title = "firing rates, of each latent and modality"
        return facts("Features", shown) + bars(counts, labels, title)

    def _check(self, latent: int) -> int:
        if not 0 <= latent < self.n_latents:
            raise ConfigError(
                f"latent {latent} is outside 0–{self.n_latents - 1} of {self.folder}; "
                "give one of its latents"
            )
        return latent

    def stats(self, latent: int) -> dict[str, Stats]:
        """How a latent fires, by modality."""
        first = self._check(latent) * len(self.modalities)
        return {
            modality: Stats(*(self._columns[name][first + i].item() for name in Stats._fields))
            for i, modality in enumerate(self.modalities)
        }

    def dense(self, latent: int) -> bool:
        """Whether a latent fires on so many rows that it can have no short name."""
        return bool(self._columns["dense"][self._check(latent) * len(self.modalities)])

    def reference(self, latent: int) -> float:
        """99th percentile where it fires most often; the unit of steering strength."""
        return max(self.stats(latent).values(), key=lambda stats: stats.n_fired).p99

    def alive(self) -> list[int]:
        """Latents that fire at all, and are not dense, by the studies in which they fire."""
        shape = (self.n_latents, len(self.modalities))
        fired = self._columns["n_studies_fired"].reshape(shape).max(1)
        dense = self._columns["dense"].reshape(shape)[:, 0]
        order = np.argsort(-fired, kind="stable")
        return order[(fired > 0)[order] & ~dense[order]].tolist()

    def examples(
        self,
        latent: int,
        modality: str | None = None,
        kind: str | None = None,
        set: str | None = None,
    ) -> list[Example]:
        """Examples of a latent, strongest first within a kind; silent ones in the order drawn."""
        self._check(latent)
        asked = {"modality": modality, "kind": kind, "set": set}
        for name, value in asked.items():
            if value is not None and value not in NAMES[name]:
                raise ConfigError(
                    f"{name} {value!r} is unknown{nearest(value, NAMES[name])}; "
                    f"choose from {list(NAMES[name])}"
                )
        return [
            one
            for one in self._of(latent)
            if all(value in (None, getattr(one, name)) for name, value in asked.items())
        ]

    def _read(self, latent: int) -> list[Example]:
        import pyarrow as pa
        import pyarrow.compute as pc

        groups = np.flatnonzero((self._first <= latent) & (latent <= self._last))
        if len(groups) == 0:
            return []
        table = pa.concat_tables([self._group(int(i)) for i in groups])
        own = pc.equal(table["latent"], latent)  # pyright: ignore[reportAttributeAccessIssue]
        return [self._example(row) for row in table.filter(own).to_pylist()]

    def _example(self, row: Mapping[str, Any]) -> Example:
        fields = {name: row[name] for name in Example._fields if name in row}
        grid = self.manifest["grids"].get(row["modality"])
        return Example(
            **fields,
            rows=(row["first_row"], row["last_row"]),
            patch_shape=tuple(grid) if grid else None,
        )

    def table(self, name: str) -> pa.Table:
        """The whole table ``latents`` or ``examples``."""
        if name == "latents":
            return self._latents
        if name == "examples":
            return self._file.read()
        raise ConfigError(f"there is no table {name!r}; ask for 'latents' or 'examples'")
