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
from sae.intervals import auroc_interval, mean_interval, patient_codes, patient_draws, ratio
from sae.latent_scores import auroc, best_factors, match_latents
from sae.latents import heldout_rows
from steering.history import Direction, agreement, film_pairs, fit_progression
from steering.review import ReviewConfig, SentenceReview, review
from steering.search import build_index, similarity

_DIRECTION: Mapping[str, Direction] = {
    **{"new": "worsening", "larger": "worsening", "resolved": "improving", "smaller": "improving"},
    **{"unchanged": "stable", "": "stable"},
}


def _some(values: list[Direction], rows: torch.Tensor) -> list[Direction]:
    return [value for value, kept in zip(values, rows.tolist(), strict=True) if kept]


@dataclass(frozen=True)
class ClinicBench:
    """Sizes of the measurement."""

    reviewed: int = 60
    """Held-out studies whose reports are reviewed: their own, one with a sentence put in, and the
    report of another study."""
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
    drawn = [truth.study(name) for name in pairs.studies]
    history, chosen_history, progression = {}, {}, {}
    for i, label in enumerate(LABELS):
        assert all(study.prior_factors is not None for study in drawn)
        how = [change(label, s.factors, s.prior_factors) for s in drawn]  # pyright: ignore
        directions: list[Direction] = [_DIRECTION[one] for one in how]
        fitted = fit_progression(pairs.shares[~own], _some(directions, ~own))
        agreed = agreement(fitted, pairs.shares[own], _some(directions, own))
        up = torch.tensor([one == "worsening" for one in directions])[own]
        down = torch.tensor([one == "improving" for one in directions])[own]
        for kept, latent in ((history, matched[i]), (chosen_history, fitted.latent)):
            column = pairs.shares[own, latent][:, None]
            kept[label] = [float(auroc(column, up)[0]), float(auroc(-column, down)[0])]
        progression[label] = {"latent": fitted.latent, "macro_accuracy": agreed.macro_accuracy}
        if "effusion" in label:
            column = pairs.shares[own, matched[i]][:, None]
            grown = torch.tensor([one == "larger" for one in how])[own]
            progression[label]["matched_auroc_larger"] = float(auroc(column, grown)[0])
    knows = best_factors(values[~heldout], carried[~heldout]).factor
    reviewed = _review(sae, config, matched, knows, names, heldout, studies, truth)
    return {
        "history_auroc": float(np.mean(list(history.values()))),
        "history_auroc_progression": float(np.mean(list(chosen_history.values()))),
        "history_n": int(own.sum()),
        "history_by_finding": history,
        "history_progression_by_finding": chosen_history,
        "progression": progression,
        "progression_macro_accuracy": float(
            np.mean([one["macro_accuracy"] for one in progression.values()])
        ),
        "search_p10": float(np.mean(by_latent)),
        "search_p10_by_finding": dict(zip(LABELS, by_latent, strict=True)),
        "search_by_film_p10": float(np.mean(by_film)),
        "search_by_film": mean_interval(torch.tensor(by_film)).record(),
        "search_chance": float(shown.float().mean()),
        **reviewed,
    }


def _review(
    sae: Any,
    config: ClinicBench,
    matched: list[int],
    knows: torch.Tensor,
    names: Any,
    heldout: torch.Tensor,
    studies: Any,
    truth: Any,
) -> dict[str, Any]:
    model, processor = load()
    single: dict[tuple[str, bool], list[str]] = {}
    for text, meaning in sentences().items():
        if len(meaning) == 1 and meaning[0][1].status != "absent":
            label, state = meaning[0]
            single.setdefault((label, bool(state.change)), []).append(text)
    rng = np.random.default_rng(config.seed)
    right: list[tuple[str, bool, bool]] = []
    support: list[tuple[str, float, str]] = []

    # Support is measured apart from single latents, of which other reports need none.
    only_support = ReviewConfig(candidates=1, shown=1)

    def read(study: Any, report: str, settings: ReviewConfig) -> list[SentenceReview]:
        given = study.model_copy(update={"report": report})
        return review(model, processor, given, sae, config=settings)

    held = [n for (n, _), h in zip(names, heldout.tolist(), strict=True) if h]
    chosen = held[: config.reviewed]
    for place, name in enumerate(chosen):
        study, known = studies[name], truth.study(name)
        who = study.patient or name
        before = known.prior_factors.present if known.prior_factors else ()
        there = {*known.factors.present, *before}
        said = sentence_factors(study.report)[:, : len(LABELS)]
        for one, factors in zip(read(study, study.report, ReviewConfig()), said, strict=True):
            if factors.any():
                about = np.flatnonzero(factors)
                first = one.image[0].latent if one.image else None
                strict = first in {matched[i] for i in about}
                right.append((who, strict, first is not None and int(knows[first]) in about))
                support.append((who, one.support, "own"))
        absent = [label for label in LABELS if label not in there]
        label = absent[rng.integers(len(absent))]
        options = single[label, study.prior is not None]
        parts = [f"{part.strip()} ." for part in study.report.split(" .") if part.strip()]
        at = int(rng.integers(len(parts) + 1))
        parts.insert(at, options[rng.integers(len(options))])
        support.append((who, read(study, " ".join(parts), only_support)[at].support, "planted"))
        other = studies[chosen[place - 1]].report
        told = sentence_factors(other)[:, : len(LABELS)]
        for one, factors in zip(read(study, other, only_support), told, strict=True):
            if factors.any() and not there & {LABELS[i] for i in np.flatnonzero(factors)}:
                support.append((who, one.support, "swapped"))
    who, strict, family = zip(*right, strict=True)
    codes, n = patient_codes(who)
    draws = patient_draws(n)

    def share(values: Any) -> Any:
        hits = torch.zeros(n).index_add_(0, codes, torch.tensor(values, dtype=torch.float))
        return ratio(hits, torch.bincount(codes, minlength=n).float(), len(values), draws)

    named, one_to_one = share(family), share(strict)
    out: dict[str, Any] = {
        "review_top1": named.value,
        "review_top1_figure": named.record(),
        "review_top1_one_to_one": one_to_one.value,
        "review_top1_one_to_one_figure": one_to_one.record(),
        "review_studies": len(chosen),
    }
    for kind, key in (("planted", "unsupported"), ("swapped", "swapped")):
        rows = [row for row in support if row[2] in ("own", kind)]
        codes, n = patient_codes([row[0] for row in rows])
        scores = torch.tensor([-row[1] for row in rows], dtype=torch.float64)
        labels = torch.tensor([row[2] == kind for row in rows])
        out[f"n_{kind}"] = int(labels.sum())
        if not labels.any() or labels.all():
            continue
        area = auroc_interval(scores, labels, codes, patient_draws(n))
        flagged = scores > -ReviewConfig().least_support
        out |= {
            f"review_{key}_auroc": area.value,
            f"review_{key}_figure": area.record(),
            f"review_{key}_flag_recall": float(flagged[labels].double().mean()),
            f"review_{key}_flag_false": float(flagged[~labels].double().mean()),
        }
    return out


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    keys = ("history_auroc", "review_top1", "review_top1_one_to_one", "search_p10")
    return "\n".join(f"{key:<26} {result[key]:.3f}" for key in (*keys, "search_by_film_p10"))
