"""Reconstruction metrics over any number of batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.html import bars, facts
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE
from sae.stream import Batch


class Quality(NamedTuple):
    """How well a dictionary reconstructs a set of tokens."""

    n_tokens: int
    fvu: float
    """Fraction of variance unexplained, ``Σ‖x − x̂‖² / Σ‖x − x̄‖²`` with the mean of all tokens."""
    l0: float
    """Mean active latents per token."""
    dead_fraction: float
    """Latents that fire on none of the tokens."""
    firing_rates: Float[Tensor, " F"]
    """Fraction of the tokens on which each latent fires."""

    def _repr_html_(self) -> str:
        shown = {
            "tokens": self.n_tokens,
            "FVU": self.fvu,
            "L0": self.l0,
            "dead": f"{self.dead_fraction:.2%} of {len(self.firing_rates):,}",
        }
        exponents = torch.log10(self.firing_rates[self.firing_rates > 0]).floor().int()
        decades = range(-6, 0)
        counts = [int((exponents.clamp(-6, -1) == e).sum()) for e in decades]
        labels = [f"{10.0**e:g} to {10.0 ** (e + 1):g}" for e in decades]
        return facts("Quality", shown) + bars(counts, labels, "latents by firing rate")

    def summary(self) -> dict[str, float | int]:
        """The scalars, for JSON."""
        return {n: v for n, v in self._asdict().items() if not isinstance(v, Tensor)}


class QualityMeter:
    """Accumulates :class:`Quality` in float64."""

    def __init__(self, d_model: int, n_latents: int) -> None:
        self.n = 0
        self.error = 0.0
        self.squares = 0.0
        self.sum = torch.zeros(d_model, dtype=torch.float64)
        self.fired = torch.zeros(n_latents, dtype=torch.float64)

    def update(
        self,
        x: Float[Tensor, "batch d"],
        reconstruction: Float[Tensor, "batch d"],
        z: Float[Tensor, "batch F"],
    ) -> None:
        """Add a batch."""
        exact = x.double()
        self.n += len(x)
        self.error += float((exact - reconstruction.double()).square().sum())
        self.squares += float(exact.square().sum())
        self.sum += exact.sum(dim=0).cpu()
        self.fired += (z > 0).sum(dim=0).cpu()

    def compute(self) -> Quality:
        """Metrics of everything added; FVU is infinite when the tokens do not vary."""
        total = self.squares - float(self.sum.square().sum()) / max(self.n, 1)
        rates = self.fired / max(self.n, 1)
        return Quality(
            n_tokens=self.n,
            fvu=self.error / total if total > 0 else float("inf"),
            l0=float(rates.sum()),
            dead_fraction=float((self.fired == 0).double().mean()),
            firing_rates=rates.float(),
        )


@torch.no_grad()
def measure_by_role(
    sae: MatryoshkaSAE, site: str, batches: Iterable[Batch], limit: int | None = None
) -> tuple[Quality, dict[str, Quality]]:
    """:class:`Quality` of ``sae`` at inference on the first ``limit`` rows, overall and by role.

    The variance of a role's FVU is about the mean of that role's own rows.
    """
    shape = (sae.config.d_model, sae.config.n_latents)
    every, roles = QualityMeter(*shape), {}
    for batch in batches:
        left = None if limit is None else limit - every.n
        x, role = batch.x[site][:left].to(sae.W_dec), batch.roles[:left]
        z = sae.encode(x)
        reconstruction = sae.decode(z)
        every.update(x, reconstruction, z)
        for one in Role:
            own = (role == int(one)).to(x.device)
            if own.any():
                meter = roles.setdefault(one.name.lower(), QualityMeter(*shape))
                meter.update(x[own], reconstruction[own], z[own])
        if every.n == limit:
            break
    return every.compute(), {name: meter.compute() for name, meter in roles.items()}


@torch.no_grad()
def measure(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    site: str,
    chosen: np.ndarray,
    batch: int = 4096,
) -> Quality:
    """:class:`Quality` of ``sae`` at inference on the chosen rows (mask ``[n_tokens]``).

    >>> from phantom.tour import activations, dictionary
    >>> acts, site = activations(), "llm.3.resid_post"
    >>> quality = measure(dictionary(), acts, site, acts.heldout(0.3))
    >>> quality.n_tokens > 0 and 0 < quality.fvu
    True
    """
    folder.check_trained(sae.config.policy)
    meter = QualityMeter(sae.config.d_model, sae.config.n_latents)
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        mask = torch.from_numpy(chosen[start:stop])
        if mask.any():
            x = folder.rows(site, start, stop)[mask].to(sae.W_dec)
            z = sae.encode(x)
            meter.update(x, sae.decode(z), z)
    return meter.compute()
