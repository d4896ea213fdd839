"""Mean-difference steering of the phantom at every site, and on which patches a finding is written.

Everything here runs on training studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.sites import resolve_site, rewrite
from maira_sae.phantom_bench import Bench
from maira_sae.phantom_trial import Trial
from phantom import PhantomStudy
from sae import MatryoshkaSAE, SAEConfig
from steering import Push

Few = Mapping[bool, Sequence[PhantomStudy]]
"""Training studies in which a finding is to be turned on (True) and off (False)."""


class MeanDifference(NamedTuple):
    """One way to push by a difference of means."""

    site: str
    place: str
    """``film``: the whole film, by the mean over it; else by the mean over the finding's patches.
    """
    strength: float

    def attempt(self, bench: Bench, studies: Sequence[PhantomStudy], label: str, on: bool) -> Trial:
        x = bench.rows[self.site]
        if self.place == "film":
            direction = bench.film_difference(x, label).mean(0)
        else:
            direction = bench.difference(x, label)
        push = Push(direction, self.strength, float(direction.norm()), "mean difference")
        where = bench.places(label)[self.place]
        return bench.attempt(studies, label, [push], where, on, _stand_in(bench, self.site))


class Swept(NamedTuple):
    """What the sweep found."""

    best: dict[bool, MeanDifference]
    """To turn the finding on (True) and off (False)."""
    table: dict[str, dict[str, float]]
    """By site the best share asserted and removed, of training studies."""


def sweep(bench: Bench, label: str, few: Few) -> Swept:
    """Mean-difference steering at every site, place and strength."""
    best: dict[bool, MeanDifference] = {}
    table: dict[str, dict[str, float]] = {site: {} for site in bench.config.sites}
    for on, key, places in (
        (True, "asserted", ("centre", "region", "film")),
        (False, "removed", ("region", "film")),
    ):
        best_score = -np.inf
        for site in bench.config.sites:
            rates = [0.0]
            for place in places:
                for strength in bench.config.strengths:
                    way = MeanDifference(site, place, strength if on else -strength)
                    got = way.attempt(bench, few[on], label, on)
                    rates.append(got.rate)
                    if got.score > best_score + 0.02:
                        best[on], best_score = way, got.score
                    if got.settled:
                        break
                if rates[-1] > 0.98:
                    break
            table[site][key] = max(rates)
    return Swept(best, table)


def written_on(bench: Bench, label: str, few: Few) -> dict[str, dict[str, float]]:
    """On which patches the model finds a finding, by site of the vision tower.

    The mean difference of each patch is added to that patch: on the patches that show the finding
    in at least a tenth of the films that have it, on all others, and on all.

    Returns
    -------
    dict
        By site the share of training studies in which the finding is asserted, by ``own``,
        ``others`` and ``all``.
    """
    often = bench.often(label)
    own = often >= 0.1 * often.max()
    found = {}
    for site in bench.config.sites:
        if not site.startswith("vision."):
            continue
        difference = bench.film_difference(bench.rows[site], label)
        found[site] = {
            name: bench.trial(few[True], label, _adding(bench, site, difference, chosen), True).rate
            for name, chosen in (("own", own), ("others", ~own), ("all", own | ~own))
        }
    return found


def _adding(bench: Bench, site: str, difference: Tensor, chosen: Tensor) -> Any:
    more = difference * chosen[:, None]

    def change(value: Tensor) -> Tensor:  # the CLS token comes first
        return value + torch.nn.functional.pad(more, (0, 0, value.shape[1] - len(more), 0))

    def steering(_: Any) -> AbstractContextManager[None]:
        return rewrite(resolve_site(bench.model, site), change)

    return steering


def _stand_in(bench: Bench, site: str) -> MatryoshkaSAE:
    """A dictionary that only names the site: pushes need none."""
    width = bench.rows[site].shape[-1]
    return MatryoshkaSAE(SAEConfig(width, 8, 1, (8,), site=site), seed=0).eval()
