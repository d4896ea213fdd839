"""Does a Matryoshka dictionary absorb less than a BatchTopK one of the same L0?

Both are trained by `sae.train` on planted features (`phantom.planted`), where parents, children
and their directions are known; BatchTopK is a Matryoshka dictionary of a single group. Rates are
those of `phantom.absorption.hierarchy_absorption` on held-out patients, with both thresholds set so
that the mean active latents per held-out row are `k`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phantom.absorption import hierarchy_absorption
from phantom.planted import SITE, Planted, PlantedConfig, plant
from sae import MatryoshkaSAE, TrainConfig, calibrate_threshold, measure, train
from sae.latents import gather

ARMS: Mapping[str, tuple[float, ...]] = {
    "matryoshka": (0.375, 0.625),
    "batchtopk": (1.0,),
}
"""Group fractions by name; the inner Matryoshka group is as large as there are features that are
no other's child."""


@dataclass(frozen=True)
class AbsorptionBench:
    """Sizes of the experiment."""

    planted: PlantedConfig = field(
        default_factory=lambda: PlantedConfig(
            d_model=64,
            n_parents=16,
            children=3,
            n_flat=32,
            parent_rate=0.11,
            child_rate=0.25,
            flat_rate=0.04,
            n_studies=200,
        )
    )
    """4.36 features on in a row."""
    k: int = 4
    """Below the features on, as a budget of latents is: absorption saves one latent for each row
    with a child."""
    expansion: int = 2
    steps: int = 4000
    batch: int = 512
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the planted features, of the dictionary and of the batches."""
    heldout: float = 0.2
    """Share of patients."""

    def quick(self) -> AbsorptionBench:
        """Sizes that show that it runs, and nothing else."""
        planted = replace(self.planted, n_studies=60, rows_per_study=100)
        return replace(self, planted=planted, steps=30, batch=128, seeds=(0, 1))

    def training(self, arm: str, seed: int) -> TrainConfig:
        """How an arm is trained; arms differ in their groups alone."""
        return TrainConfig(
            site=SITE,
            expansion=self.expansion,
            k=self.k,
            group_fractions=ARMS[arm],
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            warmup_steps=100,
            dead_after_tokens=100_000,
            threshold_start=min(500, self.steps // 2),
            threshold_beta=0.99,
            heldout=self.heldout,
            seed=seed,
            checkpoint_every=self.steps,
            measure_every=self.steps,
        )


def run(config: AbsorptionBench, out: Path) -> dict[str, Any]:
    """Train and judge every arm with every seed; what `out` already holds is not trained again.

    Returns:
        `l0` by arm, `mean` and `sd` (over seeds) of the absorption rate by arm, `seeds` with every
        figure of every run, and `ratio`, Matryoshka's mean over BatchTopK's.
    """
    seeds = []
    for seed in config.seeds:
        planted = plant(replace(config.planted, seed=seed), out / f"planted-{seed}")
        row: dict[str, Any] = {"seed": seed}
        for arm in ARMS:
            sae = train(planted.activations, config.training(arm, seed), out / f"{arm}-{seed}")
            row[arm] = judge(sae.cpu(), planted, config)
        seeds.append(row)
    result: dict[str, Any] = {
        "l0": {arm: float(np.mean([row[arm]["l0"] for row in seeds])) for arm in ARMS}
    }
    for arm in ARMS:
        rates = [row[arm]["rate"] for row in seeds]
        sd = float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0
        result[arm] = {"mean": float(np.mean(rates)), "sd": sd}
    base = result["batchtopk"]["mean"]
    result["ratio"] = result["matryoshka"]["mean"] / base if base else None
    return result | {"seeds": seeds}


def judge(sae: MatryoshkaSAE, planted: Planted, config: AbsorptionBench) -> dict[str, float]:
    """Absorption and reconstruction of one dictionary at L0 `k`, on held-out patients."""
    folder = planted.activations
    mask = folder.heldout(config.heldout)
    sae.threshold.fill_(calibrate_threshold(sae, folder, mask, config.k).threshold)
    quality = measure(sae, folder, SITE, mask)
    with torch.no_grad():
        latents = gather(
            sae.encode(folder.rows(SITE, start, min(start + 8192, folder.n_tokens)))
            for start in range(0, folder.n_tokens, 8192)
        )
    found = hierarchy_absorption(
        latents,
        planted.on,
        planted.parents,
        torch.from_numpy(mask),
        directions=sae.W_dec,
        probes=planted.directions,
    )
    pairs = list(found.pairs.values())
    return {
        "rate": found.rate,
        "n": found.n,
        "silent": found.silent,
        "silent_alone": found.silent_alone,
        "parent_auroc": float(np.mean([one.parent_auroc for one in pairs])),
        "child_auroc": float(np.mean([one.child_auroc for one in pairs])),
        "l0": quality.l0,
        "fvu": quality.fvu,
    }
