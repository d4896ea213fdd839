"""Training checkpoints: everything the next step depends on, in safetensors and JSON."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.files import (
    MANIFEST,
    FolderError,
    atomic_path,
    file_record,
    is_sealed,
    open_sealed,
    seal,
    verify,
)

KIND = "sae-checkpoint"
FORMAT_VERSION = 2

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """State after ``step`` steps."""

    step: int
    position: Mapping[str, Any]
    """Where the stream of rows goes on."""
    tensors: Mapping[str, Tensor]


class Restored(NamedTuple):
    """The checkpoint to go on from, and which newer ones were refused, with the reason."""

    checkpoint: Checkpoint | None
    refused: list[str]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """Write ``folder/step_00001000``, then remove all but the newest ``keep`` sealed ones.

    An unsealed folder of the same step, left by a crash, is written over; the manifest comes last.
    """
    target = folder / f"step_{checkpoint.step:08d}"
    with atomic_path(target / "state.safetensors") as temporary:
        save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, temporary)
    files = {"state.safetensors": file_record(target / "state.safetensors")}
    position = dict(checkpoint.position)
    seal(target, KIND, FORMAT_VERSION, files, step=checkpoint.step, position=position)
    sealed = _sealed(folder)
    for path in folder.glob("step_*"):
        if path not in sealed[-keep:] and path.name < target.name:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look whole
            shutil.rmtree(path)


def load_checkpoint(folder: Path) -> Restored:
    """The newest sealed checkpoint whose bytes are those its manifest lists.

    A damaged one is refused and the one before it is taken, saying so in the log and in the
    result. Unsealed ones are leftovers of a crash and do not count.
    """
    refused = []
    for path in reversed(_sealed(folder)):
        try:
            manifest = open_sealed(path, KIND, FORMAT_VERSION, "train again")
            verify(path)
            tensors = load_file(path / "state.safetensors")
            return Restored(Checkpoint(manifest["step"], manifest["position"], tensors), refused)
        except FolderError as error:
            logger.warning("checkpoint refused, the one before it is used: %s", error)
            refused.append(str(error))
    return Restored(None, refused)


def _sealed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if is_sealed(path))
