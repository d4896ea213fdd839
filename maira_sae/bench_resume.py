"""`maira-sae bench resume`: what checkpoints cost, and what a killed run loses."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hooks.store import Moments
from maira_sae.bench_train import POOL, StepShape
from sae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sae.trainer import TrainConfig, Trainer


def measure(shape: StepShape, out: Path, repeats: int = 5) -> dict[str, Any]:
    """Seconds of a step, of writing a checkpoint and of reading one, beside the bare disk.

    ``out`` is on the disk to measure. The checkpoint has weights, both moments and counters.
    """
    torch.set_num_threads(shape.threads)
    pool = shape.batches()
    trainer = _trainer(shape)
    roles = torch.zeros(shape.batch, dtype=torch.int8)
    steps = []
    for number in range(3 * repeats):
        began = time.perf_counter()
        trainer.step(pool[number % POOL], roles, number)
        steps.append(time.perf_counter() - began)
    saves = []
    for number in range(repeats):
        began = time.perf_counter()
        checkpoint = Checkpoint(number + 1, {"batches": number + 1}, trainer.tensors())
        save_checkpoint(out / "checkpoints", checkpoint)
        saves.append(time.perf_counter() - began)
    loads = []
    for _ in range(repeats):
        began = time.perf_counter()
        found = load_checkpoint(out / "checkpoints").checkpoint
        assert found is not None
        _trainer(shape).restore(found.tensors)
        loads.append(time.perf_counter() - began)
    size = sum(p.stat().st_size for p in (out / "checkpoints").rglob("*") if p.is_file()) // 2
    bare = _bare_write(out / "bare", size)
    step, save = median(steps[repeats:]), median(saves)
    return {
        "step_s": step,
        "save_s": save,
        "load_s": median(loads),
        "checkpoint_mb": size / 1e6,
        "bare_write_s": bare,
        "save_over_bare_write": save / bare,
        "share_at_every_1000_steps": save / (1000 * step + save),
        "steps_for_one_percent": round(99 * save / step),
    }


def _trainer(shape: StepShape) -> Trainer:
    config = TrainConfig(
        site="",
        group_sizes=shape.groups,
        k=shape.k,
        batch=shape.batch,
        steps=10**6,
        warmup_steps=1,
    )
    moments = Moments(1, torch.zeros(shape.d_model, dtype=torch.float64), float(shape.d_model))
    return Trainer(config, moments, "", {}, "cpu")


def _bare_write(path: Path, size: int) -> float:
    """Seconds to write and sync as many bytes, the best of three."""
    data = os.urandom(1 << 20) * (size // (1 << 20) + 1)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with path.open("wb") as handle:
            handle.write(data[:size])
            handle.flush()
            os.fsync(handle.fileno())
        seconds.append(time.perf_counter() - began)
        path.unlink()
    return min(seconds)


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    return (
        f"a step takes {result['step_s'] * 1e3:.0f} ms; a checkpoint of "
        f"{result['checkpoint_mb']:.0f} MB {result['save_s'] * 1e3:.0f} ms, its checksum and sync "
        f"included ({result['save_over_bare_write']:.1f} times a bare write); to read and check it "
        f"{result['load_s'] * 1e3:.0f} ms\n"
        f"every 1,000 steps that is {result['share_at_every_1000_steps']:.2%} of the time; 1 % "
        f"would be every {result['steps_for_one_percent']:,} steps, the most a killed run loses"
    )
