"""The demonstration: real towers, a real film and real reports through the whole pipeline.

Each stage is a folder or a JSON file under ``out``; one that is finished is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from autointerp import LabelConfig, label_latents, reference_activation
from hooks.files import FolderError, MairaSaeError, read_json, versions, write_json
from hooks.harvest import HarvestConfig, harvest
from hooks.maira2 import load_model
from hooks.processor import Maira2Processor
from hooks.prompts import PromptRunner
from hooks.roles import Role
from hooks.store import ActivationFolder
from hooks.studies import Study, read_openi
from maira_sae import real
from maira_sae.server import serving
from sae import MatryoshkaSAE, TrainConfig, train, training_curve
from sae.evaluate import best_latent, cross_entropy, study_maxima
from sae.metrics import measure
from steering import Edit, compare

FINDINGS = (
    "Opacity",
    "Cardiomegaly",
    "Pulmonary Atelectasis",
    "Calcinosis",
    "Calcified Granuloma",
    "Cicatrix",
    "Pleural Effusion",
    "Atherosclerosis",
    "Airspace Disease",
    "Catheters, Indwelling",
)
"""The nine commonest MeSH headings that name a finding (not a body part, nor a bare descriptor such
as Markings), and the commonest device."""

HELDOUT = 0.2


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demonstration."""

    n_studies: int = 1_400
    """Open-i reports, in file order."""
    site: str = "llm.15.resid_post"
    """The middle of SmolLM2's 30 layers."""
    batch: int = 2048
    steps: int = 250
    k: int = 30
    expansion: int = 8
    n_loss_studies: int = 40
    """Held-out reports on which cross-entropy is measured."""
    n_labels: int = 5
    n_score: int = 16
    """Held-out sentences a label is scored on."""
    strength: float = 2.0
    """Steering strength in units of the latent's 99th percentile."""
    opening: str = "Findings: The lungs are clear. There is"
    """First words of the steered report: the projector is untrained, so the film gives none."""
    new_tokens: int = 40
    seed: int = 0

    def quick(self) -> DemoConfig:
        """Small enough to check the plumbing; its numbers mean nothing."""
        return replace(
            self, n_studies=120, steps=12, batch=1024, n_loss_studies=6, n_labels=2, n_score=4
        )


class Demo:
    """The stages, each a method that returns what ``summary.json`` needs of it.

    Raises
    ------
    FolderError
        If ``out`` holds a demonstration with other settings.
    """

    STAGES = ("build", "harvest", "train", "evaluate", "probe", "label", "steer")

    def __init__(self, out: Path, config: DemoConfig) -> None:
        path = out / "demo.json"
        if path.is_file() and read_json(path) != asdict(config):
            raise FolderError(f"{out} holds a demo with other settings; give a new folder")
        write_json(path, asdict(config))
        self.out, self.config = out, config
        self.results: dict[str, dict[str, Any]] = {}
        studies = read_openi(real.openi_archive(), real.film())
        self.studies: list[Study] = studies[: config.n_studies]

    def run(self, last: str = "steer") -> dict[str, dict[str, Any]]:
        """Run or resume the stages up to ``last``; returns each one's results."""
        for name in self.STAGES[: self.STAGES.index(last) + 1]:
            self.results[name] = self._stage(name, getattr(self, name))
        return self.results

    def _stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``compute()`` with its seconds, from ``stages/{name}.json`` if it was run before."""
        path = self.out / "stages" / f"{name}.json"
        if not path.is_file():
            began = time.perf_counter()
            result = compute()
            write_json(path, {**result, "seconds": round(time.perf_counter() - began, 1)})
        return read_json(path)

    @property
    def model(self) -> Any:
        return load_model(self.out / "model" / "maira2", dtype=torch.float32)

    @property
    def processor(self) -> Maira2Processor:
        return Maira2Processor.from_pretrained(self.out / "model" / "maira2")

    @property
    def activations(self) -> ActivationFolder:
        return ActivationFolder(self.out / "activations")

    @property
    def sae(self) -> MatryoshkaSAE:
        return MatryoshkaSAE.from_pretrained(self.out / "sae")

    def build(self) -> dict[str, Any]:
        folder = real.build(self.out / "model", self.config.seed)
        return {"model": read_json(folder / "manifest.json")["parts"]}

    def harvest(self) -> dict[str, Any]:
        config = HarvestConfig(
            (self.config.site,), "published", studies_per_part=150, batch_tokens=1024
        )
        out = self.out / "activations"
        rows_before = sum(read_json(path)["rows"] for path in out.glob("part-*.json"))
        began = time.perf_counter()
        folder = harvest(self.model, self.processor, self.studies, config, out)
        seconds = time.perf_counter() - began
        rate = (folder.n_tokens - rows_before) / seconds
        return {"n_tokens": folder.n_tokens, "harvest_tokens_per_s": round(rate)}

    def train(self) -> dict[str, Any]:
        c = self.config
        config = TrainConfig(
            site=c.site,
            expansion=c.expansion,
            k=c.k,
            steps=c.steps,
            batch=c.batch,
            lr=1e-3,
            warmup_steps=min(20, c.steps),
            dead_after_tokens=100_000,
            threshold_start=c.steps // 10,
            threshold_beta=0.98,
            heldout=HELDOUT,
            seed=c.seed,
            checkpoint_every=50,
            measure_every=max(1, c.steps // 8),
        )
        out = self.out / "sae"
        train(self.activations, config, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = torch.tensor([line["seconds"] for line in lines]).diff()
        rate = c.batch / float(steps[steps > 0].median())  # steps < 0 mark a resumed run
        return {"train_tokens_per_s": round(rate), "curve": training_curve(out)}

    def evaluate(self) -> dict[str, Any]:
        folder, sae = self.activations, self.sae
        quality = read_json(self.out / "sae" / "metrics.json")["heldout"]
        every_row = np.ones(folder.n_tokens, dtype=bool)
        everywhere = measure(sae, folder, self.config.site, every_row)
        model = self.model
        runner = PromptRunner(model, self.processor, batch_tokens=1024)
        studies = [s for s in self.studies if s.split(HELDOUT) == "heldout"]
        mean = folder.moments(self.config.site).mean
        loss = cross_entropy(model, runner, studies[: self.config.n_loss_studies], sae, mean)
        return {
            "fvu": quality["fvu"],
            "l0": quality["l0"],
            "dead_fraction": everywhere.dead_fraction,
            "ce_recovered": loss.recovered_zero,
            "ce_recovered_mean_ablation": loss.recovered_mean,
            "cross_entropy": loss._asdict(),
        }

    def probe(self) -> dict[str, Any]:
        maxima = study_maxima(self.sae, self.activations, Role.REPORT)
        by_id = {study.id: study for study in self.studies}
        studies = [by_id[name] for name in maxima.studies]
        heldout = torch.tensor([study.split(HELDOUT) == "heldout" for study in studies])
        probes = {}
        for finding in FINDINGS:
            labels = torch.tensor([finding in study.labels for study in studies])
            if labels[heldout].any() and labels[~heldout].any():
                probes[finding] = best_latent(maxima, labels, heldout)._asdict()
        if not probes:
            raise MairaSaeError("no finding occurs on both sides of the split; use more studies")
        return {"probes": probes}

    def label(self) -> dict[str, Any]:
        probes = self.results["probe"]["probes"]
        latents = list(dict.fromkeys(probe["latent"] for probe in probes.values()))
        c = self.config
        config = LabelConfig(
            tuple(latents[: c.n_labels]), n_score=c.n_score, heldout=HELDOUT, seed=c.seed
        )
        with serving(self.out / "model" / "text", self.out / "stages" / "server.log") as endpoint:
            labels = label_latents(
                self.sae,
                self.activations,
                self.processor.tokenizer,
                endpoint,
                config,
                self.out / "labels",
            )
        return {"labels": [label._asdict() for label in labels]}

    def steer(self) -> dict[str, Any]:
        probes = self.results["probe"]["probes"]
        finding = max(probes, key=lambda name: probes[name]["auroc"])
        latent = probes[finding]["latent"]
        c = self.config
        sae = self.sae
        reference = reference_activation(sae, self.activations, latent)
        edit = Edit(latent, c.strength, reference)
        texts = compare(
            self.model,
            self.processor,
            self.studies[0],
            sae,
            [edit],
            where="all",
            opening=c.opening,
            max_new_tokens=c.new_tokens,
        )
        record = {**texts._asdict(), "finding": finding, "opening": c.opening, **asdict(edit)}
        return {"steering": record}


def run_demo(out: Path, config: DemoConfig) -> dict[str, Any]:
    """Run or resume every stage into ``out`` and write ``out/summary.json``; returns it."""
    stages = Demo(out, config).run()
    summary: dict[str, Any] = {}
    for result in stages.values():
        summary |= {key: value for key, value in result.items() if key != "seconds"}
    summary |= {
        "site": config.site,
        "seconds": {name: result["seconds"] for name, result in stages.items()},
        "versions": versions(),
        "seed": config.seed,
        "config": asdict(config),
    }
    write_json(out / "summary.json", summary)
    return summary


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary as tables."""
    parts = summary["model"]
    console.print(
        f"[bold]MAIRA-2 architecture[/] — vision: {parts['vision']}; projector: "
        f"{parts['projector']}; text: {parts['text']}"
    )
    table = Table("measure", "value", title=f"SAE at {summary['site']}, held-out reports")
    rows = (
        ("tokens harvested", f"{summary['n_tokens']:,}"),
        ("harvest, tokens/s", f"{summary['harvest_tokens_per_s']:,}"),
        ("training, tokens/s", f"{summary['train_tokens_per_s']:,}"),
        ("fraction of variance unexplained", f"{summary['fvu']:.4f}"),
        ("L0", f"{summary['l0']:.1f}"),
        ("dead latents", f"{summary['dead_fraction']:.2%}"),
        ("cross-entropy recovered (zero ablation)", f"{summary['ce_recovered']:.4f}"),
        ("cross-entropy recovered (mean ablation)", f"{summary['ce_recovered_mean_ablation']:.4f}"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    table = Table("finding", "latent", "AUROC", "positives", title="Best single latent")
    for finding, probe in summary["probes"].items():
        table.add_row(
            finding, str(probe["latent"]), f"{probe['auroc']:.3f}", str(probe["n_positive"])
        )
    console.print(table)
    table = Table("latent", "label", "detection", "shuffled", title="Labels (by a 135M model)")
    for label in summary["labels"]:
        scores = (label["balanced_accuracy"], label["baseline"])
        shown = ["–" if score is None else f"{score:.2f}" for score in scores]
        table.add_row(str(label["latent"]), label["label"] or "no clear concept", *shown)
    console.print(table)
    steering = summary["steering"]
    console.print(
        f"[bold]Steering[/] latent {steering['latent']} ({steering['finding']}) by "
        f"{steering['strength']} × p99"
    )
    console.print(f"  before: {steering['before']}", markup=False)
    console.print(f"  after:  {steering['after']}", markup=False)
    total = sum(summary["seconds"].values())
    console.print(f"seconds by stage: {summary['seconds']}, together {total:.0f}", markup=False)
