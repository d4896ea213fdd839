"""The demonstration on the phantom: every figure stands beside what is known to be true."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autointerp import (
    CollectConfig,
    EndpointConfig,
    Features,
    LabelConfig,
    collect,
    label_latents,
    labeller_of,
    latent_activations,
)
from autointerp.explorer import Explorer
from hooks.files import read_json
from hooks.harvest import HarvestConfig, harvest
from hooks.processor import Maira2Processor
from hooks.store import ActivationFolder
from hooks.studies import Study, read_folder
from maira_sae import demo
from maira_sae.demo import HELDOUT, Demo, fit, loss_recovered, quality
from maira_sae.phantom_labels import named_findings
from maira_sae.phantom_page import page_of
from phantom import LABELS, Film, PhantomStudy, read_report
from phantom.model import WEIGHTS, load
from phantom.score import write_reports
from phantom.tables import folder_factors
from phantom.truth import Truth, id_of, read_truth, write_studies
from sae import MatryoshkaSAE, TrainConfig, random_dictionary
from sae.latent_scores import LatentScore, best_latents, match_latents
from sae.latents import Latents, gather
from sae.localisation import Localisation, localise
from steering import Edit, measure_references, steered
from steering.edits import Mode

STREAMS = ("text", "vision")
FIRST_SEED = 500_000_000
"""Studies of the demonstration with seed S are drawn from `FIRST_SEED + 100_000 · S` on."""
RANDOM_ROWS = 20_000
"""Rows on which random directions are made to fire as often as trained latents."""
PIXELS = ("pixel_auroc", *(f"pixel_auroc_{name}" for name in ("permuted", "other_film", "prior")))
PIXELS += ("pixel_auroc_above", "pixel_auroc_above_other_film")
"""Of :class:`sae.localisation.Localisation`, what the summary holds."""


Choice = Callable[[Latents, Tensor, Tensor], list[LatentScore]]
"""Chooses latents for findings, as :func:`sae.latent_scores.best_latents` does."""


@dataclass(frozen=True)
class PhantomDemoConfig:
    """Sizes of the demonstration."""

    n_studies: int = 3_000
    text_site: str = "llm.3.resid_post"
    vision_site: str = "vision.3.resid_post"
    batch: int = 2048
    steps: int = 500
    text_k: int = 8
    vision_k: int = 8
    expansion: int = 16
    n_loss_studies: int = 100
    """Held-out studies on which cross-entropy is measured."""
    n_top: int = 30
    """Strongest sentences of a latent that are kept, of each set of patients; twice as many are
    spread over the ranks of the others, for thresholds lie among those."""
    n_films: int = 600
    """Films of other patients that give thresholds and priors of localisation."""
    turned_on: str = "effusion_left"
    turned_off: str = "cardiomegaly"
    n_steered: int = 20
    """Held-out studies on which an edit is tried."""
    strength: float = 2.0
    """Of the edit that turns a finding on, in units of the latent's 99th percentile."""
    seed: int = 0

    def quick(self) -> PhantomDemoConfig:
        """Small enough to check the plumbing; its numbers mean little."""
        return replace(self, n_studies=300, steps=60, n_loss_studies=10, n_steered=2)


class PhantomDemo(Demo):
    """The phantom world; see the module docstring.

    Parameters
    ----------
    endpoint
        Where a language model labels; ``None`` labels by word statistics.
    """

    STAGES = ("draw", "harvest", "train", "evaluate", "truth", "collect", "label", "steer", "page")
    config: PhantomDemoConfig

    def __init__(
        self, out: Path, config: PhantomDemoConfig, endpoint: EndpointConfig | None = None
    ) -> None:
        super().__init__(out, config)
        self.endpoint = endpoint

    @cached_property
    def loaded(self) -> tuple[Any, Maira2Processor]:
        return load()

    @cached_property
    def studies(self) -> list[Study]:
        return read_folder(self.out / "studies")

    @cached_property
    def known(self) -> Truth:
        return read_truth(self.out / "studies")

    def activations(self, stream: str) -> ActivationFolder:
        return ActivationFolder(self.out / f"{stream}-activations")

    def sae(self, stream: str) -> MatryoshkaSAE:
        return MatryoshkaSAE.from_pretrained(self.out / f"{stream}-sae")

    def draw(self) -> dict[str, Any]:
        first = FIRST_SEED + 100_000 * self.config.seed
        studies = write_studies(self.out / "studies", range(first, first + self.config.n_studies))
        record = read_json(WEIGHTS / "training.json")
        parts = {
            "vision": "DINOv2 128×4, trained on phantom masks and labels",
            "projector": "4 layers, trained on phantom reports",
            "text": "Llama 128×6, trained on phantom reports",
        }
        return {"n_studies": len(studies), "model": parts, "losses": record["losses"]}

    def harvest(self) -> dict[str, Any]:
        began, rows = time.perf_counter(), 0
        for stream in STREAMS:
            rows += self._harvest(stream)
        rate = rows / (time.perf_counter() - began)
        return {
            "n_tokens": self.activations("text").n_tokens,
            "n_patches": self.activations("vision").n_tokens,
            "harvest_tokens_per_s": round(rate),
        }

    def _harvest(self, stream: str) -> int:
        """Rows that were not there before."""
        model, processor = self.loaded
        policy = {"text": "published", "vision": "patches"}[stream]
        config = HarvestConfig((self._site(stream),), policy, studies_per_part=250)
        out = self.out / f"{stream}-activations"
        before = sum(read_json(path)["rows"] for path in out.glob("part-*.json"))
        return harvest(model, processor, self.studies, config, out).n_tokens - before

    def _site(self, stream: str) -> str:
        return {"text": self.config.text_site, "vision": self.config.vision_site}[stream]

    def patches(self) -> None:
        """Studies and a dictionary of their patches, and nothing else of the demonstration."""
        self.draw()
        self._harvest("vision")
        self._fit("vision")

    def train(self) -> dict[str, Any]:
        text = self._fit("text")
        return {**text, "vision": self._fit("vision")}

    def _fit(self, stream: str) -> dict[str, Any]:
        c = self.config
        site, k = self._site(stream), {"text": c.text_k, "vision": c.vision_k}[stream]
        config = TrainConfig(
            site=site,
            expansion=c.expansion,
            k=k,
            steps=c.steps,
            batch=c.batch,
            lr=2e-3,
            warmup_steps=min(20, c.steps),
            dead_after_tokens=100_000,
            threshold_start=c.steps // 2,
            threshold_beta=0.98,
            heldout=HELDOUT,
            seed=c.seed,
            checkpoint_every=100,
            measure_every=max(1, c.steps // 6),
        )
        return fit(self.activations(stream), config, self.out / f"{stream}-sae")

    def evaluate(self) -> dict[str, Any]:
        c = self.config
        model, processor = self.loaded
        studies = [s for s in self.studies if s.split(HELDOUT) == "heldout"][: c.n_loss_studies]
        text = self.activations("text")
        loss = loss_recovered(model, processor, studies, self.sae("text"), text)
        vision = quality(self.out / "vision-sae", self.activations("vision"))
        return {
            "site": c.text_site,
            **quality(self.out / "text-sae", text),
            **loss,
            "vision_quality": {"site": c.vision_site, **vision},
        }

    def truth(self) -> dict[str, Any]:
        """Best single latent of each finding, in reports and on patches, of held-out patients.

        On patches no latent stands for two findings, so that turning one up says which is meant.
        """
        text = self._score(self.sae("text"), "text", best_latents)
        vision = self._score(self.sae("vision"), "vision", _matched)
        noise = {s: self._score(self._random(s), s, best_latents) for s in STREAMS}
        places = self._localise([score.latent for score in vision])
        findings = {}
        for i, label in enumerate(LABELS):
            findings[label] = {
                "auroc": text[i].auroc,
                "f1": text[i].f1,
                "latent": text[i].latent,
                "patch_auroc": vision[i].auroc,
                "patch_latent": vision[i].latent,
                **{key: getattr(places[label], key).value for key in PIXELS},
                "random_auroc": noise["text"][i].auroc,
                "random_patch_auroc": noise["vision"][i].auroc,
            }

        def mean(key: str) -> float:
            return float(np.mean([finding[key] for finding in findings.values()]))

        keys = ("auroc", "patch_auroc", "random_auroc", "random_patch_auroc")
        probes = {label: score._asdict() for label, score in zip(LABELS, text, strict=True)}
        return {
            "findings": findings,
            "probes": probes,
            "mean_over_findings": {key: mean(key) for key in keys},
        }

    def _random(self, stream: str) -> MatryoshkaSAE:
        """Random directions, as many and as often active on the scored rows as the trained ones."""
        sae, folder = self.sae(stream), self.activations(stream)
        chosen = self._scored_rows(stream) & ~folder.heldout(HELDOUT)
        chosen &= np.cumsum(chosen) <= RANDOM_ROWS
        rows = folder.rows(sae.config.site, 0, int(chosen.nonzero()[0][-1]) + 1)
        x = rows[torch.from_numpy(chosen[: len(rows)])].to(sae.W_dec)
        return random_dictionary(sae, x, seed=self.config.seed)

    def _scored_rows(self, stream: str) -> np.ndarray:
        """Image patches, or the full stops of report sentences.

        A full stop is the same token in every report: what a latent tells there of the sentence
        it ends, it does not have from the word.
        """
        folder = self.activations(stream)
        if stream == "vision":
            return np.ones(folder.n_tokens, dtype=bool)
        stop = self.loaded[1].tokenizer.convert_tokens_to_ids(".")
        return (folder.column("role") == "report") & (folder.column("token_id") == stop)

    def _score(self, sae: MatryoshkaSAE, stream: str, choose: Choice) -> list[LatentScore]:
        """A latent for each finding on the scored rows."""
        folder, rows = self.activations(stream), self._scored_rows(stream)
        chosen = torch.from_numpy(rows)
        latents = gather(encoded(sae, folder, chosen))
        carried = torch.from_numpy(self._factors[stream][rows, : len(LABELS)])
        heldout = torch.from_numpy(folder.heldout(HELDOUT)[rows])
        return choose(latents, carried, heldout)

    def _localise(self, latents: Sequence[int]) -> dict[str, Localisation]:
        """A latent's patches against each finding's masks, on frontal films that have it."""
        heldout = [s.id for s in self.studies if s.split(HELDOUT) == "heldout"]
        others = [s.id for s in self.studies if s.split(HELDOUT) != "heldout"]
        names = heldout + others[: self.config.n_films]
        films = [self.known.study(name).frontal for name in names]
        maps = self.maps(latents, names)
        side = np.arange(len(names)) < len(heldout)
        shape = films[0].pixels.shape
        found = {}
        for label, latent in zip(LABELS, latents, strict=True):
            nothing = np.zeros(shape, dtype=bool)
            masks = np.stack([film.masks.get(label, nothing) for film in films])
            shown = np.stack([maps[latent][name] for name in names])
            found[label] = localise(shown, masks, names, side)
        return found

    def features(self, stream: str) -> Features:
        return Features.open(self.out / f"{stream}-features")

    def collect(self) -> dict[str, Any]:
        """Statistics and examples of every latent of both dictionaries."""
        n_top = self.config.n_top
        text = CollectConfig(n_top=n_top, n_quantile=2 * n_top, n_contrast=n_top // 2)
        found = {}
        for stream, config in (("text", text), ("vision", CollectConfig())):
            out = self.out / f"{stream}-features"
            source = self.activations(stream)
            features = collect(self.sae(stream), source, config, out, self.studies)
            found[stream] = {"fire": len(features.alive()), "latents": features.n_latents}
        return {"features": found}

    def label(self) -> dict[str, Any]:
        """Name every latent of text, and find the findings among the names."""
        features, tokenizer = self.features("text"), self.loaded[1].tokenizer
        out = self.out / "labels"
        who = labeller_of(self.endpoint, tokenizer, out)
        config = LabelConfig(tuple(sorted(features.alive())), calibrate=True)
        labels = label_latents(features, who, config, out)
        named = named_findings(features, labels, who, tokenizer)
        found = {}
        for name, finding in self.results["truth"]["findings"].items():
            own = {"label": None, "balanced_accuracy": None, "shuffled": None}
            found[name] = {
                **finding,
                "probe_latent": finding["latent"],
                **own,
                **named.get(name, {}),
            }
        summary = [
            {
                **{key: one[key] for key in ("latent", "label", "balanced_accuracy")},
                "baseline": one["shuffled"],
                "n_scored": one["n"],
            }
            for one in named.values()
        ]
        return {"labels": summary, "n_labelled": len(labels), "findings": found}

    def steer(self) -> dict[str, Any]:
        """Turn one finding on and one off, by its patch latent, on held-out frontal films.

        Each edit stands beside the same edit of a latent of another finding.
        """
        c = self.config
        findings = self.results["truth"]["findings"]
        heldout = [s for s in self.studies if s.split(HELDOUT) == "heldout"]
        drawn = [self.known.study(study.id) for study in heldout[: 12 * c.n_steered]]
        alone = [study for study in drawn if len(study.films()) == 1]
        edits, examples = [], []
        tried: tuple[tuple[str, str, str, Mode, float], ...] = (
            (c.turned_on, "on", c.turned_off, "add", c.strength),
            (c.turned_off, "off", c.turned_on, "clamp", 0.0),
        )
        for name, direction, control, mode, strength in tried:
            studies = [s for s in alone if (name in s.factors.present) == (direction == "off")]
            studies = studies[: c.n_steered]
            edit, other = (
                self._edit(findings[finding]["patch_latent"], strength, mode)
                for finding in (name, control)
            )
            before, after = self._reports(studies, []), self._reports(studies, [edit])
            record = {"finding": name, "direction": direction, "n": len(studies), **asdict(edit)}
            record["said_before"] = _stated(name, before)
            record["said_after"] = _stated(name, after)
            record["said_control"] = _stated(name, self._reports(studies, [other]))
            edits.append(record)
            examples += [
                {"finding": name, "direction": direction, "study": id_of(study.seed)}
                | {"before": was, "after": now}
                for study, was, now in zip(studies[:3], before, after, strict=False)
            ]
        first = {**edits[0], **examples[0]}
        return {"steering": {**first, "edits": edits}, "steering_examples": examples}

    def _edit(self, latent: int, strength: float, mode: Mode) -> Edit:
        sae, folder = self.sae("vision"), self.activations("vision")
        return measure_references(sae, folder, [latent]).edit(latent, strength, mode)

    def _reports(self, studies: Sequence[PhantomStudy], edits: Sequence[Edit]) -> list[str]:
        model, processor = self.loaded
        with steered(model, self.sae("vision"), edits):
            return write_reports(model, processor, studies)

    def page(self) -> dict[str, Any]:
        """`dashboard.html`, of everything above."""
        Explorer(page_of(self)).write(self.out / "dashboard.html")
        return {"dashboard": "dashboard.html"}

    def maps(
        self, latents: Sequence[int], names: Sequence[str] | None = None
    ) -> dict[int, dict[str, np.ndarray]]:
        """Each latent on the patches of frontal films, by study; default: all held-out ones."""
        names = list(self.frontals) if names is None else names
        folder = self.activations("vision")
        side = self.loaded[0].config.patch_grid
        wanted = np.isin(folder.column("study"), list(names))
        chosen = np.flatnonzero((folder.column("view") == "frontal") & wanted)
        studies = [str(study) for study in folder.column("study")[chosen[:: side * side]]]
        latents = list(dict.fromkeys(latents))
        values = latent_activations(self.sae("vision"), folder, latents).numpy()[chosen]
        grids = values.T.reshape(len(latents), len(studies), side, side)
        return {
            latent: dict(zip(studies, grid, strict=True))
            for latent, grid in zip(latents, grids, strict=True)
        }

    @cached_property
    def frontals(self) -> dict[str, Film]:
        """The frontal films of held-out studies, drawn again for their masks."""
        names = [study.id for study in self.studies if study.split(HELDOUT) == "heldout"]
        return {name: self.known.study(name).frontal for name in names}

    @cached_property
    def by_id(self) -> dict[str, Study]:
        return {study.id: study for study in self.studies}

    @cached_property
    def _factors(self) -> dict[str, np.ndarray]:
        return {stream: folder_factors(self.known, self.activations(stream)) for stream in STREAMS}


def _matched(latents: Latents, truth: Tensor, heldout: Tensor) -> list[LatentScore]:
    return match_latents(latents, truth, heldout).scores


def _stated(name: str, reports: Sequence[str]) -> float:
    """Share of reports that state a finding."""
    return float(np.mean([name in read_report(text).findings.seen for text in reports]))


def encoded(
    sae: MatryoshkaSAE, folder: ActivationFolder, chosen: Tensor, batch: int = 8192
) -> Iterator[Tensor]:
    """Latents of the chosen rows of the folder, at most ``[batch, F]`` at a time."""
    with torch.no_grad():
        for start in range(0, folder.n_tokens, batch):
            stop = min(start + batch, folder.n_tokens)
            kept = chosen[start:stop]
            if kept.any():
                yield sae.encode(folder.rows(sae.config.site, start, stop)[kept].to(sae.W_dec))


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary as tables."""
    demo.show(summary, console)
    columns = ("finding", "latent", "AUROC", "random", "label", "patch AUROC", "random", "pixels")
    table = Table(*columns, title="Best single latent of each finding, held-out patients")
    for name, finding in summary["findings"].items():
        table.add_row(
            name.replace("_", " "),
            str(finding["latent"]),
            f"{finding['auroc']:.3f}",
            f"{finding['random_auroc']:.3f}",
            finding["label"] or "no clear concept",
            f"{finding['patch_auroc']:.3f}",
            f"{finding['random_patch_auroc']:.3f}",
            f"{finding['pixel_auroc']:.3f}",
        )
    mean = summary["mean_over_findings"]
    table.add_section()
    table.add_row(
        "mean",
        "",
        f"{mean['auroc']:.3f}",
        f"{mean['random_auroc']:.3f}",
        "",
        f"{mean['patch_auroc']:.3f}",
        f"{mean['random_patch_auroc']:.3f}",
    )
    console.print(table)
    vision = summary["vision_quality"]
    console.print(
        f"vision SAE at {vision['site']}: FVU {vision['fvu']:.4f}, L0 {vision['l0']:.1f}, dead "
        f"{vision['dead_fraction']:.2%}"
    )
    for edit in summary["steering"]["edits"]:
        console.print(
            f"[bold]Steering[/] {edit['finding'].replace('_', ' ')} {edit['direction']}: stated in "
            f"{edit['said_before']:.0%} of {edit['n']} reports before, {edit['said_after']:.0%} "
            f"after, {edit['said_control']:.0%} under another latent"
        )
    demo.show_seconds(summary, console)
