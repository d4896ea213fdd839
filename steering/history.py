"""Latents that appear, vanish or change between the prior and the current frontal film."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float

from hooks.files import ConfigError
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

    def highlights(self, study: str, k: int = 10) -> list[Highlight]:
        """The ``k`` latents that change most in one study, of those that do."""
        if study not in self.studies:
            raise ConfigError(f"study {study!r} has no pair of films here; choose one with a prior")
        i = self.studies.index(study)
        share = self.shares[i]
        out = []
        for latent in share.abs().argsort(descending=True, stable=True)[:k].tolist():
            if share[latent] == 0:
                break
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
