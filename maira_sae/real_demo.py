"""The demonstration on real parts: towers, a film, reports, and a language model that labels."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autointerp import (
    CollectConfig,
    LabelConfig,
    collect,
    detection_scores,
    label_latents,
    labeller_of,
)
from hooks.files import MairaSaeError, read_json
from hooks.harvest import HarvestConfig, harvest
from hooks.maira2 import load_model
from hooks.processor import Maira2Processor
from hooks.readers import read_openi
from hooks.roles import Role
from hooks.store import ActivationFolder
from hooks.studies import Study
from maira_sae import demo, real_model
from maira_sae.demo import HELDOUT, Demo, fit, loss_recovered, quality
from maira_sae.server import serving
from sae import MatryoshkaSAE, TrainConfig
from sae.maxima import best_latent, study_maxima
from steering import compare, measure_references

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


@dataclass(frozen=True)
class RealDemoConfig:
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
    n_examples: int = 3
    """Sentences of each kind and set that a latent is explained by and scored on."""
    strength: float = 2.0
    """Steering strength in units of the latent's 99th percentile."""
    opening: str = "Findings: The lungs are clear. There is"
    """First words of the steered report: the projector is untrained, so the film gives none."""
    new_tokens: int = 40
    seed: int = 0

    def quick(self) -> RealDemoConfig:
        """Small enough to check the plumbing; its numbers mean nothing."""
        return replace(
            self, n_studies=120, steps=12, batch=1024, n_loss_studies=6, n_labels=2, n_examples=1
        )


class RealDemo(Demo):
    """Real towers, a real film and real reports; see the module docstring."""

    STAGES = ("build", "harvest", "train", "evaluate", "probe", "label", "steer")
    config: RealDemoConfig

    @cached_property
    def studies(self) -> list[Study]:
        """Open-i reports, in file order."""
        return read_openi(real_model.openi_archive(), real_model.film())[: self.config.n_studies]

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
        folder = real_model.build(self.out / "model", self.config.seed)
        parts = read_json(folder / "manifest.json")["parts"]
        return {"model": parts, "site": self.config.site}

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
        return fit(self.activations, config, self.out / "sae")

    def evaluate(self) -> dict[str, Any]:
        folder = self.activations
        studies = [s for s in self.studies if s.split(HELDOUT) == "heldout"]
        studies = studies[: self.config.n_loss_studies]
        loss = loss_recovered(self.model, self.processor, studies, self.sae, folder)
        return {**quality(self.out / "sae", folder), **loss}

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
        out = self.out / "labels"
        few = CollectConfig(c.n_examples, c.n_examples, c.n_examples)
        features = collect(self.sae, self.activations, few, self.out / "features", self.studies)
        config = LabelConfig(tuple(latents[: c.n_labels]))
        with serving(self.out / "model" / "text", self.out / "stages" / "server.log") as endpoint:
            who = labeller_of(endpoint, self.processor.tokenizer, out)
            labels = label_latents(features, who, config, out)
            scores = detection_scores(features, labels, who, self.processor.tokenizer)
        by_latent = {score.latent: score for score in scores}
        return {
            "labels": [
                {
                    **label._asdict(),
                    "balanced_accuracy": by_latent[label.latent].value,
                    "baseline": by_latent[label.latent].baseline,
                }
                if label.latent in by_latent
                else {**label._asdict(), "balanced_accuracy": None, "baseline": None}
                for label in labels
            ]
        }

    def steer(self) -> dict[str, Any]:
        probes = self.results["probe"]["probes"]
        finding = max(probes, key=lambda name: probes[name]["auroc"])
        latent = probes[finding]["latent"]
        c = self.config
        sae = self.sae
        edit = measure_references(sae, self.activations, [latent]).edit(latent, c.strength)
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


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary as tables."""
    demo.show(summary, console)
    table = Table("finding", "latent", "AUROC", "positives", title="Best single latent")
    for finding, probe in summary["probes"].items():
        table.add_row(
            finding, str(probe["latent"]), f"{probe['auroc']:.3f}", str(probe["n_positive"])
        )
    console.print(table)
    demo.show_labels(summary, "Labels (by a 135M model)", console)
    steering = summary["steering"]
    console.print(
        f"[bold]Steering[/] latent {steering['latent']} ({steering['finding']}) by "
        f"{steering['strength']} × p99"
    )
    console.print(f"  before: {steering['before']}", markup=False)
    console.print(f"  after:  {steering['after']}", markup=False)
    demo.show_seconds(summary, console)
