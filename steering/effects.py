"""What steering changed, what else it changed, and how both grow with strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae.intervals import Figure, patient_codes, patient_draws, ratio
from steering.degeneration import Degeneration, degeneration
from steering.sentences import Alignment, Judge, align, by_rule


@dataclass(frozen=True)
class Effect:
    """One study's report under one arm, beside the plain one."""

    study: str
    patient: str
    arm: str
    """``steered``, or a control such as ``random``."""
    strength: float
    before: str
    after: str
    alignment: Alignment
    on_target: tuple[str, ...]
    """Changed sentences about the concept that was steered."""
    side_effects: tuple[str, ...]
    """All other changed sentences."""
    degeneration: Degeneration

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "degeneration": self.degeneration._asdict()}


def effect(
    study: str,
    patient: str,
    arm: str,
    strength: float,
    before: str,
    after: str,
    is_target: Callable[[str], bool],
    judge: Judge = by_rule,
) -> Effect:
    """Compare a steered report with the plain one.

    Parameters
    ----------
    is_target
        Whether a sentence is about the steered concept.
    """
    found = align(before, after, judge)
    changes = found.changes
    return Effect(
        study,
        patient,
        arm,
        strength,
        before,
        after,
        found,
        tuple(text for text in changes if is_target(text)),
        tuple(text for text in changes if not is_target(text)),
        degeneration(after),
    )


@dataclass(frozen=True)
class Dose:
    """Effects of one arm at one strength, with intervals over patients."""

    arm: str
    strength: float
    on_target: Figure
    """Share of studies with a changed sentence about the concept."""
    side_effects: Figure
    """Changed sentences about anything else, per sentence of the plain report."""
    repeated_4grams: Figure


def dose_response(effects: Sequence[Effect]) -> list[Dose]:
    """One point for each arm and strength, strengths ascending."""
    groups: dict[tuple[str, float], list[Effect]] = {}
    for one in effects:
        groups.setdefault((one.arm, one.strength), []).append(one)
    return [_dose(arm, s, groups[arm, s]) for arm, s in sorted(groups)]


def _dose(arm: str, strength: float, effects: Sequence[Effect]) -> Dose:
    codes, n_patients = patient_codes([one.patient for one in effects])
    draws = patient_draws(n_patients)

    def share(top: Sequence[float], bottom: Sequence[float]) -> Figure:
        above, below = (
            torch.zeros(n_patients, dtype=torch.float64).index_add_(
                0, codes, torch.tensor(values, dtype=torch.float64)
            )
            for values in (top, bottom)
        )
        return ratio(above, below, len(effects), draws)

    one_each = [1.0] * len(effects)
    return Dose(
        arm,
        strength,
        share([float(bool(e.on_target)) for e in effects], one_each),
        share(
            [float(len(e.side_effects)) for e in effects],
            [float(e.alignment.n_before) for e in effects],
        ),
        share([e.degeneration.repeated_4grams for e in effects], one_each),
    )


def names_any(words: Sequence[str]) -> Callable[[str], bool]:
    """A target given by words: a sentence is about it if it has one of them.

    >>> names_any(["effusion"])("Left pleural Effusion."), names_any(["heart"])("No effusion.")
    (True, False)
    """
    wanted = [word.lower() for word in words]
    return lambda sentence: any(word in sentence.lower() for word in wanted)


def records(doses: Sequence[Dose]) -> list[Mapping[str, Any]]:
    """Doses for JSON."""
    return [
        {
            "arm": dose.arm,
            "strength": dose.strength,
            "on_target": dose.on_target.record(),
            "side_effects": dose.side_effects.record(),
            "repeated_4grams": dose.repeated_4grams.record(),
        }
        for dose in doses
    ]
