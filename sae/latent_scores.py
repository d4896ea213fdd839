"""How well single latents know factors: the best one for each, and one to one.

Everything here takes rows, whatever a row is: a token, a patch, or a study (`latents.pool`).
Latents are chosen and thresholds set on training rows; scores are of held-out rows.

Letters: n rows, F latents, L factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.files import ConfigError
from sae.latents import Latents, sparse

_BLOCK = 2**22  # entries ranked at a time


def auroc(scores: Float[Tensor, "S F"], labels: Bool[Tensor, " S"]) -> Float[Tensor, " F"]:
    """Area under the ROC curve of every column; ties count one half. NaN with one class only.

    >>> auroc(torch.tensor([[0.1], [0.4], [0.3], [0.9]]), torch.tensor([False, False, True, True]))
    tensor([0.7500])
    """
    positive, negative = scores[labels].T.contiguous(), scores[~labels].T.contiguous()
    if positive.shape[1] == 0 or negative.shape[1] == 0:
        return torch.full((scores.shape[1],), float("nan"))
    negative = negative.sort(dim=1).values
    below = torch.searchsorted(negative, positive, right=False)
    not_above = torch.searchsorted(negative, positive, right=True)
    wins = (below + not_above).double().sum(dim=1) / 2
    return (wins / (positive.shape[1] * negative.shape[1])).float()


class Sides(NamedTuple):
    """Latents and truth of the training rows, and of the held-out ones."""

    train: Latents
    test: Latents
    train_truth: Bool[Tensor, "n L"]
    test_truth: Bool[Tensor, "n L"]


def split(latents: Tensor | Latents, truth: Tensor, heldout: Tensor) -> Sides:
    latents = sparse(latents)
    if truth.ndim != 2 or not latents.n_rows == len(truth) == len(heldout):
        raise ConfigError(
            f"{latents.n_rows} rows of latents, truth {tuple(truth.shape)} and {len(heldout)} of "
            "heldout; give one row of each, and truth as [n, L]"
        )
    for side, chosen in (("training", ~heldout), ("held-out", heldout)):
        carried, n = truth[chosen].sum(0), int(chosen.sum())
        bad = ((carried == 0) | (carried == n)).nonzero().flatten().tolist()
        if bad or not n:
            which = f"factor {bad[0]}" if bad else "a factor"
            raise ConfigError(
                f"{which} is carried by {int(carried[bad[0]]) if bad else 0} of {n} {side} rows; "
                "give more studies, or only the columns that scorable() allows"
            )
    return Sides(latents.take(~heldout), latents.take(heldout), truth[~heldout], truth[heldout])


def scorable(
    truth: Bool[Tensor, "n L"], heldout: Bool[Tensor, " n"], least: int = 10
) -> Bool[Tensor, " L"]:
    """Which factors at least `least` rows carry, and as many do not, on both sides."""
    found = torch.ones(truth.shape[1], dtype=torch.bool)
    for chosen in (heldout, ~heldout):
        carried = truth[chosen].sum(0)
        found &= (carried >= least) & (int(chosen.sum()) - carried >= least)
    return found


def aurocs(latents: Tensor | Latents, truth: Bool[Tensor, "n L"]) -> Float[Tensor, "F L"]:
    """Area under the ROC curve of every latent for every factor; ties count one half.

    The same as `auroc`, by the rank sum of Mann and Whitney over the entries that are not
    zero. NaN where a factor is carried by no row or by all.
    """
    latents = sparse(latents)
    n, out = latents.n_rows, torch.empty(latents.n_latents, truth.shape[1])
    first = 0
    while first < latents.n_latents:
        limit = latents.starts[first] + _BLOCK
        last = max(int(torch.searchsorted(latents.starts, limit, right=True)) - 1, first + 1)
        own = slice(int(latents.starts[first]), int(latents.starts[last]))
        row, counts = latents.rows[own].long(), latents.starts[first : last + 1].diff()
        column, rank, of_zeros = _ranks(latents.values[own], counts, n)
        for factor in range(truth.shape[1]):
            carried = truth[row, factor]
            n_true = int(truth[:, factor].sum())
            active = torch.bincount(column[carried], minlength=last - first)
            total = torch.zeros(last - first, dtype=torch.float64)
            total.index_add_(0, column[carried], rank[carried])
            total += (n_true - active) * of_zeros
            wins = total - n_true * (n_true + 1) / 2
            cells = n_true * (n - n_true)
            out[first:last, factor] = wins / cells if cells else torch.nan
        first = last
    return out


def _ranks(values: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each entry its latent and its rank from 1 among all n rows, and the rank of zeros.

    Ties have the mean of their ranks.
    """
    width = len(counts)
    column = torch.repeat_interleave(torch.arange(width), counts)
    order = values.argsort(stable=True)
    order = order[column[order].argsort(stable=True)]
    sorted_values = values[order]  # within each latent ascending
    new = torch.ones(len(order), dtype=torch.bool)
    new[1:] = (sorted_values[1:] != sorted_values[:-1]) | (column[1:] != column[:-1])
    begins = new.nonzero().flatten()
    sizes = torch.diff(begins, append=torch.tensor([len(order)]))
    middle = begins + (sizes - 1).double() / 2
    sorted_rank = torch.repeat_interleave(middle, sizes) + 1
    sorted_rank -= (counts.cumsum(0) - counts)[column]
    n_zero = n - counts
    sorted_rank += torch.where(sorted_values > 0, n_zero[column], 0)
    rank = torch.empty(len(order), dtype=torch.float64)
    rank[order] = sorted_rank
    n_below = torch.bincount(column[values < 0], minlength=width)
    return column, rank, n_below + (n_zero + 1).double() / 2


class Knowledge(NamedTuple):
    """What each latent knows best of some factors."""

    factor: Int[Tensor, " F"]
    """Place of the factor with the largest AUROC; -1 where it stays under the floor."""
    auroc: Float[Tensor, " F"]
    """That largest AUROC."""


def best_factors(
    latents: Tensor | Latents, truth: Bool[Tensor, "n L"], floor: float = 0.7
) -> Knowledge:
    """The factor that each latent tells best from its absence; give training rows only.

    Several latents may have the same one: a dictionary splits a factor by size, place or look.

    >>> z = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    >>> truth = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    >>> best_factors(z, truth).factor.tolist()
    [0, 1, 1]
    """
    areas = torch.nan_to_num(aurocs(latents, truth), nan=0.5)
    best, factor = areas.max(1)
    return Knowledge(factor.masked_fill(best < floor, -1), best)


def f1(predicted: Bool[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is predicted and nothing true."""
    claims = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / claims if claims else 0.0


def best_threshold(values: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """The threshold t for which `values >= t` has the best F1, half-way to the next value below."""
    values, order = values.double().sort(descending=True)
    hits = truth[order].cumsum(0)
    taken = torch.arange(1, len(values) + 1)
    score = 2 * hits / (taken + hits[-1])
    tied = torch.zeros(len(values), dtype=torch.bool)
    tied[:-1] = values[1:] == values[:-1]
    best = int(score.masked_fill(tied, -1).argmax())
    below = values[min(best + 1, len(values) - 1)]
    return float((values[best] + below) / 2)


class LatentScore(NamedTuple):
    """One latent as the sign of one factor."""

    latent: int
    auroc: float
    """On held-out rows."""
    f1: float
    """On held-out rows, at the threshold."""
    threshold: float
    """With the best F1 on training rows."""
    auroc_chosen_on: float
    """On the training rows it was chosen on."""
    n: int
    """Held-out rows."""
    n_positive: int
    """Held-out rows that carry the factor."""


def best_latents(
    latents: Tensor | Latents, truth: Bool[Tensor, "n L"], heldout: Bool[Tensor, " n"]
) -> list[LatentScore]:
    """For each factor the latent of highest AUROC on training rows, measured on held-out rows.

    Args:
        latents: activations [n, F].
        truth: which rows carry which factor.
        heldout: which rows are held out; no patient on both sides (`heldout_rows`).

    Returns:
        One score a factor, in the order of the columns of `truth`.

    Raises:
        ConfigError: the numbers of rows differ, or a factor has one class on a side.
    """
    sides = split(latents, truth, heldout)
    on_train = aurocs(sides.train, sides.train_truth)
    return _measure(sides, on_train, on_train.argmax(0).tolist())


def _measure(sides: Sides, on_train: Tensor, chosen: Sequence[int]) -> list[LatentScore]:
    scores = []
    for factor, latent in enumerate(chosen):
        truth = sides.test_truth[:, factor]
        values = sides.test.dense([latent])
        train = sides.train.dense([latent])[:, 0]
        threshold = best_threshold(train, sides.train_truth[:, factor])
        scores.append(
            LatentScore(
                latent=latent,
                auroc=float(auroc(values, truth)[0]),
                f1=f1(values[:, 0].double() >= threshold, truth),
                threshold=threshold,
                auroc_chosen_on=float(on_train[latent, factor]),
                n=len(truth),
                n_positive=int(truth.sum()),
            )
        )
    return scores


class Matching(NamedTuple):
    """Factors and latents one to one."""

    scores: list[LatentScore]
    """In the order of the factors; no latent twice."""
    auroc: float
    """Mean over factors, on held-out rows."""
    f1: float
    """Mean over factors, on held-out rows."""


def match_latents(
    latents: Tensor | Latents, truth: Bool[Tensor, "n L"], heldout: Bool[Tensor, " n"]
) -> Matching:
    """Give every factor a latent of its own, so that the sum of training AUROCs is greatest.

    What `best_latents` scores, a dictionary of one latent for all factors could have; this it
    could not. Arguments and errors as there; and there must be as many latents as factors.
    """
    sides = split(latents, truth, heldout)
    on_train = aurocs(sides.train, sides.train_truth)
    scores = _measure(sides, on_train, assign(on_train.double().numpy()).tolist())
    mean = [sum(getattr(score, name) for score in scores) / len(scores) for name in ("auroc", "f1")]
    return Matching(scores, *mean)


def assign(scores: np.ndarray) -> np.ndarray:
    """The assignment of greatest sum (Kuhn 1955), by shortest augmenting paths.

    Args:
        scores: float (F, L), finite, with F >= L.

    Returns:
        int (L,): the row given to each column, none twice.

    Raises:
        ConfigError: there are fewer rows than columns, or a score is not finite.

    Example:
        >>> assign(np.array([[0.9, 0.8], [0.7, 0.1]])).tolist()
        [1, 0]
    """
    n_rows, n_columns = scores.shape
    if n_rows < n_columns or not np.isfinite(scores).all():
        raise ConfigError(
            f"{n_rows} latents for {n_columns} factors, finite: {np.isfinite(scores).all()}; give "
            "at least as many latents as factors, and finite scores"
        )
    # Prices of rows and columns keep every reduced cost at 0 or above, so the shortest path from
    # a factor to a free latent never makes the sum worse than it must be.
    cost = -scores.T.astype(np.float64)
    of_factor, of_latent = cost.min(1), np.zeros(n_rows)
    taker = np.full(n_rows, -1)
    # Whoever is first to ask for its best latent has it at once; most of two alike dictionaries do.
    latents, factors = np.unique(cost.argmin(1), return_index=True)
    taker[latents] = factors
    for factor in np.setdiff1d(np.arange(n_columns), factors):
        distance, previous = np.full(n_rows, np.inf), np.full(n_rows, -1)
        settled = np.zeros(n_rows, bool)
        here, reached, current = -1, 0.0, factor
        while current >= 0:
            through = reached + cost[current] - of_factor[current] - of_latent
            nearer = ~settled & (through < distance)
            distance[nearer], previous[nearer] = through[nearer], here
            here = int(np.where(settled, np.inf, distance).argmin())
            reached, current = distance[here], taker[here]
            settled[here] = True
        taken = settled & (taker >= 0)
        of_factor[factor] += reached
        of_factor[taker[taken]] += reached - distance[taken]
        of_latent[taken] -= reached - distance[taken]
        while here >= 0:
            before = previous[here]
            taker[here] = taker[before] if before >= 0 else factor
            here = before
    out = np.empty(n_columns, np.int64)
    out[taker[taker >= 0]] = np.flatnonzero(taker >= 0)
    return out
