"""How a label, or a latent, did on patients that no explainer saw: the record and its arithmetic.

Chance is 0.5 for every score here, whatever the share of positives. An answer that did not come is
missing: it lowers the coverage, and is never taken for a no. Standard errors are by patient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hooks.files import (
    ConfigError,
    FolderError,
    atomic_folder,
    file_record,
    open_sealed,
    seal,
)
from sae.intervals import patient_codes, patient_draws
from sae.latent_scores import auroc

KIND = "scores"
FORMAT_VERSION = 1
SCORERS = ("detection", "fuzzing", "embedding", "agreement", "localisation")
REMEDY = "run `maira-sae score` to make it"
DRAWS = 200


@dataclass(frozen=True)
class Score:
    """One scorer's verdict; a number that could not be measured is ``None``."""

    latent: int
    scorer: str
    modality: str
    value: float | None
    """Balanced accuracy of detection and fuzzing; AUROC of the others."""
    standard_error: float | None
    """Of the value, by patient."""
    baseline: float | None
    """The value of another latent's label on the same examples, or of shuffled study labels."""
    auroc: float | None
    coverage: float
    """Share of questions with a readable answer."""
    n: int
    """Readable answers."""
    n_patients: int
    about: str | None = None
    """The study label it is about, of agreement and localisation."""

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ConfigError(f"scorer {self.scorer!r} is unknown; choose from {list(SCORERS)}")


@dataclass(frozen=True)
class Verdict:
    """What was said of one example."""

    patient: str
    truth: bool
    """Whether the latent fires on it, or its marks are the right ones."""
    answer: bool | None
    """``None`` where no readable answer came."""
    probability: float | None = None
    """Of yes, where the endpoint offers log-probabilities."""


class Said(NamedTuple):
    """The verdicts behind a score, in the order of its questions."""

    latent: int
    scorer: str
    modality: str
    verdicts: tuple[Verdict, ...]


def judge(
    latent: int, scorer: str, modality: str, verdicts: Sequence[Verdict], seed: int = 0
) -> Score:
    """Balanced accuracy and AUROC of verdicts.

    The AUROC ranks by the probability of yes where every readable answer has one, else by the
    answers themselves. A class without a readable answer leaves the value ``None``.

    >>> said = [Verdict("a", True, True), Verdict("b", False, False), Verdict("c", False, None)]
    >>> judge(7, "detection", "report", said).value
    1.0
    """
    read = [one for one in verdicts if one.answer is not None]
    truth = np.array([one.truth for one in read], dtype=bool)
    right = np.array([one.answer == one.truth for one in read], dtype=bool)
    n_patients = len({one.patient for one in read})
    coverage = len(read) / len(verdicts) if verdicts else 0.0
    empty = Score(latent, scorer, modality, None, None, None, None, coverage, len(read), n_patients)
    if not truth.any() or truth.all():
        return empty
    value = float(right[truth].mean() + right[~truth].mean()) / 2
    ranks = [one.probability for one in read]
    if any(rank is None for rank in ranks):
        ranks = [float(bool(one.answer)) for one in read]
    area = auroc(torch.tensor(ranks, dtype=torch.float64)[:, None], torch.from_numpy(truth))
    error = _error(right, truth, [one.patient for one in read], seed)
    return replace(empty, value=value, standard_error=error, auroc=float(area[0]))


def _error(
    right: np.ndarray, truth: np.ndarray, patients: Sequence[str], seed: int
) -> float | None:
    """Spread of the balanced accuracy over resampled patients; ``None`` with one patient."""
    codes, n_patients = patient_codes(patients)
    draws = patient_draws(n_patients, DRAWS, seed)
    if not len(draws):
        return None
    weights = draws.numpy()[:, codes.numpy()]
    sides = []
    for side in (truth, ~truth):
        with np.errstate(invalid="ignore"):  # a draw without one class is NaN and left out
            sides.append((weights[:, side] @ right[side]) / weights[:, side].sum(1))
    values = (sides[0] + sides[1]) / 2
    return float(np.nanstd(values, ddof=1))


def probability_of_yes(logprobs: Sequence[Mapping[str, float]] | None) -> float | None:
    """P(yes) among yes and no, of the log-probabilities of a reply's tokens (:class:`Reply`).

    The first token among whose alternatives either word is decides: what comes before it is a
    quotation mark or the like. ``None`` where neither word is anywhere.

    >>> round(probability_of_yes([{" Yes": -0.1, "no": -2.4, "It": -9.0}, {".": 0.0}]), 3)
    0.909
    """
    for token in logprobs or ():
        mass = {"yes": 0.0, "no": 0.0}
        for text, logprob in token.items():
            word = text.strip().lower()
            if word in mass:
                mass[word] += math.exp(logprob)
        if total := mass["yes"] + mass["no"]:
            return mass["yes"] / total
    return None


def other_labels(labels: Mapping[int, str | None], seed: int = 0) -> dict[int, str | None]:
    """For each labelled latent another latent's label: the shuffled baseline.

    Never a label that says the same; ``None`` where there is no other.
    """
    named = {latent: text for latent, text in labels.items() if text is not None}
    rng = np.random.default_rng(seed)
    found: dict[int, str | None] = {}
    for latent, text in named.items():
        others = sorted({other for other in named.values() if other.lower() != text.lower()})
        found[latent] = others[int(rng.integers(len(others)))] if others else None
    return found


def write_scores(
    scores: Sequence[Score], out: Path, heard: Sequence[Said] = (), **record: Any
) -> None:
    """The sealed folder ``out`` with ``scores.jsonl``, and ``verdicts.jsonl`` where some are given.

    The verdicts are written without their patients.
    """
    with atomic_folder(out) as temporary:
        tables = {"scores.jsonl": [asdict(one) for one in scores]}
        if heard:
            tables["verdicts.jsonl"] = [
                {
                    "latent": one.latent,
                    "scorer": one.scorer,
                    "modality": one.modality,
                    "truth": [verdict.truth for verdict in one.verdicts],
                    "answer": [verdict.answer for verdict in one.verdicts],
                    "probability": [verdict.probability for verdict in one.verdicts],
                }
                for one in heard
            ]
        for name, rows in tables.items():
            (temporary / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {name: file_record(temporary / name) for name in tables}
        seal(temporary, KIND, FORMAT_VERSION, files, **record)


def read_scores(folder: Path) -> list[Score]:
    """Scores of a finished folder."""
    open_sealed(folder, KIND, FORMAT_VERSION, REMEDY)
    lines = (folder / "scores.jsonl").read_text().splitlines()
    return [Score(**json.loads(line)) for line in lines]


def read_verdicts(folder: Path) -> list[Said]:
    """Verdicts of a finished folder; their patients are empty.

    Raises
    ------
    FolderError
        If the folder has none: detection and fuzzing leave some.
    """
    open_sealed(folder, KIND, FORMAT_VERSION, REMEDY)
    path = folder / "verdicts.jsonl"
    if not path.is_file():
        raise FolderError(
            f"{folder} has no verdicts.jsonl; run `maira-sae score` with detection or fuzzing into "
            "a new folder"
        )
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        columns = zip(row["truth"], row["answer"], row["probability"], strict=True)
        verdicts = tuple(Verdict("", *column) for column in columns)
        found.append(Said(row["latent"], row["scorer"], row["modality"], verdicts))
    return found
