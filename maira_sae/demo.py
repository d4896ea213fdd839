"""What both demonstrations share: stages that run once, and dictionaries that are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hooks.files import FolderError, read_json, versions, write_json
from hooks.processor import Maira2Processor
from hooks.prompts import PromptRunner
from hooks.store import ActivationFolder
from hooks.studies import Study
from sae import MatryoshkaSAE, TrainConfig, train, training_curve
from sae.cross_entropy import cross_entropy
from sae.metrics import measure

HELDOUT = 0.2


class Demo:
    """Stages, each a method that returns what ``summary.json`` needs of it.

    Each stage is a folder or a JSON file under ``out``; one that is finished is not run again.

    Raises
    ------
    FolderError
        If ``out`` holds a demonstration with other settings.
    """

    STAGES: ClassVar[tuple[str, ...]]

    def __init__(self, out: Path, config: Any) -> None:
        path = out / "demo.json"
        record = json.loads(json.dumps({"demo": type(self).__name__, **asdict(config)}))
        if path.is_file() and read_json(path) != record:
            raise FolderError(f"{out} holds a demo with other settings; give a new folder")
        if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FolderError(f"{out} is not empty and is no demo; give a new folder")
        write_json(path, record)
        self.out, self.config = out, config
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, last: str = "") -> dict[str, dict[str, Any]]:
        """Run or resume the stages up to ``last`` (all of them); returns each one's results."""
        names = self.STAGES[: self.STAGES.index(last) + 1] if last else self.STAGES
        for name in names:
            self.results[name] = self._stage(name, getattr(self, name))
        return self.results

    def summarize(self) -> dict[str, Any]:
        """Run or resume every stage and write ``out/summary.json``; returns it."""
        stages = self.run()
        summary: dict[str, Any] = {}
        for result in stages.values():
            summary |= {key: value for key, value in result.items() if key != "seconds"}
        summary |= {
            "seconds": {name: result["seconds"] for name, result in stages.items()},
            "versions": versions(),
            "seed": self.config.seed,
            "config": asdict(self.config),
        }
        write_json(self.out / "summary.json", summary)
        return summary

    def _stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``compute()`` with its seconds, from ``stages/{name}.json`` if it was run before."""
        path = self.out / "stages" / f"{name}.json"
        if not path.is_file():
            began = time.perf_counter()
            result = compute()
            write_json(path, {**result, "seconds": round(time.perf_counter() - began, 1)})
        return read_json(path)


def fit(folder: ActivationFolder, config: TrainConfig, out: Path) -> dict[str, Any]:
    """Train a dictionary into ``out``; its speed and its curve."""
    train(folder, config, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = torch.tensor([line["seconds"] for line in lines]).diff()
    rate = config.batch / float(steps[steps > 0].median())  # steps < 0 mark a resumed run
    return {"train_tokens_per_s": round(rate), "curve": training_curve(out)}


def quality(out: Path, folder: ActivationFolder) -> dict[str, float]:
    """FVU and L0 on held-out rows of a trained dictionary, and its dead share on every row."""
    sae = MatryoshkaSAE.from_pretrained(out)
    heldout = read_json(out / "metrics.json")["heldout"]
    everywhere = measure(sae, folder, sae.config.site, np.ones(folder.n_tokens, dtype=bool))
    return {
        "fvu": heldout["fvu"],
        "l0": heldout["l0"],
        "dead_fraction": everywhere.dead_fraction,
    }


def loss_recovered(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
) -> dict[str, Any]:
    """Cross-entropy with the dictionary in place, on studies held out of its training."""
    runner = PromptRunner(model, processor, batch_tokens=1024)
    loss = cross_entropy(model, runner, studies, sae, folder.moments(sae.config.site).mean)
    return {
        "ce_recovered": loss.recovered_zero,
        "ce_recovered_mean_ablation": loss.recovered_mean,
        "cross_entropy": loss._asdict(),
    }


def show(summary: dict[str, Any], console: Console) -> None:
    """Print what both summaries hold as tables."""
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


def show_labels(summary: dict[str, Any], title: str, console: Console) -> None:
    """Print labels with their scores."""
    table = Table("latent", "label", "detection", "shuffled", title=title)
    for label in summary["labels"]:
        scores = (label["balanced_accuracy"], label["baseline"])
        shown = ["–" if score is None else f"{score:.2f}" for score in scores]
        table.add_row(str(label["latent"]), label["label"] or "no clear concept", *shown)
    console.print(table)


def show_seconds(summary: dict[str, Any], console: Console) -> None:
    """Print how long each stage took."""
    total = sum(summary["seconds"].values())
    console.print(f"seconds by stage: {summary['seconds']}, together {total:.0f}", markup=False)
