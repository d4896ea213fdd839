"""The inference threshold that gives a dictionary the L0 asked for, exactly.

The threshold a training run follows is an average over its batches, and the L0 it gives at
inference is close to k but not k. Dictionaries are compared at one L0, so theirs is set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE

LOW_BITS = 15
"""A positive float32 orders as its 31 bits do: a histogram of the high 16 finds the cell the
threshold is in, one of the low 15 within that cell finds it exactly."""


class Calibration(NamedTuple):
    """A threshold, and what it gives on the rows it was chosen on."""

    threshold: float
    l0: float
    """Mean active latents per row; below the target where equal pre-activations tie."""
    n_tokens: int


def calibrate_threshold(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    mask: Bool[np.ndarray, " n"],
    target_l0: float,
    batch: int = 4096,
) -> Calibration:
    """The threshold at which ``sae`` has L0 ``target_l0`` on the rows of ``mask``.

    ``sae`` is left as it is; ``sae.threshold.fill_(calibration.threshold)`` uses it. Two passes
    over the rows, and no more memory than a batch's pre-activations. Works in float32.

    Raises
    ------
    ConfigError
        If there are no rows, or fewer positive pre-activations than the target needs.
    """
    return _calibrate(sae, folder, {"the chosen rows": mask}, target_l0, batch)["the chosen rows"]


def calibrate_by_role(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    mask: Bool[np.ndarray, " n"],
    target_l0: float,
    batch: int = 4096,
) -> dict[str, Calibration]:
    """:func:`calibrate_threshold` of each role's rows alone, for the roles that have any."""
    roles = folder.column("role")
    masks = {role.name.lower(): mask & (roles == role.name.lower()) for role in Role}
    masks = {name: chosen for name, chosen in masks.items() if chosen.any()}
    return _calibrate(sae, folder, masks, target_l0, batch)


def _calibrate(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    masks: Mapping[str, np.ndarray],
    target_l0: float,
    batch: int,
) -> dict[str, Calibration]:
    if not 0 < target_l0 < sae.config.n_latents:
        raise ConfigError(
            f"L0 {target_l0} is asked of {sae.config.n_latents} latents; ask for more than 0 and "
            "fewer than all"
        )
    for name, mask in masks.items():
        if not mask.any():
            raise ConfigError(f"{name}: no rows to calibrate on; harvest more studies")
    n_rows = {name: int(mask.sum()) for name, mask in masks.items()}
    wanted = {name: round(n * target_l0) for name, n in n_rows.items()}
    high = _histograms(sae, folder, masks, batch, None)
    cells, above = {}, {}
    for name, histogram in high.items():
        positive = int(histogram.sum())
        if positive < wanted[name]:
            raise ConfigError(
                f"{name}: L0 {target_l0} needs {wanted[name]} active latents on {n_rows[name]} "
                f"rows, only {positive} are above zero; ask for at most {positive / n_rows[name]:g}"
            )
        cells[name], above[name] = _cell(histogram, wanted[name])
    low = _histograms(sae, folder, masks, batch, cells)
    found = {}
    for name in masks:
        bits, within = _cell(low[name], wanted[name] - above[name])
        threshold = 0.0
        if cells[name] >= 0:
            whole = torch.tensor((cells[name] << LOW_BITS) + bits, dtype=torch.int32)
            threshold = float(whole.view(torch.float32))
        l0 = (above[name] + within) / n_rows[name]
        found[name] = Calibration(threshold, l0, n_rows[name])
    return found


def _cell(histogram: Tensor, count: int) -> tuple[int, int]:
    """The cell of the ``count + 1``-th largest entry, and how many lie in the cells above it.

    Cell -1, with all entries above it, when there are only ``count``.
    """
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(count), right=True))
    cell = len(histogram) - 1 - place
    return cell, int(from_top[place - 1]) if place else 0


@torch.no_grad()
def _histograms(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    masks: Mapping[str, np.ndarray],
    batch: int,
    cells: Mapping[str, int] | None,
) -> dict[str, Tensor]:
    """Counts of positive pre-activations by their high bits, or by low bits within a cell each."""
    site = folder.check_site(sae.config.site)
    width = 1 << (31 - LOW_BITS if cells is None else LOW_BITS)
    counts = {name: torch.zeros(width, dtype=torch.int64) for name in masks}
    union = np.logical_or.reduce(list(masks.values()))
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        chosen = union[start:stop]
        if not chosen.any():
            continue
        x = folder.rows(site, start, stop)[torch.from_numpy(chosen)].to(sae.W_dec)
        pre = sae.pre_activations(x).float()
        for name, mask in masks.items():
            mine = pre[torch.from_numpy(mask[start:stop][chosen]).to(pre.device)]
            bits = mine[mine > 0].view(torch.int32)
            if cells is not None:
                bits = bits[bits >> LOW_BITS == cells[name]] & (width - 1)
            else:
                bits = bits >> LOW_BITS
            counts[name] += torch.bincount(bits, minlength=width).cpu()
    return counts
