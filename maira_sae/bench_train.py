"""`maira-sae bench train`: a whole training step of ours beside those of other libraries.

Every trainer runs in a process of its own, on the same batches from disk, and they take turns of a
few steps, so that all see the same load. Peers run in the environment that `make peers` builds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from hooks.files import ConfigError, MairaSaeError
from hooks.progress import track
from maira_sae.peers import Worker
from sae.model import group_sizes_of

WORKER = Path(__file__).with_name("bench_worker.py")
OURS = ("maira_sae", "dense")
PEERS = ("sae_lens", "dictionary_learning")
POOL = 16
"""Different batches; training goes round them."""
TURN = 5
"""Steps a trainer runs before the next one has its turn."""


@dataclass(frozen=True)
class StepShape:
    """A training step's sizes."""

    d_model: int = 512
    latents: int = 8192
    k: int = 32
    batch: int = 2048
    threads: int = 2

    @property
    def groups(self) -> tuple[int, ...]:
        return group_sizes_of(self.latents)

    def batches(self) -> Float[Tensor, "pool batch d"]:
        """Sums of ``k / 2`` of ``2 F`` hidden directions a token, a little noise, norm² near d."""
        generator = torch.Generator().manual_seed(0)
        active = max(1, self.k // 2)
        hidden = torch.randn(2 * self.latents, self.d_model, generator=generator)
        chance = 1 / torch.arange(20, 20 + 2 * self.latents)
        pool = torch.empty(POOL, self.batch, self.d_model)
        for x in pool:
            n = self.batch * active
            index = torch.multinomial(chance, n, replacement=True, generator=generator)
            size = torch.rand(n, generator=generator) + 0.5
            x.copy_(
                torch.nn.functional.embedding_bag(
                    index.view(self.batch, active),
                    hidden,
                    mode="sum",
                    per_sample_weights=size.view(self.batch, active),
                )
            )
            x += 0.1 * torch.randn(x.shape, generator=generator)
            x *= self.d_model**0.5 / x.norm(dim=1).mean()
        return pool


class Trainer:
    """A trainer's process."""

    def __init__(self, name: str, python: str, batches: Path, shape: Mapping[str, Any]) -> None:
        self.name = name
        self._worker = Worker(
            [python, "-W", "ignore", str(WORKER), name, str(batches), json.dumps(shape)],
            {
                # Threads that spin while they wait take the other trainers' time on a busy machine.
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                "HF_HUB_OFFLINE": "1",
                # This library is importable by its own trainers, and stays out of the peers' way.
                "PYTHONPATH": str(WORKER.parents[1]) if name in OURS else "",
            },
        )

    def ask(self, steps: int) -> dict[str, Any]:
        """Train so many steps, or stop and tell the peak memory if it is 0."""
        answer = self._worker.ask(str(steps))
        if answer is None:
            raise MairaSaeError(
                f"trainer {self.name!r} failed: {self._worker.said}; leave it out with --peers, "
                "or rebuild its environment with `make peers`"
            )
        return answer

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def compare(
    shape: StepShape, names: tuple[str, ...], steps: int, peers_python: str | None
) -> dict[str, Any]:
    """Train with every named trainer for ``steps`` steps; rates are medians over steps.

    Raises
    ------
    ConfigError
        If a name is unknown, or a peer is asked for and there is no environment for it.
    MairaSaeError
        If a trainer fails; the text has the end of what it said.
    """
    for name in names:
        if name not in (*OURS, *PEERS):
            raise ConfigError(f"unknown trainer {name!r}; there are {(*OURS, *PEERS)}")
        if name in PEERS and (peers_python is None or not Path(peers_python).is_file()):
            raise ConfigError(
                f"{name} needs its own environment, there is none at {peers_python}; build it "
                "with `make peers`, or leave --peers out"
            )
    settings = {**asdict(shape), "groups": list(shape.groups)}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    peak = {}
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "batches.safetensors"
        save_file({"x": shape.batches()}, path)
        trainers = [
            Trainer(name, sys.executable if name in OURS else str(peers_python), path, settings)
            for name in names
        ]
        try:
            for begin in track(range(0, steps, TURN), "bench train", total=-(-steps // TURN)):
                for trainer in trainers:
                    answer = trainer.ask(min(TURN, steps - begin))
                    seconds[trainer.name] += answer["seconds"]
                    losses[trainer.name] += answer["losses"]
            for trainer in trainers:
                peak[trainer.name] = round(trainer.ask(0)["peak_mb"], 1)
        finally:
            for trainer in trainers:
                trainer.close()
    warm = min(2 * TURN, steps // 2)
    return {
        "tokens_per_s": {n: round(shape.batch / median(s[warm:])) for n, s in seconds.items()},
        "best_tokens_per_s": {n: round(shape.batch / min(s[warm:])) for n, s in seconds.items()},
        "peak_mb": peak,
        f"loss_{steps}": {n: sum(x[-TURN:]) / len(x[-TURN:]) for n, x in losses.items()},
        "config": {**settings, "steps": steps},
    }


def table(result: Mapping[str, Any]) -> str:
    """The comparison as text, with ratios to ours."""
    speed, best, peak = (result[k] for k in ("tokens_per_s", "best_tokens_per_s", "peak_mb"))
    (loss,) = (value for key, value in result.items() if key.startswith("loss_"))
    shape = result["config"]
    lines = [
        f"{shape['d_model']} wide, {shape['latents']} latents in {len(shape['groups'])} groups, k "
        f"{shape['k']}, batch {shape['batch']}, {shape['threads']} threads, {shape['steps']} steps",
        f"{'':20}{'tokens/s':>10}{'best':>10}{'ours is':>10}{'peak MB':>10}{'ours has':>10}"
        f"{'loss':>12}",
    ]
    for name in speed:
        ratio = f"{speed['maira_sae'] / speed[name]:.2f}×"
        memory = f"{peak['maira_sae'] / peak[name]:.2f}×"
        # Peers sum over dimensions or groups where we take means: their losses are their own.
        shown = f"{loss[name]:12.5f}" if name in OURS else f"{'(other scale)':>14}"
        lines.append(
            f"{name:20}{speed[name]:10,}{best[name]:10,}{ratio:>10}{peak[name]:10,.0f}"
            f"{memory:>10}{shown}"
        )
    return "\n".join(lines)
