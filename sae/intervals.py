"""95 % intervals by resampling patients, whose tokens and studies are not independent.

Letters: B draws, P patients, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DRAWS = 1000
_BLOCK = 2**22  # weights gathered at a time


class Figure(NamedTuple):
    """A number with what it rests on."""

    value: float
    low: float
    """2.5th percentile over draws."""
    high: float
    """97.5th percentile."""
    n: int
    """Of what it is a mean: tokens, studies or latents."""

    def record(self) -> dict[str, Any]:
        """For JSON, where infinities and NaN become null."""
        numbers = self._asdict()
        return {
            k: v if isinstance(v, int) or abs(v) < float("inf") else None
            for k, v in numbers.items()
        }


def patient_draws(n_patients: int, draws: int = DRAWS, seed: int = 0) -> Float[Tensor, "B P"]:
    """How often each patient is drawn, of as many draws with replacement as there are patients.

    A single patient says nothing of others: there are then no draws, and intervals are NaN.
    """
    if n_patients < 2:
        draws = 0
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(n_patients, (draws, n_patients), generator=generator)
    counts = torch.zeros(draws, n_patients, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))


def ratio(
    numerator: Float[Tensor, " P"],
    denominator: Float[Tensor, " P"],
    n: int,
    draws: Float[Tensor, "B P"],
) -> Figure:
    """Σ numerator / Σ denominator over patients; draws whose denominator is 0 are left out."""
    top, bottom = numerator.double(), denominator.double()
    below = draws @ bottom
    values = (draws @ top)[below != 0] / below[below != 0]
    whole = float(bottom.sum())
    return _figure(float(top.sum()) / whole if whole != 0 else float("inf"), values, n)


def auroc_interval(
    scores: Float[Tensor, " n"],
    labels: Bool[Tensor, " n"],
    patient: Int[Tensor, " n"],
    draws: Float[Tensor, "B P"],
) -> Figure:
    """Area under the ROC curve; ties count one half, draws of one class only are left out."""
    cell = torch.unique(scores, return_inverse=True)[1]  # ascending, ties in one cell
    size = int(cell.max()) + 1
    value = _areas(cell, size, labels, torch.ones(1, len(scores), dtype=draws.dtype))
    step = max(1, _BLOCK // len(scores))
    drawn = [_areas(cell, size, labels, some[:, patient]) for some in draws.split(step)]
    return _figure(float(value[0]) if len(value) else float("nan"), torch.cat(drawn), len(scores))


def _areas(cell: Tensor, size: int, labels: Tensor, weights: Tensor) -> Tensor:
    """One area for each row of weights ``[B, n]`` that leaves both classes."""
    positive = weights.new_zeros(len(weights), size).index_add_(1, cell[labels], weights[:, labels])
    negative = weights.new_zeros(len(weights), size)
    negative.index_add_(1, cell[~labels], weights[:, ~labels])
    wins = (positive * (negative.cumsum(1) - negative / 2)).sum(1)
    pairs = positive.sum(1) * negative.sum(1)
    return wins[pairs > 0] / pairs[pairs > 0]


def mean_interval(values: Float[Tensor, " n"], draws: int = DRAWS, seed: int = 0) -> Figure:
    """Mean of independent values, each drawn by itself."""
    counts = patient_draws(len(values), draws, seed)
    return ratio(values.double(), torch.ones(len(values)), len(values), counts)


def patient_codes(patients: Sequence[str]) -> tuple[Int[Tensor, " n"], int]:
    """A number for every row's patient, and how many patients there are."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(patients))}
    return torch.tensor([numbers[name] for name in patients], dtype=torch.long), len(numbers)


def _figure(value: float, values: Tensor, n: int) -> Figure:
    if not len(values):
        return Figure(value, float("nan"), float("nan"), n)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Figure(value, low, high, n)
