"""The inference threshold at which a dictionary has a wanted L0, overall and by role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from sae.model import MatryoshkaSAE
from sae.stream import Batch

CHUNK = 1024
"""Rows encoded at a time."""


class Calibration(NamedTuple):
    """Thresholds, in the units of the SAE's own pre-activations, for one target."""

    target_l0: float
    threshold: float
    """At which L0 over all rows is the target."""
    by_role: dict[str, float]
    """At which L0 over the rows of one role is the target."""
    n_rows: int


@torch.no_grad()
def threshold_for(
    sae: MatryoshkaSAE, batches: Iterable[Batch], n_rows: int, target_l0: float
) -> Calibration:
    """Thresholds measured on the first ``n_rows`` rows of ``batches``, which stay in memory.

    Exact: on those rows the mean number of pre-activations above the threshold is ``target_l0``,
    to the nearest entry, unless values tie or fewer are positive.
    """
    parts, roles, have = [], [], 0
    for batch in batches:
        parts.append(batch.x[sae.config.site][: n_rows - have])
        roles.append(batch.roles[: n_rows - have])
        have += len(parts[-1])
        if have >= n_rows:
            break
    if not have:
        raise ConfigError("there are no rows to calibrate on; give at least one")
    x, role = torch.cat(parts), torch.cat(roles)
    by_role = {
        one.name.lower(): threshold_of(sae, x[role == int(one)], target_l0)
        for one in Role
        if bool((role == int(one)).any())
    }
    return Calibration(target_l0, threshold_of(sae, x, target_l0), by_role, have)


@torch.no_grad()
def threshold_of(sae: MatryoshkaSAE, x: Float[Tensor, "rows d"], target_l0: float) -> float:
    """The threshold above which ``round(rows · target_l0)`` pre-activations lie.

    Holds at most about twice that many values at a time.
    """
    count = max(1, round(len(x) * target_l0))
    kept = sae.b_enc.new_zeros(0)
    bound = 0.0
    for rows in x.split(CHUNK):
        pre = sae.pre_activations(rows.to(sae.W_dec))
        kept = torch.cat([kept, pre[pre > bound]])
        if len(kept) > 2 * count + 1:
            kept = kept.topk(count + 1).values
            bound = float(kept[-1])
    if len(kept) <= count:
        return 0.0
    return float(kept.topk(count + 1).values[-1])
