"""Latents that appear, vanish or change between the prior and the current frontal film."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float

from hooks.files import ConfigError
from hooks.studies import Study
from sae.latent_scores import auroc
from steering.search import Index


class Highlight(NamedTuple):
    """One latent on two films."""

    latent: int
    before: float
    """Largest activation on the prior film."""
    now: float
    """Largest activation on the current one."""
    share: float
    """Difference in units of the latent's largest activation in the index."""
    kind: Literal["appears", "vanishes", "grows", "shrinks"]


class Pairs(NamedTuple):
    """Studies with a prior film: P pairs, F latents."""

    studies: list[str]
    patients: list[str]
    before: Float[torch.Tensor, "P F"]
    now: Float[torch.Tensor, "P F"]
    scale: Float[torch.Tensor, " F"]
    """Largest activation on frontal films of the index."""

    @property
    def shares(self) -> Float[torch.Tensor, "P F"]:
        """Change of each latent in units of its scale."""
        return (self.now - self.before) / self.scale.clamp_min(1e-12)

    def highlights(
        self, study: str, k: int = 10, among: Collection[int] | None = None
    ) -> list[Highlight]:
        """The ``k`` latents that change most in one study, of those that do.

        Parameters
        ----------
        among
            Only these latents, such as those with a label.
        """
        if study not in self.studies:
            raise ConfigError(f"study {study!r} has no pair of films here; choose one with a prior")
        i = self.studies.index(study)
        share = self.shares[i]
        out = []
        for latent in share.abs().argsort(descending=True, stable=True).tolist():
            if share[latent] == 0 or len(out) == k:
                break
            if among is not None and latent not in among:
                continue
            before, now = float(self.before[i, latent]), float(self.now[i, latent])
            kind = "grows" if now > before else "shrinks"
            kind = "appears" if before == 0 else "vanishes" if now == 0 else kind
            out.append(Highlight(latent, before, now, float(share[latent]), kind))
        return out


def film_pairs(index: Index) -> Pairs:
    """Every study of the index that has a frontal and a prior film."""
    names, now = index.take("frontal")
    older, before = index.take("prior")
    at = {name: i for i, (name, _) in enumerate(older)}
    paired = [i for i, (name, _) in enumerate(names) if name in at]
    return Pairs(
        [names[i][0] for i in paired],
        [names[i][1] for i in paired],
        before[[at[names[i][0]] for i in paired]],
        now[paired],
        now.amax(0),
    )


Direction = Literal["improving", "stable", "worsening"]
DIRECTIONS: tuple[Direction, ...] = ("improving", "stable", "worsening")


class Progression(NamedTuple):
    """How one latent's change between two films agrees with what a finding did between them."""

    latent: int
    worsening_above: float
    """Share from which the change is called worsening; chosen with the latent."""
    improving_below: float
    """Share down to which it is called improving."""

    def call(self, shares: Float[torch.Tensor, "P F"]) -> list[Direction]:
        """The direction that each pair's change is called."""
        own = shares[:, self.latent].tolist()
        return [
            "worsening"
            if share >= self.worsening_above
            else "improving"
            if share <= self.improving_below
            else "stable"
            for share in own
        ]


class Agreement(NamedTuple):
    """Calls beside a data set's labels, on pairs that were not chosen on."""

    macro_accuracy: float
    """Mean over the directions that occur of the share that is called right, as MS-CXR-T is scored
    (Bannur et al., arXiv 2301.04558); chance is 1/3 where all three occur."""
    counts: Mapping[Direction, Mapping[Direction, int]]
    """Label, then call."""


def fit_progression(
    shares: Float[torch.Tensor, "P F"], labels: Sequence[Direction], steps: int = 64
) -> Progression:
    """The latent whose change tells a finding's directions apart best, and where they part.

    The latent has the largest mean AUROC of worsening and improving, each against the other pairs.
    A latent that knows best *whether* a finding is there need not be it: one for small effusions
    falls when an effusion grows. Then come the cuts, by macro accuracy over ``steps`` quantiles.

    Raises
    ------
    ConfigError
        If no pair worsens, or none improves.
    """
    _check_directions(shares, labels)
    at = {name: torch.tensor([label == name for label in labels]) for name in DIRECTIONS}
    for name in ("worsening", "improving"):
        if not at[name].any() or at[name].all():
            raise ConfigError(
                f"{int(at[name].sum())} of {len(labels)} pairs are {name}; give pairs of both kinds"
            )
    both = torch.stack([at["worsening"], at["improving"]], 1)
    area = auroc(shares, both[:, 0]) + auroc(-shares, both[:, 1])
    latent = int(area.argmax())
    own = shares[:, latent].double()
    cuts = torch.quantile(own, torch.linspace(0, 1, steps, dtype=own.dtype)).unique()
    up, down = cuts[cuts > 0], cuts[cuts < 0]
    up = torch.cat([up, own.new_tensor([1e-9])])
    down = torch.cat([down, own.new_tensor([-1e-9])])
    right_up = (own >= up[:, None])[:, at["worsening"]].double().mean(1)
    right_down = (own <= down[:, None])[:, at["improving"]].double().mean(1)
    total = right_up[:, None] + right_down
    if at["stable"].any():
        still = own[at["stable"]]
        inside = (still < up[:, None, None]) & (still > down[None, :, None])
        total = total + inside.double().mean(-1)
    best = int(total.argmax())
    return Progression(latent, float(up[best // len(down)]), float(down[best % len(down)]))


def agreement(
    progression: Progression, shares: Float[torch.Tensor, "P F"], labels: Sequence[Direction]
) -> Agreement:
    """How often the calls are right, in the manner of MS-CXR-T (`hooks.studies.Study.changes`)."""
    _check_directions(shares, labels)
    called = progression.call(shares)
    counts: dict[Direction, dict[Direction, int]] = {
        label: dict.fromkeys(DIRECTIONS, 0) for label in DIRECTIONS
    }
    for label, call in zip(labels, called, strict=True):
        counts[label][call] += 1
    rates = [row[name] / sum(row.values()) for name, row in counts.items() if sum(row.values())]
    return Agreement(sum(rates) / len(rates), counts)


def labelled(pairs: Pairs, studies: Iterable[Study], finding: str) -> tuple[list[int], list[Any]]:
    """Places of the pairs for which a study says what a finding did, and what it did."""
    said = {
        study.id: change.direction
        for study in studies
        for change in study.changes
        if change.finding == finding
    }
    places = [i for i, name in enumerate(pairs.studies) if name in said]
    return places, [said[pairs.studies[i]] for i in places]


def _check_directions(shares: torch.Tensor, labels: Sequence[str]) -> None:
    bad = [label for label in labels if label not in DIRECTIONS]
    if bad:
        raise ConfigError(f"a direction is {bad[0]!r}; write one of {', '.join(DIRECTIONS)}")
    if len(labels) != len(shares) or not len(labels):
        raise ConfigError(f"{len(labels)} labels for {len(shares)} pairs; give one for each")
