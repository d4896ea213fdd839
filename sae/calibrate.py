"""The inference threshold that gives a dictionary the L0 asked for, exactly.

The threshold a training run follows is an average over its batches, and the L0 it gives at
inference is close to k but not k. Dictionaries are compared at one L0, so theirs is set here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE
from sae.stream import Batch

ALL = "all rows"
Chunk = tuple[Tensor, Mapping[str, Tensor]]
"""Rows ``[n, d]`` and which of them belong to each set that gets a threshold."""
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

    >>> from phantom.tour import activations, dictionary
    >>> acts = activations()
    >>> found = calibrate_threshold(dictionary(), acts, ~acts.heldout(0.3), target_l0=6.0)
    >>> abs(found.l0 - 6) < 0.1
    True
    """
    chunks = _of_folder(sae, folder, {ALL: mask}, batch)
    return _calibrate(sae, chunks, target_l0)[ALL]


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
    return _calibrate(sae, _of_folder(sae, folder, masks, batch), target_l0)


def calibrate_batches(
    sae: MatryoshkaSAE, batches: Sequence[Batch], target_l0: float
) -> tuple[Calibration, dict[str, Calibration]]:
    """:func:`calibrate_threshold` on rows in memory: of all of them, and of each role's alone."""

    def chunks() -> Iterator[Chunk]:
        for batch in batches:
            masks = {role.name.lower(): batch.roles == int(role) for role in Role}
            everything = torch.ones(len(batch.roles), dtype=torch.bool)
            yield batch.x[sae.config.site], {ALL: everything} | masks

    found = _calibrate(sae, chunks, target_l0)
    return found.pop(ALL), found


def _of_folder(
    sae: MatryoshkaSAE, folder: ActivationFolder, masks: Mapping[str, np.ndarray], batch: int
) -> Callable[[], Iterator[Chunk]]:
    site = folder.check_site(sae.config.site)
    union = np.logical_or.reduce(list(masks.values()))

    def chunks() -> Iterator[Chunk]:
        for start in range(0, folder.n_tokens, batch):
            stop = min(start + batch, folder.n_tokens)
            chosen = union[start:stop]
            if chosen.any():
                x = folder.rows(site, start, stop)[torch.from_numpy(chosen)]
                own = {n: torch.from_numpy(mask[start:stop][chosen]) for n, mask in masks.items()}
                yield x, own

    return chunks


def _calibrate(
    sae: MatryoshkaSAE, chunks: Callable[[], Iterable[Chunk]], target_l0: float
) -> dict[str, Calibration]:
    if not 0 < target_l0 < sae.config.n_latents:
        raise ConfigError(
            f"L0 {target_l0} is asked of {sae.config.n_latents} latents; ask for more than 0 and "
            "fewer than all"
        )
    high, n_rows = _histograms(sae, chunks(), None)
    if not n_rows:
        raise ConfigError("there are no rows to calibrate on; harvest more studies")
    wanted = {name: round(n * target_l0) for name, n in n_rows.items()}
    cells, above = {}, {}
    for name, histogram in high.items():
        positive = int(histogram.sum())
        if positive < wanted[name]:
            raise ConfigError(
                f"{name}: L0 {target_l0} needs {wanted[name]} active latents on {n_rows[name]} "
                f"rows, only {positive} are above zero; ask for at most {positive / n_rows[name]:g}"
            )
        cells[name], above[name] = _cell(histogram, wanted[name])
    low, _ = _histograms(sae, chunks(), cells)
    found = {}
    for name in high:
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
    sae: MatryoshkaSAE, chunks: Iterable[Chunk], cells: Mapping[str, int] | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Positive pre-activations by their high bits, or by low bits within a cell each; rows.

    Both by set, for the sets that have rows.
    """
    width = 1 << (31 - LOW_BITS if cells is None else LOW_BITS)
    counts: dict[str, Tensor] = {}
    n_rows: dict[str, int] = {}
    for x, masks in chunks:
        pre = sae.pre_activations(x.to(sae.W_dec)).float()
        for name, mask in masks.items():
            if not mask.any():
                continue
            mine = pre[mask.to(pre.device)]
            bits = mine[mine > 0].view(torch.int32)
            if cells is not None:
                bits = bits[bits >> LOW_BITS == cells[name]] & (width - 1)
            else:
                bits = bits >> LOW_BITS
            counts.setdefault(name, torch.zeros(width, dtype=torch.int64))
            counts[name] += torch.bincount(bits, minlength=width).cpu()
            n_rows[name] = n_rows.get(name, 0) + len(mine)
    return counts, n_rows
