"""How well codes put held-out rows together again: FVU, L0, cosine, and which features fire.

Letters: n rows, d width, m features, R roles, P patients, B resamples of patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.codes import Code, EvaluationConfig, batches_of
from sae.intervals import Figure, mean_interval, patient_codes, patient_draws, ratio

DENSITY_EDGES = tuple(float(edge) for edge in np.linspace(-7, 0, 29))
"""Of the histogram of log10 firing rates."""


class Tally(NamedTuple):
    """What was counted of one code, by patient and role."""

    roles: tuple[str, ...]
    sums: Float[Tensor, "P R 6"]
    """Rows, squared error, squared distance from the mean of all held-out rows, the same from the
    role's mean, active features, cosines."""
    fired: Float[Tensor, "R m"]
    draws: Float[Tensor, "B P"]
    code: Code

    def rates(self, role: int | None = None) -> Float[Tensor, " m"]:
        """Share of rows each feature fires on."""
        chosen = slice(None) if role is None else slice(role, role + 1)
        rows = self.sums[:, chosen, 0].sum()
        return self.fired[chosen].sum(0) / rows

    def figures(self, role: int | None = None) -> dict[str, Figure]:
        """FVU, L0 and cosine, overall (with the overall mean) or of a role (with its own)."""
        whole = self.sums.sum(1) if role is None else self.sums[:, role]
        rows, error, spread_all, spread_role, active, cosine = whole.T
        n = int(rows.sum())
        return {
            "fvu": ratio(error, spread_all if role is None else spread_role, n, self.draws),
            "l0": ratio(active, rows, n, self.draws),
            "cosine": ratio(cosine, rows, n, self.draws),
        }

    def record(self) -> dict[str, Any]:
        """For JSON; latents only of codes that have any."""
        found: dict[str, Any] = {n: one.record() for n, one in self.figures().items()}
        present = [i for i in range(len(self.roles)) if float(self.sums[:, i, 0].sum()) > 0]
        found["roles"] = {
            self.roles[i]: {n: one.record() for n, one in self.figures(i).items()} for i in present
        }
        if self.code.sae is None:
            return found
        names: list[tuple[dict[str, Any], int | None]] = [(found, None)]
        names += [(found["roles"][self.roles[i]], i) for i in present]
        for target, role in names:
            rates = self.rates(role)
            target["dead_fraction"] = mean_interval((rates == 0).double()).record()
            target["density"] = density(rates)
        return found


def density(rates: Float[Tensor, " F"]) -> dict[str, Any]:
    """Histogram of log10 firing rates; latents that never fire are counted apart.

    >>> density(torch.tensor([0.0, 0.1, 1.0]))["never"]
    1
    """
    alive = rates[rates > 0].double().log10().clamp_min(DENSITY_EDGES[0])
    counts, _ = np.histogram(alive.numpy(), bins=np.array(DENSITY_EDGES))
    return {
        "log10_edges": list(DENSITY_EDGES),
        "counts": counts.tolist(),
        "never": int((rates == 0).sum()),
    }


@torch.no_grad()
def tally(
    beside: Mapping[str, Code],
    folder: ActivationFolder,
    site: str,
    mask: Bool[np.ndarray, " n"],
    config: EvaluationConfig,
) -> dict[str, Tally]:
    """Run every code over the rows of ``mask``, a batch at a time, in two passes."""
    roles = tuple(role.name.lower() for role in Role)
    role_of = torch.tensor([roles.index(name) for name in folder.column("role")])
    patients, n_patients = patient_codes(folder.column("patient")[mask].tolist())
    draws = patient_draws(n_patients, config.draws, config.seed)
    patient_of = torch.full((folder.n_tokens,), -1)
    patient_of[torch.from_numpy(mask)] = patients
    d = folder.width(site)
    totals, counts = torch.zeros(len(roles), d, dtype=torch.float64), torch.zeros(len(roles))
    for x, where in batches_of(folder, site, mask, config.batch):
        totals.index_add_(0, role_of[where], x.double())
        counts += torch.bincount(role_of[where], minlength=len(roles))
    mean = totals.sum(0) / counts.sum()
    means = totals / counts.clamp_min(1)[:, None]

    sums = {n: torch.zeros(n_patients * len(roles), 6, dtype=torch.float64) for n in beside}
    fired = {
        n: torch.zeros(len(roles), c.n_features, dtype=torch.float64) for n, c in beside.items()
    }
    for x, where in batches_of(folder, site, mask, config.batch):
        exact, role = x.double(), role_of[where]
        cell = patient_of[where] * len(roles) + role
        spread = (exact - mean).square().sum(1)
        own_spread = (exact - means[role]).square().sum(1)
        for name, code in beside.items():
            features = code.encode(x)
            rebuilt = code.decode(features).cpu().double()
            active = (features > 0).cpu().double()
            l0 = active.sum(1) if code.l0 is None else torch.full((len(x),), code.l0)
            error = (exact - rebuilt).square().sum(1)
            cosine = torch.nn.functional.cosine_similarity(exact, rebuilt, dim=1)
            ones = torch.ones(len(x), dtype=torch.float64)
            values = torch.stack([ones, error, spread, own_spread, l0.double(), cosine], 1)
            sums[name].index_add_(0, cell, values)
            fired[name].index_add_(0, role, active)
    return {
        name: Tally(roles, sums[name].view(n_patients, len(roles), 6), fired[name], draws, code)
        for name, code in beside.items()
    }
