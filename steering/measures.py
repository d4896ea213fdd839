"""What an edit did to probabilities, meaning and boxes, beside what it did to sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hooks.files import ConfigError
from hooks.grounding import GroundingError
from hooks.processor import Maira2Processor
from hooks.studies import Study
from sae.intervals import Figure, patient_codes, patient_draws, ratio
from sae.model import MatryoshkaSAE
from steering.boxes import BoxShift, box_shifts
from steering.degeneration import degeneration
from steering.edits import Change
from steering.effects import Effect
from steering.entailment import Ask, Entailment, entailment
from steering.likelihood import token_effects
from steering.positions import Positions, Where


@dataclass(frozen=True)
class Measures:
    """Of one study's steered report beside its plain one; None where a report is empty."""

    kl: float | None
    """KL(plain ‖ steered) over the plain report, nats a token."""
    plain_perplexity: float | None
    """Of the plain report under the model without edits."""
    perplexity: float | None
    """Of the steered report under the model without edits."""
    entailment: Entailment | None
    """None where no language model was asked."""
    boxes: tuple[BoxShift, ...]
    """Of grounded reports."""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found = self.entailment
        return {
            **asdict(self),
            "boxes": [shift._asdict() for shift in self.boxes],
            "entailment": found
            and {
                **found._asdict(),
                **{"precision": found.precision, "recall": found.recall},
                "missing": found.missing,
            },
        }


def measure_effect(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    one: Effect,
    sae: MatryoshkaSAE,
    edits: Sequence[Change],
    *,
    where: Where | Positions = "all",
    ask: Ask | None = None,
    bins: int = 100,
) -> Measures:
    """Measure one effect; two pairs of forward passes, and a request a sentence with ``ask``.

    Raises
    ------
    ConfigError
        If the effect is of another study.
    """
    if one.study != study.id:
        raise ConfigError(f"the effect is of study {one.study!r}, not {study.id!r}; give its study")
    kl = plain = steered = None
    if one.before.strip():
        over = token_effects(model, processor, study, one.before, sae, edits, where=where)
        kl, plain = over.mean_kl, over.perplexity
    if one.after.strip():
        steered = plain
        if one.after != one.before:
            nothing = token_effects(model, processor, study, one.after, sae, [])
            steered = nothing.perplexity
    try:
        boxes = tuple(box_shifts(one.before, one.after, bins))
    except GroundingError:  # steered text may leave the grammar of boxes
        boxes = ()
    told = entailment(one.before, one.after, ask) if ask is not None else None
    return Measures(kl, plain, steered, told, boxes)


@dataclass(frozen=True)
class MeasuredDose:
    """Means of one arm at one strength, with intervals over patients; None where unmeasured."""

    arm: str
    strength: float
    kl: Figure | None
    perplexity: Figure | None
    """Geometric mean over studies."""
    entailed_after: Figure | None
    """Share of the steered sentences that the plain report entails (RadFact's precision)."""
    entailed_before: Figure | None
    """Share of the plain sentences that the steered report entails (RadFact's recall)."""
    missing: int
    """Judgements that failed; they are in neither share."""
    box_iou: Figure | None
    """Of boxes that both reports have."""
    repeated_4grams: Figure | None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v.record() if isinstance(v, Figure) else v for k, v in vars(self).items()}


UNSTEERED = "unsteered model"


def measured_doses(effects: Sequence[Effect], measures: Sequence[Measures]) -> list[MeasuredDose]:
    """A row for the unsteered model, then one for each arm and strength."""
    if len(effects) != len(measures):
        raise ConfigError(f"{len(effects)} effects and {len(measures)} measures; give one each")
    groups: dict[tuple[str, float], list[int]] = {}
    for i, one in enumerate(effects):
        groups.setdefault((one.arm, one.strength), []).append(i)
    once = {effects[i].study: i for i in reversed(range(len(effects)))}
    plain = sorted(once.values())
    rows = [
        MeasuredDose(
            UNSTEERED,
            0.0,
            _mean(effects, plain, lambda i: 0.0 if measures[i].kl is not None else None),
            _geometric(effects, plain, lambda i: measures[i].plain_perplexity),
            None,
            None,
            0,
            None,
            _mean(effects, plain, lambda i: degeneration(effects[i].before).repeated_4grams),
        )
    ]
    for (arm, strength), own in sorted(groups.items()):
        told = [(i, measures[i].entailment) for i in own]
        rows.append(
            MeasuredDose(
                arm,
                strength,
                _mean(effects, own, lambda i: measures[i].kl),
                _geometric(effects, own, lambda i: measures[i].perplexity),
                _share(effects, [(i, one.after) for i, one in told if one]),
                _share(effects, [(i, one.before) for i, one in told if one]),
                sum(one.missing for _, one in told if one),
                _boxes(effects, own, measures),
                _mean(effects, own, lambda i: effects[i].degeneration.repeated_4grams),
            )
        )
    return rows


def _figure(effects: Sequence[Effect], rows: Sequence[tuple[int, float, float]]) -> Figure | None:
    """Σ top / Σ bottom of (effect, top, bottom), resampled by patient."""
    if not rows or not sum(bottom for _, _, bottom in rows):
        return None
    codes, n_patients = patient_codes([effects[i].patient for i, _, _ in rows])
    sums = torch.zeros(2, n_patients, dtype=torch.float64)
    sums.index_add_(1, codes, torch.tensor([row[1:] for row in rows], dtype=torch.float64).T)
    n = round(sum(bottom for _, _, bottom in rows))
    return ratio(sums[0], sums[1], n, patient_draws(n_patients))


def _mean(
    effects: Sequence[Effect], own: Sequence[int], value: Callable[[int], float | None]
) -> Figure | None:
    found = [(i, value(i)) for i in own]
    return _figure(effects, [(i, v, 1.0) for i, v in found if v is not None])


def _geometric(
    effects: Sequence[Effect], own: Sequence[int], value: Callable[[int], float | None]
) -> Figure | None:
    found = _mean(effects, own, lambda i: None if (v := value(i)) is None else math.log(v))
    if found is None:
        return None
    return Figure(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def _share(
    effects: Sequence[Effect], told: Sequence[tuple[int, Sequence[bool | None]]]
) -> Figure | None:
    known = [(i, [v for v in verdicts if v is not None]) for i, verdicts in told]
    return _figure(effects, [(i, float(sum(v)), float(len(v))) for i, v in known if v])


def _boxes(
    effects: Sequence[Effect], own: Sequence[int], measures: Sequence[Measures]
) -> Figure | None:
    found = [(i, [shift.iou for shift in measures[i].boxes]) for i in own]
    return _figure(effects, [(i, sum(v), float(len(v))) for i, v in found if v])
