"""What clinicians asked for, against the phantom's truth: history, search, review.

Latents are chosen on training patients, by the largest activation on the frontal film; figures are
of held-out patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooks.store import ActivationFolder
from hooks.studies import read_folder
from phantom import LABELS, read_truth, sentence_factors
from phantom.factors import change
from phantom.language import sentences
from phantom.model import load
from sae import MatryoshkaSAE
from sae.intervals import auroc_interval, mean_interval, patient_codes, patient_draws
from sae.latent_scores import auroc, match_latents
from sae.latents import heldout_rows
from steering.history import film_pairs
from steering.review import ReviewConfig, SentenceReview, review
from steering.search import build_index, similarity


@dataclass(frozen=True)
class ClinicBench:
    """Sizes of the measurement."""

    reviewed: int = 60
    """Held-out studies whose reports are reviewed, as they are and with a sentence put in."""
    seed: int = 0

    def quick(self) -> ClinicBench:
        """Small enough to check that it runs."""
        return replace(self, reviewed=3)


def run(demo: Path, config: ClinicBench, out: Path) -> dict[str, Any]:
    """Measure on a finished phantom demonstration; the index is written to ``out``."""
    sae = MatryoshkaSAE.from_pretrained(demo / "vision-sae")
    index = build_index(sae, ActivationFolder(demo / "vision-activations"), out)
    studies = {study.id: study for study in read_folder(demo / "studies")}
    truth = read_truth(demo / "studies")
    names, values = index.take("frontal")
    carried = torch.tensor([[label in studies[n].labels for label in LABELS] for n, _ in names])
    heldout = heldout_rows([patient for _, patient in names])
    matched = [score.latent for score in match_latents(values, carried, heldout).scores]

    films, shown = values[heldout], carried[heldout]
    top = [films[:, f].argsort(descending=True, stable=True)[:10] for f in matched]
    by_latent = [float(shown[rows, i].float().mean()) for i, rows in enumerate(top)]
    by_film = []
    for i in (shown.sum(1) == 1).nonzero().flatten().tolist():
        likeness = similarity(films, films[i])
        likeness[i] = -1
        found = shown[likeness.topk(10).indices]
        by_film.append(float(found[:, shown[i]].float().mean()))

    pairs = film_pairs(index)
    own = heldout_rows(pairs.patients)
    drawn = [truth.study(n) for n, held in zip(pairs.studies, own.tolist(), strict=True) if held]
    shares = pairs.shares[own][:, matched]
    history = {}
    for i, label in enumerate(LABELS):
        assert all(study.prior_factors is not None for study in drawn)
        how = [change(label, s.factors, s.prior_factors) for s in drawn]  # pyright: ignore
        up = torch.tensor([one in ("new", "larger") for one in how])
        down = torch.tensor([one in ("resolved", "smaller") for one in how])
        column = shares[:, i : i + 1]
        history[label] = [float(auroc(column, up)[0]), float(auroc(-column, down)[0])]
    changed = [value for both in history.values() for value in both]
    reviewed = _review(sae, config, matched, [n for n, _ in names], heldout, studies, truth)
    return {
        "history_auroc": float(np.mean(changed)),
        "history_n": len(drawn),
        "history_by_finding": history,
        "search_p10": float(np.mean(by_latent)),
        "search_p10_by_finding": dict(zip(LABELS, by_latent, strict=True)),
        "search_by_film_p10": float(np.mean(by_film)),
        "search_by_film": mean_interval(torch.tensor(by_film)).record(),
        "search_chance": float(shown.float().mean()),
        **reviewed,
    }


def _review(
    sae: Any, config: ClinicBench, matched: Any, names: Any, heldout: Any, studies: Any, truth: Any
) -> dict[str, Any]:
    model, processor = load()
    single: dict[tuple[str, bool], list[str]] = {}
    for text, meaning in sentences().items():
        if len(meaning) == 1 and meaning[0][1].status != "absent":
            label, state = meaning[0]
            single.setdefault((label, bool(state.change)), []).append(text)
    rng = np.random.default_rng(config.seed)
    right: list[tuple[str, bool]] = []
    support: list[tuple[str, float, bool]] = []

    def read(study: Any, report: str) -> list[SentenceReview]:
        given = study.model_copy(update={"report": report})
        return review(model, processor, given, sae, config=ReviewConfig(batch=32))

    chosen = [n for n, held in zip(names, heldout.tolist(), strict=True) if held]
    for name in chosen[: config.reviewed]:
        study, known = studies[name], truth.study(name)
        assert study.report is not None
        said = sentence_factors(study.report)[:, : len(LABELS)]
        for one, factors in zip(read(study, study.report), said, strict=True):
            if factors.any():
                good = {matched[i] for i in np.flatnonzero(factors)}
                right.append((name, bool(one.image) and one.image[0].latent in good))
                support.append((name, one.support, False))
        before = known.prior_factors.present if known.prior_factors else ()
        absent = [x for x in LABELS if x not in known.factors.present and x not in before]
        label = absent[rng.integers(len(absent))]
        options = single[label, study.prior is not None]
        parts = [f"{part.strip()} ." for part in study.report.split(" .") if part.strip()]
        place = int(rng.integers(len(parts) + 1))
        parts.insert(place, options[rng.integers(len(options))])
        planted = read(study, " ".join(parts))[place]
        support.append((name, planted.support, True))
    codes, n = patient_codes([name for name, _, _ in support])
    scores = torch.tensor([-value for _, value, _ in support], dtype=torch.float64)
    labels = torch.tensor([planted for _, _, planted in support])
    area = auroc_interval(scores, labels, codes, patient_draws(n))
    flagged = scores > -ReviewConfig().least_support
    first = mean_interval(torch.tensor([float(good) for _, good in right]))
    return {
        "review_top1": first.value,
        "review_top1_figure": first.record(),
        "review_unsupported_auroc": area.value,
        "review_unsupported_figure": area.record(),
        "review_flag_precision": float(labels[flagged].double().mean()) if flagged.any() else None,
        "review_flag_recall": float(flagged[labels].double().mean()),
        "n_planted": int(labels.sum()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    keys = ("history_auroc", "review_top1", "review_unsupported_auroc", "search_p10")
    return "\n".join(f"{key:<26} {result[key]:.3f}" for key in (*keys, "search_by_film_p10"))
