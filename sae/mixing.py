"""How well the order of training rows mixes studies.

A batch in which few studies meet gives a noisier gradient than its size promises. Measured is the
entropy of the studies in a batch, beside that of batches drawn from a full shuffle of the same
rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hooks.files import ConfigError
from sae.stream import FolderRows


class Mixing(NamedTuple):
    """Entropies are means over an epoch's batches, in nats."""

    entropy: float
    ideal: float
    """Of batches from a full shuffle."""
    ratio: float
    """``entropy / ideal``; 1 is a full shuffle, 0 one study a batch."""
    coverage: float
    """Share of the training rows that the epoch visits; an epoch visits no row twice."""


def mixing(rows: FolderRows, batch: int, seed: int = 0, epoch: int = 0) -> Mixing:
    """Mixing of studies in one epoch of a folder's batches; reads no activations.

    Raises
    ------
    ConfigError
        If an epoch has no whole batch.
    """
    order = np.concatenate(list(rows.row_numbers(seed, epoch)))
    if len(order) < batch:
        raise ConfigError(f"an epoch has {len(order)} rows, a batch {batch}; make it smaller")
    if len(np.unique(order)) < len(order):
        raise AssertionError("an epoch takes a row twice")
    study = rows.folder.column("sequence")
    n = len(order) // batch * batch
    found = _entropy(study[order[:n]].reshape(-1, batch))
    shuffled = np.random.default_rng(seed).permutation(order)[:n]
    ideal = _entropy(study[shuffled].reshape(-1, batch))
    ratio = found / ideal if ideal > 0 else 1.0
    return Mixing(found, ideal, ratio, n / rows.n_training)


def _entropy(batches: np.ndarray) -> float:
    """Mean over rows of the entropy of the values in a row."""
    total = 0.0
    for batch in batches:
        shares = np.unique(batch, return_counts=True)[1] / len(batch)
        total -= float((shares * np.log(shares)).sum())
    return total / len(batches)
