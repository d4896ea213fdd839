"""What the mini model reads: its reports against the truth, on studies that nothing has seen.

python -m phantom.score --n 1000 --seed 1 --json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooks.processor import Maira2Processor
from phantom.cache import roomy_cache
from phantom.corpus import grey, normalised
from phantom.draw import Box
from phantom.factors import LABELS, PhantomError
from phantom.model import WEIGHTS, load
from phantom.reports import Reading, read_report
from phantom.study import PhantomStudy, Sampler, sample_study

MOST = 1_000_000
"""Studies a scoring seed has; seed S takes those from `S * MOST` on."""


@dataclass(frozen=True)
class Score:
    """How reports agree with the truth; every finding is at its place (side and zone)."""

    n: int
    f1: Mapping[str, float]
    """By finding, of plain reports. Possible counts as seen."""
    shuffled_f1: Mapping[str, float]
    """The same when each prompt gets the films of another study."""
    chance_f1: Mapping[str, float]
    """What the shuffled reports would score if they were independent of the truth."""
    change_accuracy: float
    """Of the findings that compare with a prior film, how many reports state as they are."""
    box_iou: float
    """Mean over the findings of grounded reports that are true and have a box."""
    box_iou_by_finding: Mapping[str, float]
    state_accuracy: float
    """Of the findings that are there, how many have certainty and grade right too."""
    unread: float
    """Sentences, boxes or tokens of a report that are not of the language, mean per report."""


@torch.no_grad()
def write_reports(
    model: Any,
    words: Maira2Processor,
    studies: Sequence[PhantomStudy],
    *,
    grounded: bool = False,
    films_of: Sequence[PhantomStudy] | None = None,
    batch: int = 64,
    max_new_tokens: int = 240,
) -> list[str]:
    """The model's greedy report of each study.

    Args:
        model: a mini model.
        words: its processor.
        studies: what the prompts say.
        grounded: ask for boxes.
        films_of: the studies whose films are shown instead; each must have the same views.
        batch: studies that are generated together.
        max_new_tokens: longest report.

    Returns:
        One text for each study, in order, without special tokens but those of grounding.
    """
    shown = studies if films_of is None else films_of
    by_views: dict[tuple[bool, bool], list[int]] = {}
    for i, study in enumerate(studies):
        by_views.setdefault(_views(study), []).append(i)
    texts = [""] * len(studies)
    tokenizer = words.tokenizer
    grounding = set(tokenizer.all_special_ids)
    for places in by_views.values():
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            prompts = [_prompt(words, studies[i], grounded) for i in chosen]
            longest = max(map(len, prompts))
            ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
                mask[row, longest - len(prompt) :] = 1
            pixels = np.stack([grey(film) for i in chosen for film in shown[i].films()])
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=normalised(pixels, words),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                past_key_values=roomy_cache(),
            )[:, longest:]
            for i, row in zip(chosen, written.tolist(), strict=True):
                texts[i] = tokenizer.decode([token for token in row if token not in grounding])
    return texts


def _views(study: PhantomStudy) -> tuple[bool, bool]:
    return study.lateral is not None, study.prior is not None


def _prompt(words: Maira2Processor, study: PhantomStudy, grounded: bool) -> np.ndarray:
    lateral, prior = _views(study)
    report = study.report
    return words.tokenize_reporting(
        has_lateral=lateral,
        has_prior=prior,
        indication=report.indication,
        technique=report.technique,
        comparison=report.comparison,
        grounded=grounded,
    ).ids


def shuffled(studies: Sequence[PhantomStudy]) -> list[PhantomStudy]:
    """For each study another one with the same views (the next of its kind, in a ring)."""
    by_views: dict[tuple[bool, bool], list[int]] = {}
    for i, study in enumerate(studies):
        by_views.setdefault(_views(study), []).append(i)
    out = list(studies)
    for places in by_views.values():
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            out[here] = studies[there]
    return out


def score(
    model: Any,
    words: Maira2Processor,
    n: int = 1000,
    seed: int = 0,
    sampler: Sampler = "clinical",
) -> Score:
    """Score a mini model on `n` fresh studies; grounded reports are asked of a third of them.

    Raises:
        PhantomError: `n` is below 30, or there are not so many studies of one seed.
    """
    if not 30 <= n <= MOST:
        raise PhantomError(f"{n} studies asked for; give 30 to {MOST}")
    studies = [sample_study(seed * MOST + i, sampler=sampler) for i in range(n)]
    plain = [read_report(text) for text in write_reports(model, words, studies)]
    others = shuffled(studies)
    blind = [read_report(text) for text in write_reports(model, words, studies, films_of=others)]
    third = studies[: n // 3]
    grounded = [read_report(t) for t in write_reports(model, words, third, grounded=True)]
    true, said, guessed = _seen(studies), _seen(plain), _seen(blind)
    changes, states = [], []
    for study, reading in zip(studies, plain, strict=True):
        for label, state in study.findings.stated.items():
            if state.change:
                changes.append(reading.findings[label].change == state.change)
            if state.status != "absent" and reading.findings[label].status != "absent":
                states.append(reading.findings[label][:2] == state[:2])
    boxes = _box_iou(third, grounded)
    return Score(
        n=n,
        f1=_f1(true, said),
        shuffled_f1=_f1(true, guessed),
        chance_f1=_chance(true, guessed),
        change_accuracy=_mean(changes),
        box_iou=_mean([iou for ious in boxes.values() for iou in ious]),
        box_iou_by_finding={label: _mean(ious) for label, ious in boxes.items()},
        state_accuracy=_mean(states),
        unread=_mean([len(reading.unknown) for reading in plain]),
    )


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4) if values else float("nan")


def _seen(items: Sequence[PhantomStudy | Reading]) -> np.ndarray:
    return np.array([[label in item.findings.seen for label in LABELS] for item in items])


def _f1(true: np.ndarray, said: np.ndarray) -> dict[str, float]:
    hits = 2 * (true & said).sum(0) / np.maximum(1, true.sum(0) + said.sum(0))
    return {label: round(float(f1), 4) for label, f1 in zip(LABELS, hits, strict=True)}


def _chance(true: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """F1 of two independent judgements with these rates: `2 p q / (p + q)`."""
    p, q = true.mean(0), said.mean(0)
    hits = 2 * p * q / np.maximum(p + q, 1 / len(true))
    return {label: round(float(f1), 4) for label, f1 in zip(LABELS, hits, strict=True)}


def _box_iou(
    studies: Sequence[PhantomStudy], readings: Sequence[Reading]
) -> dict[str, list[float]]:
    """Best overlap of each true finding's box with those its report gives it."""
    out: dict[str, list[float]] = {}
    for study, reading in zip(studies, readings, strict=True):
        for label in study.findings.seen:
            if reading.boxes.get(label):
                box = study.frontal.boxes[label]
                best = max(overlap(box, said) for said in reading.boxes[label])
                out.setdefault(label, []).append(best)
    return {label: out[label] for label in LABELS if label in out}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes.

    Example:
        >>> from phantom import Box
        >>> round(overlap(Box(0, 0, 1, 1), Box(0.5, 0, 1.5, 1)), 3)
        0.333
    """
    width = max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0))
    height = max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
    both = width * height
    either = (a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - both
    return both / either if either else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m phantom.score", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="studies")
    parser.add_argument("--seed", type=int, default=0, help="any whole number")
    parser.add_argument("--sampler", choices=("clinical", "independent"), default="clinical")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    given = parser.parse_args(arguments)
    model, words = load(given.weights)
    result = score(model, words, given.n, given.seed, given.sampler)
    if given.json:
        print(json.dumps(vars(result)))  # noqa: T201
        return
    for label in LABELS:
        print(  # noqa: T201
            f"{label:20} F1 {result.f1[label]:.3f}   shuffled films {result.shuffled_f1[label]:.3f}"
            f"   chance {result.chance_f1[label]:.3f}"
        )
    print(f"change {result.change_accuracy:.3f}   boxes, IoU {result.box_iou:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
