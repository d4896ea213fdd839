"""Training checkpoints: everything the next step depends on, in safetensors and JSON."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.files import atomic_path, file_record, is_sealed, open_sealed, seal

KIND = "sae-checkpoint"
FORMAT_VERSION = 1


class Checkpoint(NamedTuple):
    """State after ``step`` steps; batches are drawn by position, so ``step`` is the position."""

    step: int
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``folder/step_00001000`` and remove older ones once it is sealed."""
    target = folder / f"step_{checkpoint.step:08d}"
    with atomic_path(target / "state.safetensors") as temporary:
        save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, temporary)
    files = {"state.safetensors": file_record(target / "state.safetensors")}
    seal(target, KIND, FORMAT_VERSION, files, step=checkpoint.step)
    for other in folder.glob("step_*"):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sealed checkpoint, or ``None``; unsealed ones are leftovers of a crash."""
    sealed = sorted(path for path in folder.glob("step_*") if is_sealed(path))
    if not sealed:
        return None
    manifest = open_sealed(sealed[-1], KIND, FORMAT_VERSION, "train again")
    tensors = load_file(sealed[-1] / "state.safetensors")
    return Checkpoint(manifest["step"], tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name."""
    state = optimizer.state_dict()["state"]
    return {
        f"adam.{name}.{key}": value
        for index, name in enumerate(names)
        for key, value in state[index].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {
            key.rsplit(".", 1)[1]: value
            for key, value in tensors.items()
            if key.startswith(f"adam.{name}.")
        }
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict(state)
