"""95 % intervals by resampling patients, whose tokens and studies are not independent.

Letters: B draws, P patients, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.files import ConfigError

DRAWS = 1000


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

    Raises
    ------
    ConfigError
        With fewer than two patients, who would give an interval of no width.
    """
    if n_patients < 2:
        raise ConfigError(
            f"{n_patients} held-out patients give no interval; harvest more, or raise the "
            "held-out share"
        )
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
    values = (draws @ top)[below > 0] / below[below > 0]
    whole = float(bottom.sum())
    return _figure(float(top.sum()) / whole if whole > 0 else float("inf"), values, n)


def auroc_interval(
    scores: Float[Tensor, " n"],
    labels: Bool[Tensor, " n"],
    patient: Int[Tensor, " n"],
    draws: Float[Tensor, "B P"],
) -> Figure:
    """Area under the ROC curve; ties count one half, draws of one class only are left out."""
    cell = torch.unique(scores, return_inverse=True)[1]  # ascending, ties in one cell
    everyone = torch.ones(1, draws.shape[1], dtype=draws.dtype)
    areas = []
    for weights in (everyone, draws):
        rows = weights[:, patient]
        size = int(cell.max()) + 1
        cells = torch.zeros(2, len(rows), size, dtype=draws.dtype)
        cells[0].index_add_(1, cell[labels], rows[:, labels])
        cells[1].index_add_(1, cell[~labels], rows[:, ~labels])
        positive, negative = cells
        below = negative.cumsum(1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        areas.append(((positive * below).sum(1)[pairs > 0], pairs[pairs > 0]))
    (whole, pairs), (wins, all_pairs) = areas
    value = float(whole[0] / pairs[0]) if len(pairs) else float("nan")
    return _figure(value, wins / all_pairs, len(scores))


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
