"""Every latent's statistics and examples in one pass over the rows, by modality.

The pass reads each row once and encodes it once. Statistics run along; the non-zero activations go
to an unnamed temporary file (8 bytes each) from which the chosen examples are read back in one
walk. Memory is bounded by the dictionary, the examples asked for, and some 30 bytes a row; it holds
no activations but those of the studies being read.

The rows are encoded in blocks of :data:`~autointerp.sweep.BLOCK_ROWS` however they are read, so the
folder is the same bytes for any size of read. A pass that is killed leaves no folder, and starts
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.examples import NAMED, choose, tables
from autointerp.features import FORMAT_VERSION, IMAGES, KIND, MODALITIES, SETS, Features
from autointerp.layout import READ_ROWS, FolderSource, Layout, LiveSource, ahead
from autointerp.size import CollectSize, estimate
from autointerp.sweep import BLOCK_ROWS, PerModality, Spool, Sweep, blocks
from hooks.files import (
    ConfigError,
    FolderError,
    atomic_folder,
    file_record,
    fingerprint,
    is_sealed,
    seal,
    write_json,
)
from hooks.progress import track
from hooks.store import ActivationFolder, StudyRows
from hooks.studies import Study, split_of
from sae.model import MatryoshkaSAE


@dataclass(frozen=True)
class CollectConfig:
    """How many examples of each latent, in each modality and set."""

    n_top: int = 8
    """Strongest sentences or films, one a study."""
    n_quantile: int = 8
    """Spread evenly over the ranks of all studies in which it fires, none of them a top one."""
    n_contrast: int = 4
    """Silent ones of each of four kinds."""
    score: float = 0.15
    """Share of patients whose examples score labels. With ``steer`` it takes the held-out side of
    :func:`hooks.studies.split_of` from 0.2 on downwards, so neither is trained on by default."""
    steer: float = 0.05
    """Share of patients for steering; the others explain."""
    max_tokens: int = 48
    """A longer text is cut around its peak; a film never is."""
    dense: float = 0.2
    """A latent that fires on more than this share of the text rows, or of the image rows, is
    dense."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_top", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_quantile", "n_contrast"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not (self.score > 0 and self.steer >= 0 and self.score + self.steer < 1):
            raise ConfigError(
                f"score is {self.score} and steer {self.steer}; they are shares of patients whose "
                "sum is below 1"
            )
        if not 0 < self.dense <= 1:
            raise ConfigError(f"dense is {self.dense}; it is a share in (0, 1]")

    def set_of(self, patient: str) -> int:
        """Index in :data:`autointerp.features.SETS`; the same in every run."""
        if split_of(patient, self.steer) == "heldout":
            return SETS.index("steer")
        scores = split_of(patient, self.steer + self.score) == "heldout"
        return SETS.index("score" if scores else "explain")


def collect(
    sae: MatryoshkaSAE,
    source: ActivationFolder | Iterable[StudyRows],
    config: CollectConfig | None,
    out: Path,
    studies: Iterable[Study] = (),
    read_rows: int = READ_ROWS,
    before: Callable[[CollectSize], None] = CollectSize.check_room,
) -> Features:
    """Statistics and examples of every latent, as the folder ``out``.

    Parameters
    ----------
    source
        A folder, or rows as a model makes them: one :class:`~hooks.store.StudyRows` a study.
    studies
        For their labels; without them there are no examples of kind ``same_finding_absent``.
    read_rows
        Rows read at a time; no effect on the result.
    before
        Called with the size on the disk, before the pass over a folder, and before live rows'
        examples are written. By default it refuses what the disk cannot hold.

    Raises
    ------
    ConfigError
        If an activation is not finite, or the disk cannot hold the result.
    FolderError
        If ``out`` holds anything but this very result, or the folder lacks the dictionary's site.

    >>> from tempfile import TemporaryDirectory
    >>> from phantom.tour import activations, dictionary, studies
    >>> with TemporaryDirectory() as folder:
    ...     found = collect(dictionary(), activations(), None, Path(folder) / "f", studies())
    ...     found.n_latents, found.site
    (256, 'llm.3.resid_post')
    """
    config = config or CollectConfig()
    labels = {study.id: study.labels for study in studies}
    record: dict[str, Any] = {
        "config": asdict(config),
        "site": sae.config.site,
        "n_latents": sae.config.n_latents,
        "dictionary_sha256": digest_of(sae),
        "labels_sha256": fingerprint(sorted((k, sorted(v)) for k, v in labels.items())),
    }
    if isinstance(source, ActivationFolder):
        source.check_trained(sae.config.policy)
        parts = {n: f["sha256"] for n, f in source.manifest["files"].items()}
        record |= {"model": source.manifest["model"], "rows_sha256": fingerprint(parts)}
        if is_sealed(out):
            found = Features.open(out)
            if any(found.manifest.get(key) != value for key, value in record.items()):
                raise FolderError(f"{out} holds other features; give a new folder, or delete this")
            return found
        rows: FolderSource | LiveSource = FolderSource(source, sae.config.site, read_rows)
        n_blocks = -(-source.n_tokens // BLOCK_ROWS)
    else:
        rows, n_blocks = LiveSource(source, sae.config.site), None
        record |= {"model": dict(sae.config.model)}
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, FolderSource):
        n_active = sae.config.k * len(rows.layout)
        before(estimate(rows.layout, sae.config.n_latents, n_active, config, out))
    with Spool(out.parent) as spool, Sweep(sae, config, spool) as run:
        for block in track(blocks(run.known(rows)), "collect", total=n_blocks):
            run.add(block)
        run.finish()
        layout = rows.layout
        if isinstance(rows, LiveSource):
            before(estimate(layout, run.F, run.n_active, config, out))
        with atomic_folder(out) as temporary:
            _write(temporary, run, layout, labels, sae, config, record)
    return Features.open(out)


def digest_of(sae: MatryoshkaSAE) -> str:
    """SHA-256 of a dictionary's tensors, as the manifest of its features has it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def _write(
    folder: Path,
    run: Sweep,
    layout: Layout,
    labels: dict[str, tuple[str, ...]],
    sae: MatryoshkaSAE,
    config: CollectConfig,
    record: dict[str, Any],
) -> None:
    import pyarrow.parquet as pq

    present = np.unique(layout.modality).tolist()
    write_json(folder / "config.json", record["config"])
    pq.write_table(_latents_table(run, layout, present, config), folder / "latents.parquet")
    examples = choose(run, layout, labels, sae.W_dec.detach())
    writer: pq.ParquetWriter | None = None
    for table in ahead(tables(run, layout, examples, config.max_tokens)):
        writer = writer or pq.ParquetWriter(
            folder / "examples.parquet",
            table.schema,
            compression="zstd",
            use_dictionary=NAMED,  # pyright: ignore[reportArgumentType]
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()
    names = ("config.json", "latents.parquet", "examples.parquet")
    grids = {MODALITIES[m]: layout.grid(m) for m in present if MODALITIES[m] in IMAGES}
    counts = np.bincount(np.array(run.sets), minlength=len(SETS)).tolist()
    seal(
        folder,
        KIND,
        FORMAT_VERSION,
        {name: file_record(folder / name) for name in names},
        **record,
        n_rows=len(layout),
        n_studies=len(layout.studies),
        studies_by_set=dict(zip(SETS, counts, strict=True)),
        modalities=[MODALITIES[m] for m in present],
        grids=grids,
        n_examples=len(examples.latent),
    )


def _latents_table(run: Sweep, layout: Layout, present: list[int], config: CollectConfig) -> Any:
    import pyarrow as pa

    F = run.F
    n_rows = np.bincount(layout.modality, minlength=len(MODALITIES))
    columns: dict[str, list[np.ndarray]] = {}
    groups = {True: np.zeros((2, F)), False: np.zeros((2, F))}
    for modality in present:
        state = run.modalities.get(modality) or PerModality(F, config, 1.0)
        sketch, total = state.sketch, int(n_rows[modality])
        count = sketch.count
        rows = groups[MODALITIES[modality] in IMAGES]
        rows += np.stack([count, np.full(F, total)])
        own = layout.study[layout.modality == modality]
        found = {
            "n_rows": np.full(F, total),
            "n_fired": count,
            "rate": count / total,
            "mean": sketch.total / total,
            "mean_fired": sketch.total / np.maximum(count, 1),
            "max": sketch.max.astype(np.float64),
            **{f"p{q}": sketch.quantile(q / 100) for q in (50, 90, 99)},
            "n_studies": np.full(F, len(np.unique(own))),
            "n_studies_fired": state.studies_fired,
        }
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    dense = np.zeros(F, dtype=bool)
    for fired, total in groups.values():
        dense |= fired > config.dense * total
    names = pa.array([MODALITIES[m] for m in present])
    codes = np.tile(np.arange(len(present), dtype=np.int8), F)
    table = {
        "latent": np.repeat(np.arange(F), len(present)),
        "modality": pa.DictionaryArray.from_arrays(pa.array(codes), names).cast(pa.string()),
        **{name: np.stack(arrays, axis=1).ravel() for name, arrays in columns.items()},
        "dense": np.repeat(dense, len(present)),
    }
    return pa.table(table)
