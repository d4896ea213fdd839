"""The label folder: what each latent was named, by whom, and how sure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hooks.files import atomic_path, file_record, open_sealed, seal

KIND = "labels"
FORMAT_VERSION = 3
LABELS = "labels.jsonl"
REMEDY = "run `maira-sae label` to make it"


class Label(NamedTuple):
    """A latent's label, or ``None`` for "no clear concept"."""

    latent: int
    label: str | None
    explainer: str
    """What the explainer saw, see :data:`autointerp.label_config.Explainer`."""
    model: str
    """Name at the endpoint; ``statistics`` where none was asked."""
    confidence: float | None
    """As the explainer says it; ``None`` where it does not."""
    modality: str
    """Of the examples shown."""
    reference: float
    """99th percentile where it fires most often, the unit of steering strength."""
    threshold: float = 0.0
    """Activation above which the label holds (:mod:`autointerp.operating`); 0: any firing."""
    fit: float | None = None
    """Balanced accuracy of the label above the threshold on the explaining patients, who chose it;
    ``None`` where no threshold was chosen."""


def write_labels(labels: Sequence[Label], out: Path) -> None:
    """Write ``labels.jsonl`` beside ``config.json`` and seal the folder."""
    with atomic_path(out / LABELS) as temporary:
        temporary.write_text("".join(json.dumps(label._asdict()) + "\n" for label in labels))
    names = ("config.json", LABELS)
    seal(out, KIND, FORMAT_VERSION, {name: file_record(out / name) for name in names})


def read_labels(folder: Path) -> list[Label]:
    """Labels of a finished folder."""
    open_sealed(folder, KIND, FORMAT_VERSION, REMEDY)
    return [Label(**json.loads(line)) for line in (folder / LABELS).read_text().splitlines()]
