"""Activations of latents without their zeros, and rows pooled into studies.

A latent is silent on most rows, so what is kept is its other rows: 200,000 rows of 4,096 latents,
32 of them active at a time, take 50 MB.

Letters: n rows, F latents, L factors, S groups.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.files import ConfigError
from hooks.studies import split_of


class Latents(NamedTuple):
    """Activations of F latents on n rows, without their zeros, latent by latent."""

    n_rows: int
    starts: Int[Tensor, " F+1"]
    """Entries `starts[f]:starts[f + 1]` are those of latent `f`, by row."""
    rows: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.starts) - 1

    @property
    def owner(self) -> Int[Tensor, " entries"]:
        """The latent of every entry."""
        return torch.repeat_interleave(torch.arange(self.n_latents), self.starts.diff())

    def sums(self, numbers: Float[Tensor, " entries"]) -> Float[Tensor, " F"]:
        """Sum of a number for each entry, by latent, in float64."""
        out = torch.zeros(self.n_latents, dtype=torch.float64)
        return out.index_add_(0, self.owner, numbers.double())

    def take(self, chosen: Bool[Tensor, " n"]) -> "Latents":
        """The chosen rows, numbered anew."""
        kept = chosen[self.rows.long()]
        before = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])
        numbers = (chosen.cumsum(0) - 1).int()
        return Latents(
            n_rows=int(chosen.sum()),
            starts=before[self.starts],
            rows=numbers[self.rows[kept].long()],
            values=self.values[kept],
        )

    def dense(self, latents: Sequence[int]) -> Float[Tensor, "n k"]:
        """All rows of a few latents, zeros included."""
        out = torch.zeros(self.n_rows, len(latents))
        for column, latent in enumerate(latents):
            own = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
            out[self.rows[own].long(), column] = self.values[own]
        return out


def gather(batches: Tensor | Iterable[Tensor]) -> Latents:
    """Activations without their zeros.

    Args:
        batches: activations [rows, F], whole or in batches of rows in order, such as
            `sae.encode(x)` of one batch after another.

    Raises:
        ConfigError: there are no rows, widths differ, or an activation is not finite.

    >>> gather(torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]])).n_latents
    2
    """
    if isinstance(batches, Tensor):
        batches = batches.split(8192)
    rows, columns, values, n_rows, width = [], [], [], 0, None
    for batch in batches:
        found = batch.detach().cpu().float()
        if width not in (None, found.shape[1]):
            raise ConfigError(f"a batch has {found.shape[1]} latents after {width}; use one width")
        width = found.shape[1]
        row, column = found.nonzero(as_tuple=True)
        values.append(found[row, column])
        if not values[-1].isfinite().all():
            raise ConfigError(f"rows from {n_rows} on hold NaN or infinity; mend the activations")
        rows.append((row + n_rows).int())
        columns.append(column.int())
        n_rows += len(found)
    if not n_rows or width is None:
        raise ConfigError("there are no rows of activations; give at least one")
    column = torch.cat(columns)
    order = column.argsort(stable=True)
    counts = torch.bincount(column, minlength=width)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return Latents(n_rows, starts, torch.cat(rows)[order], torch.cat(values)[order])


def heldout_rows(patients: Sequence[str], fraction: float = 0.2) -> Bool[Tensor, " n"]:
    """Which rows are held out, by their patients, so that no patient is on both sides.

    Args:
        patients: the patient of every row.
        fraction: of patients, see `hooks.studies.split_of`.
    """
    sides = {patient: split_of(patient, fraction) == "heldout" for patient in set(patients)}
    return torch.tensor([sides[patient] for patient in patients], dtype=torch.bool)


class Pooled(NamedTuple):
    """Groups of rows made into one row each."""

    groups: list[str]
    """In the order in which they first come."""
    latents: Latents
    """The largest activation in the group [S, F]."""
    truth: Bool[Tensor, "S L"]
    """Whether any of the group's rows carries the factor."""


def pool(latents: Tensor | Latents, truth: Bool[Tensor, "n L"], groups: Sequence[str]) -> Pooled:
    """One row for each group, such as a study: the largest activation, any of the factors.

    Args:
        latents: [n, F], of the rows that count; choose them by role first.
        truth: which rows carry which factor.
        groups: the group of every row.

    Raises:
        ConfigError: the numbers of rows differ.
    """
    latents = sparse(latents)
    names = list(dict.fromkeys(groups))
    if not len(groups) == len(truth) == latents.n_rows:
        raise ConfigError(
            f"{latents.n_rows} rows of latents, {len(truth)} of truth and {len(groups)} of groups; "
            "give one of each a row"
        )
    numbers = {name: i for i, name in enumerate(names)}
    group = torch.tensor([numbers[name] for name in groups])
    any_of = torch.zeros(len(names), truth.shape[1], dtype=torch.long)
    any_of.index_add_(0, group, truth.long())

    cell, place, count = torch.unique(
        latents.owner * len(names) + group[latents.rows.long()],
        return_inverse=True,
        return_counts=True,
    )
    largest = torch.full((len(cell),), -torch.inf)
    largest.scatter_reduce_(0, place, latents.values, reduce="amax")
    silent_somewhere = count < torch.bincount(group)[cell % len(names)]
    largest = torch.where(silent_somewhere, largest.clamp_min(0), largest)
    kept = largest != 0
    cell, largest = cell[kept], largest[kept]
    counts = torch.bincount(cell // len(names), minlength=latents.n_latents)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    pooled = Latents(len(names), starts, (cell % len(names)).int(), largest)
    return Pooled(names, pooled, any_of > 0)


def sparse(latents: Tensor | Latents) -> Latents:
    """Either kind of activations without its zeros."""
    return latents if isinstance(latents, Latents) else gather(latents)
