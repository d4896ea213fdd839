"""Labels and scores as parquet, beside what their latents do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autointerp.features import Features
from autointerp.labels import Label
from autointerp.scores import Score
from hooks.files import FolderError, atomic_folder

LABELS, SCORES = "labels.parquet", "scores.parquet"


def write_parquet(
    features: Features, labels: Sequence[Label], scores: Sequence[Score], out: Path
) -> dict[str, int]:
    """Write ``labels.parquet`` and ``scores.parquet`` into the new folder ``out``.

    A row of labels is a :class:`~autointerp.labels.Label`, whether its latent is dense, and how it
    fires in the label's modality; a row of scores is a :class:`~autointerp.scores.Score`. Neither
    holds anything of a patient.

    Returns
    -------
    dict
        Rows of each.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"latent": pa.int64(), "label": pa.string(), "confidence": pa.float64()}
    kinds |= dict.fromkeys(("explainer", "model", "modality"), pa.string())
    kinds |= {"dense": pa.bool_()}
    kinds |= dict.fromkeys(("reference", "threshold", "fit", "rate", "max"), pa.float64())
    kinds |= dict.fromkeys(("n_fired", "n_studies_fired"), pa.int64())
    measured = {"latent": pa.int64(), "n": pa.int64(), "n_patients": pa.int64()}
    measured |= dict.fromkeys(("scorer", "modality", "about"), pa.string())
    numbers = ("value", "standard_error", "baseline", "auroc", "coverage")
    measured |= dict.fromkeys(numbers, pa.float64())
    with atomic_folder(out) as temporary:
        rows = [_row(features, label) for label in labels]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), temporary / LABELS)
        rows = [asdict(score) for score in scores]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(measured)), temporary / SCORES)
    return {"labels": len(labels), "scores": len(scores)}


def _row(features: Features, label: Label) -> dict[str, Any]:
    stats = features.stats(label.latent).get(label.modality)
    names = ("rate", "max", "n_fired", "n_studies_fired")
    fires = {name: getattr(stats, name) if stats else None for name in names}
    return {**label._asdict(), "dense": features.dense(label.latent), **fires}


def read_parquet(folder: Path) -> tuple[list[Label], list[Score]]:
    """The labels and scores that :func:`write_parquet` wrote."""
    import pyarrow.parquet as pq

    for name in (LABELS, SCORES):
        if not (folder / name).is_file():
            raise FolderError(f"{folder} has no {name}; run `maira-sae export --format parquet`")
    labels = pq.read_table(folder / LABELS, columns=list(Label._fields)).to_pylist()
    scores = pq.read_table(folder / SCORES).to_pylist()
    return [Label(**row) for row in labels], [Score(**row) for row in scores]
