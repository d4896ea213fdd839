"""Training Matryoshka SAEs on rows of activations: one loop, read top to bottom."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hooks.files import (
    ConfigError,
    FolderError,
    MairaSaeError,
    WriteError,
    is_sealed,
    read_json,
    write_json,
)
from hooks.store import ActivationFolder
from sae.calibrate import calibrate_batches
from sae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sae.display import TrainingDisplay
from sae.loggers import open_loggers
from sae.metrics import measure_by_role
from sae.model import MatryoshkaSAE
from sae.stream import FolderRows, Rows
from sae.trainer import TrainConfig, Trainer

SHARED = ("steps", "batch", "heldout", "seed", "checkpoint_every", "keep_checkpoints")
"""Settings that dictionaries trained in one pass have in common."""


class Interrupted(MairaSaeError):
    """Training stopped on request after saving; running again goes on."""

    resumable = True


def train(
    rows: ActivationFolder | Rows, config: TrainConfig, out: Path, log_to: tuple[str, ...] = ()
) -> MatryoshkaSAE:
    """Train one SAE and write its folder ``out``; returns the saved SAE.

    Running again with the same arguments continues from the last checkpoint, bit for bit on a
    CPU, or returns the finished SAE. ``out/metrics.jsonl`` has a line per step.

    Parameters
    ----------
    rows
        An activation folder, or a stream such as :class:`sae.live.LiveRows`.
    log_to
        ``tensorboard`` and ``wandb`` also get every scalar of ``metrics.jsonl``.

    Raises
    ------
    FolderError
        If ``out`` holds another run, or ``rows`` lacks the site.
    Interrupted
        After SIGTERM, with a checkpoint saved.

    >>> from tempfile import TemporaryDirectory
    >>> from phantom.tour import activations
    >>> config = TrainConfig("llm.3.resid_post", expansion=1, k=4, steps=2, batch=64)
    >>> with TemporaryDirectory() as folder:
    ...     sae = train(activations(), config, Path(folder) / "sae")
    >>> sae.config.n_latents
    128
    """
    return _train(rows, {"": config}, out, log_to)[""]


def train_all(
    rows: ActivationFolder | Rows,
    configs: Mapping[str, TrainConfig],
    out: Path,
    log_to: tuple[str, ...] = (),
) -> dict[str, MatryoshkaSAE]:
    """Train several SAEs (other sites, sizes, k …) in one pass over ``rows``.

    Each goes into ``out/{name}`` and equals, bit for bit on a CPU, what :func:`train` makes of its
    config alone. All share the settings :data:`SHARED`. See :func:`train`.
    """
    if not configs or any(not name or "/" in name for name in configs):
        raise ConfigError(f"SAEs are named {list(configs)}; give each a name that can be a folder")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        for key in SHARED:
            asked, common = getattr(config, key), getattr(first, key)
            if asked != common:
                raise ConfigError(
                    f"SAE {name!r} has {key} {asked!r}, the first one {common!r}; dictionaries "
                    "trained in one pass share it"
                )
    return _train(rows, configs, out, log_to)


def _train(
    source: ActivationFolder | Rows,
    configs: Mapping[str, TrainConfig],
    out: Path,
    log_to: tuple[str, ...],
) -> dict[str, MatryoshkaSAE]:
    shared = next(iter(configs.values()))
    folder = isinstance(source, ActivationFolder)
    rows: Rows = FolderRows(source, shared.heldout) if folder else source
    folders = {name: out / name for name in configs}
    moments = {name: rows.moments(config.site) for name, config in configs.items()}
    leader = not _distributed() or dist.get_rank() == 0
    settings = {name: asdict(config) for name, config in configs.items()}
    record = {"train": settings.get("", settings), "activations": rows.record()}
    _refuse_another(out, record)
    if all(is_sealed(folder) for folder in folders.values()):
        return {name: MatryoshkaSAE.from_pretrained(path) for name, path in folders.items()}

    device = _device()
    trainers = {
        name: Trainer(config, moments[name], rows.policy, rows.model, device)
        for name, config in configs.items()
    }
    _claim(out, record, leader)  # after all that can refuse a setting, so that nothing is left
    start, position = _restore(out, trainers, leader)
    if leader:
        for path in folders.values():
            _trim_metrics(path / "metrics.jsonl", start)
    sites = list(dict.fromkeys(config.site for config in configs.values()))
    sample = list(rows.heldout(sites, max(c.measure_rows for c in configs.values())))
    batches = rows.batches(sites, shared.batch, shared.seed, position)
    began = time.perf_counter()
    with (
        _stop_requested() as stop,
        open_loggers(log_to if leader else (), out) as loggers,
        TrainingDisplay(start, shared.steps, leader) as display,
    ):
        for step in range(start, shared.steps):
            batch = next(batches)
            for name, trainer in trainers.items():
                config = configs[name]
                line = trainer.step(batch.x[config.site], batch.roles, step)
                line["seconds"] = time.perf_counter() - began
                if (step + 1) % config.measure_every == 0 or step + 1 == shared.steps:
                    line |= _measured(trainer, config, sample)
                if leader:
                    _append(folders[name] / "metrics.jsonl", line)
                    for logger in loggers:
                        logger.write(name, line)
                display.update(name, line)
            stopping = stop()
            if stopping or (step + 1) % shared.checkpoint_every == 0:
                _checkpoint(out, step + 1, batch.position, trainers, shared, leader)
            if stopping and step + 1 < shared.steps:
                raise Interrupted(
                    f"stopped by a signal after step {step + 1} of {shared.steps}, which is saved "
                    f"in {out}; run the same command again to go on"
                )
    return {
        name: _finish(trainer, configs[name], rows, folders[name], leader)
        for name, trainer in trainers.items()
    }


def training_curve(out: Path) -> list[dict[str, float]]:
    """``tokens``, ``fvu`` and ``l0`` of each held-out measurement, in order."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {"tokens": line["tokens"], "fvu": line["heldout_fvu"], "l0": line["heldout_l0"]}
        for line in lines
        if "heldout_fvu" in line
    ]


def _measured(trainer: Trainer, config: TrainConfig, sample: list[Any]) -> dict[str, Any]:
    """Quality on the sample of held-out rows, overall and by role."""
    every, roles = measure_by_role(trainer.raw(), config.site, sample, config.measure_rows)
    return {
        "heldout_fvu": every.fvu,
        "heldout_l0": every.l0,
        "heldout_roles": {name: {"fvu": q.fvu, "l0": q.l0} for name, q in roles.items()},
    }


def _finish(
    trainer: Trainer, config: TrainConfig, rows: Rows, folder: Path, leader: bool
) -> MatryoshkaSAE:
    """Calibrate, measure on every held-out row, and write the SAE folder."""
    raw = trainer.raw()
    record: dict[str, Any] = {"tokens": config.steps * config.batch}
    record["kernels"] = trainer.ranks.kernels.name
    if config.calibration_rows and config.activation == "batch_topk":
        batches = rows.batches([config.site], config.batch, config.seed, {})
        sample = list(islice(batches, -(-config.calibration_rows // config.batch)))
        overall, roles = calibrate_batches(raw, sample, config.k)
        raw.threshold.fill_(overall.threshold)
        record["calibration"] = {
            **overall._asdict(),
            "by_role": {name: one._asdict() for name, one in roles.items()},
        }
    every, roles = measure_by_role(raw, config.site, rows.heldout([config.site]))
    record["heldout"] = every.summary()
    record["heldout_roles"] = {name: quality.summary() for name, quality in roles.items()}
    if leader:
        raw.save(folder, record)
    if _distributed():
        dist.barrier()
    return raw.eval()


def _refuse_another(out: Path, record: Mapping[str, Any]) -> None:
    """Refuse ``out`` if it is another run's."""
    record = json.loads(json.dumps(record))
    path = out / "train.json"
    if path.is_file():
        found = read_json(path)
        for section in record:
            for key in {**found[section], **record[section]}:
                asked, there = record[section].get(key), found[section].get(key)
                if asked != there:
                    raise FolderError(
                        f"{out} holds another run: {key} is {there!r}, asked was {asked!r}; "
                        "give a new folder, or delete this one"
                    )


def _claim(out: Path, record: Mapping[str, Any], leader: bool) -> None:
    """Make ``out`` this run's."""
    path = out / "train.json"
    if _distributed():
        dist.barrier()
    if leader and not path.is_file():
        write_json(path, record)


def _checkpoint(
    out: Path,
    step: int,
    position: Mapping[str, int],
    trainers: Mapping[str, Trainer],
    config: TrainConfig,
    leader: bool,
) -> None:
    tensors = {
        f"{name}/{key}": tensor
        for name, trainer in trainers.items()
        for key, tensor in trainer.tensors().items()
    }
    if leader:
        checkpoint = Checkpoint(step, position, tensors)
        save_checkpoint(out / "checkpoints", checkpoint, config.keep_checkpoints)


def _restore(
    out: Path, trainers: Mapping[str, Trainer], leader: bool
) -> tuple[int, Mapping[str, int]]:
    """Load the newest good checkpoint; returns the step and the position to go on with."""
    checkpoint, refused = load_checkpoint(out / "checkpoints")
    if refused and leader:
        _append(out / "events.jsonl", {"refused_checkpoints": refused, "time": time.time()})
    if checkpoint is None:
        return 0, {}
    for name, trainer in trainers.items():
        own = f"{name}/"
        trainer.restore(
            {k.removeprefix(own): t for k, t in checkpoint.tensors.items() if k.startswith(own)}
        )
    return checkpoint.step, checkpoint.position


def _trim_metrics(path: Path, step: int) -> None:
    """Drop lines after ``step``, and a torn last line, left by a run that was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept))


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
    except OSError as error:
        raise WriteError(
            f"{path} could not be written ({error}); make room, then run the same command again"
        ) from error


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(
        "cuda", dist.get_rank() % torch.cuda.device_count() if _distributed() else 0
    )


@contextmanager
def _stop_requested() -> Iterator[Any]:
    """Yield a function that tells whether SIGTERM came, to this rank or another."""
    asked = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set()) if here else None

    def stop() -> bool:
        if not _distributed():
            return asked.is_set()
        flag = torch.tensor(int(asked.is_set()))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    try:
        yield stop
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)
