"""Training a Matryoshka BatchTopK SAE on an activation folder: one loop, read top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError, FolderError, is_sealed, read_json, write_json
from hooks.progress import track
from hooks.store import ActivationFolder
from sae.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from sae.loss import objective
from sae.metrics import measure
from sae.model import FRACTIONS, MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.stream import ShuffledRows


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, given its activations."""

    site: str
    """Site of the activation folder to train on."""
    expansion: int = 8
    """Dictionary size over activation width."""
    k: int = 32
    """Mean active latents per token."""
    group_fractions: tuple[float, ...] = FRACTIONS
    """Share of the dictionary in each nested group, innermost first."""
    group_weights: tuple[float, ...] = ()
    """Weight of each prefix's loss, scaled to sum 1; empty means equal."""
    steps: int = 10_000
    batch: int = 4096
    """Tokens a step."""
    lr: float | None = None
    """Adam's learning rate; ``None`` means 2e-4 / sqrt(F / 2^14)."""
    warmup_steps: int = 1000
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents used by the auxiliary loss; ``None`` means d / 2."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for this many tokens."""
    threshold_start: int = 1000
    """Step from which the inference threshold follows the smallest active latent."""
    threshold_beta: float = 0.999
    """Its moving average."""
    clip: float = 1.0
    """Largest gradient norm."""
    heldout: float = 0.2
    """Share of patients kept out of training."""
    seed: int = 0
    checkpoint_every: int = 1000
    measure_every: int = 500
    """Steps between measurements on held-out rows."""
    measure_rows: int = 8192
    """Held-out rows in such a measurement."""

    def __post_init__(self) -> None:
        if self.group_weights and len(self.group_weights) != len(self.group_fractions):
            raise ConfigError(
                f"{len(self.group_weights)} group_weights for {len(self.group_fractions)} groups; "
                "give one a group, or none for equal weights"
            )
        positive = ("expansion", "k", "steps", "batch", "checkpoint_every", "measure_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}; it must lie between 0 and 1")

    @property
    def weights(self) -> tuple[float, ...]:
        """Loss weights that sum to 1."""
        weights = self.group_weights or (1.0,) * len(self.group_fractions)
        return tuple(weight / sum(weights) for weight in weights)

    def lr_at(self, step: int, n_latents: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to zero."""
        peak = self.lr if self.lr is not None else 2e-4 / (n_latents / 2**14) ** 0.5
        decay_steps = max(1, int(self.decay_fraction * self.steps))
        rising = (step + 1) / max(1, self.warmup_steps)
        falling = (self.steps - step) / decay_steps
        return peak * min(1.0, rising, falling)


def train(folder: ActivationFolder, config: TrainConfig, out: Path) -> MatryoshkaSAE:
    """Train on ``folder`` and write the SAE folder ``out``; returns the saved SAE.

    Running again with the same arguments continues from the last checkpoint, bit for bit on a
    CPU, or returns the finished SAE. ``out/metrics.jsonl`` has a line per step.

    Raises
    ------
    FolderError
        If ``out`` holds another run, or ``folder`` lacks the site.
    """
    d_model = folder.width(config.site)
    record = json.loads(json.dumps({"train": asdict(config), "activations": _identity(folder)}))
    _claim(out, record)
    if is_sealed(out):
        return MatryoshkaSAE.from_pretrained(out)
    n_latents = config.expansion * d_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moments = folder.moments(config.site)
    scale = (d_model / moments.mean_squared_norm) ** 0.5
    heldout = folder.heldout(config.heldout)
    shape = SAEConfig(
        d_model=d_model,
        n_latents=n_latents,
        k=config.k,
        group_sizes=group_sizes_of(n_latents, config.group_fractions),
        site=config.site,
        policy=folder.manifest["harvest"]["policy"],
        model=folder.manifest["model"],
    )
    sae = MatryoshkaSAE(shape, seed=config.seed).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)
    idle = torch.zeros(n_latents, dtype=torch.int64, device=device)  # tokens since each fired
    start = _restore(out, sae, optimizer, idle)
    _trim_metrics(out, start)
    rows = ShuffledRows(folder, config.site, config.batch, config.seed, ~heldout, position=start)
    sample = _first(heldout, config.measure_rows)
    batches = iter(rows)
    began = time.perf_counter()
    for step in track(range(start, config.steps), "train", total=config.steps - start):
        x = next(batches).to(device) * scale
        if step == 0:
            with torch.no_grad():
                sae.b_dec.copy_(geometric_median(x))
        lr = config.lr_at(step, n_latents)
        for group in optimizer.param_groups:
            group["lr"] = lr
        dead = idle >= config.dead_after_tokens
        result = objective(
            sae, x, dead, config.weights, config.aux_weight, config.aux_k or d_model // 2
        )
        optimizer.zero_grad()
        result.total.backward()
        sae.project_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
        optimizer.step()
        sae.normalize_decoder()

        active = result.latents > 0
        fired = active.any(dim=0)
        idle = torch.where(fired, 0, idle + len(x))
        if step >= config.threshold_start:
            _follow(sae.threshold, result.latents[active].min(), config.threshold_beta)
        line = {
            "step": step + 1,
            "tokens": (step + 1) * config.batch,
            "loss": result.total.item(),
            "group_mse": result.groups.tolist(),
            "auxiliary": result.auxiliary.item(),
            "batch_fvu": _fvu(x, result.reconstruction),
            "batch_l0": active.sum().item() / len(x),
            "dead": int(dead.sum()),
            "threshold": sae.threshold.item(),
            "lr": lr,
            "seconds": time.perf_counter() - began,
        }
        if (step + 1) % config.measure_every == 0 or step + 1 == config.steps:
            quality = measure(sae.folded(scale), folder, config.site, sample)
            line |= {"heldout_fvu": quality.fvu, "heldout_l0": quality.l0}
        _append(out / "metrics.jsonl", line)
        if (step + 1) % config.checkpoint_every == 0:
            _checkpoint(out, step + 1, sae, optimizer, idle)
    raw = sae.folded(scale)
    quality = measure(raw, folder, config.site, heldout)
    raw.save(out, {"heldout": quality.summary(), "tokens": config.steps * config.batch})
    return raw.eval()


def training_curve(out: Path) -> list[dict[str, float]]:
    """``tokens``, ``fvu`` and ``l0`` of each held-out measurement, in order."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {"tokens": line["tokens"], "fvu": line["heldout_fvu"], "l0": line["heldout_l0"]}
        for line in lines
        if "heldout_fvu" in line
    ]


def _identity(folder: ActivationFolder) -> dict[str, Any]:
    """What makes two activation folders the same data."""
    files = folder.manifest["files"]
    return {name: sums["sha256"] for name, sums in files.items() if name.startswith("part-")}


def _claim(out: Path, record: Mapping[str, Any]) -> None:
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
    else:
        write_json(path, record)


def _follow(threshold: Tensor, observed: Tensor, beta: float) -> None:
    """Moving average that starts at its first observation (no bias towards zero)."""
    if threshold == 0:
        threshold.copy_(observed)
    else:
        threshold.mul_(beta).add_(observed * (1 - beta))


def _fvu(x: Tensor, reconstruction: Tensor) -> float:
    return float((x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum())


def _first(mask: np.ndarray, count: int) -> np.ndarray:
    """``mask`` with only its first ``count`` true entries."""
    return mask & (np.cumsum(mask) <= count)


def _names(sae: MatryoshkaSAE) -> list[str]:
    return [name for name, _ in sae.named_parameters()]


def _checkpoint(
    out: Path, step: int, sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, idle: Tensor
) -> None:
    tensors = {f"sae.{name}": value for name, value in sae.state_dict().items()}
    tensors |= optimizer_tensors(optimizer, _names(sae)) | {"idle": idle}
    save_checkpoint(out / "checkpoints", Checkpoint(step, tensors))


def _restore(out: Path, sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, idle: Tensor) -> int:
    """Load the newest checkpoint into its arguments; returns the step to go on with."""
    checkpoint = load_checkpoint(out / "checkpoints")
    if checkpoint is None:
        return 0
    tensors = checkpoint.tensors
    sae.load_state_dict(
        {n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")}
    )
    restore_optimizer(optimizer, _names(sae), tensors)
    idle.copy_(tensors["idle"])
    return checkpoint.step


def _trim_metrics(out: Path, step: int) -> None:
    """Drop lines after ``step``, and a torn last line, left by a run that was killed."""
    path = out / "metrics.jsonl"
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
    with path.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
