"""`maira-sae bench collect`: the collecting pass beside its floor and delphi's cache.

The floor is one read of the rows and one sparse encode. delphi's cache is re-implemented here from
its algorithm (EleutherAI/delphi, `LatentCache`), since it takes no stored activations: dense
activations of each batch, their non-zeros, all held in memory, then for each latent the windows of
the texts it fires on, sorted by their maximum. It makes no silent examples and no statistics.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from autointerp.collect import collect
from autointerp.sweep import BLOCK_ROWS, Encoder
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE

CONTEXT = 32
"""Tokens of an example of delphi's."""


def floor(sae: MatryoshkaSAE, folder: ActivationFolder) -> int:
    """Read every row once and encode it once; the number of non-zeros."""
    encoder, count = Encoder(sae), 0
    for start in range(0, folder.n_tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, folder.n_tokens)
        count += encoder(folder.rows(sae.config.site, start, stop)).val.numel()
    return count


@torch.no_grad()
def delphi_cache(sae: MatryoshkaSAE, folder: ActivationFolder, n_examples: int = 100) -> int:
    """delphi's way, as in the module's text; the number of windows kept."""
    rows, latents, values = [], [], []
    for start in range(0, folder.n_tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, folder.n_tokens)
        z = sae.encode(folder.rows(sae.config.site, start, stop).to(sae.W_dec))
        row, latent = (z.abs() > 1e-5).nonzero(as_tuple=True)
        rows.append(row + start)
        latents.append(latent)
        values.append(z[row, latent])
    row, latent, value = torch.cat(rows), torch.cat(latents), torch.cat(values)
    order = latent.argsort(stable=True)
    ends = torch.bincount(latent, minlength=sae.config.n_latents).tolist()
    kept = 0
    for at, value_of in zip(row[order].split(ends), value[order].split(ends), strict=True):
        if not len(at):
            continue
        window, place = torch.unique(at // CONTEXT, return_inverse=True)
        held = torch.zeros(len(window), CONTEXT)
        held[place, at % CONTEXT] = value_of
        best = held.amax(dim=1).argsort(descending=True)[:n_examples]
        kept += len(held[best])
    return kept


def bench_collect(sae_folder: Path, activations: Path, repeats: int = 3) -> dict[str, Any]:
    """Median seconds of each, one after the other, ``repeats`` times; and their ratios."""
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    with tempfile.TemporaryDirectory() as scratch:
        number = iter(range(repeats))
        ways: dict[str, Callable[[], object]] = {
            "floor": lambda: floor(sae, folder),
            "collect": lambda: collect(sae, folder, None, Path(scratch) / str(next(number))),
            "delphi": lambda: delphi_cache(sae, folder),
        }
        floor(sae, folder)  # pages of the folder into memory, for all alike
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    middle = {name: median(found) for name, found in seconds.items()}
    paired = {name: np.divide(seconds["collect"], found) for name, found in seconds.items()}
    return {
        "rows": folder.n_tokens,
        "n_latents": sae.config.n_latents,
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in middle.items()},
        "collect_over_floor": round(float(np.median(paired["floor"])), 3),
        "collect_over_delphi": round(float(np.median(paired["delphi"])), 3),
    }
