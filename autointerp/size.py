"""What a collecting pass will take on the disk, before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from autointerp.features import IMAGES, MODALITIES, SETS, SILENT
from autointerp.layout import Layout
from hooks.estimate import shown_bytes
from hooks.files import ConfigError

if TYPE_CHECKING:
    from autointerp.collect import CollectConfig

SPOOL_BYTES = 16
"""Bytes of the temporary file for an activation that is not zero, at most."""
EXAMPLE_BYTES = 32
"""Bytes of an example, compressed, without its values and tokens."""
VALUE_BYTES = 4
"""Bytes of a value that is not zero; the compressed file has hardly more for it than its bits."""
ZERO_BYTES = VALUE_BYTES / 256
"""Bytes of a value that is zero: zstd shrinks runs of zeros at least this much."""
TOKEN_BYTES = 3
STATS_BYTES = 80
"""Bytes of a latent's statistics in one modality."""


class CollectSize(NamedTuple):
    """What a pass over a folder needs."""

    folder: Path
    """Where the features go."""
    rows: int
    examples: int
    """At most."""
    scratch_bytes: int
    """Of the temporary file beside the folder, gone at the end."""
    bytes: int
    """Of the finished folder; an estimate from above."""
    free_bytes: int
    """On the disk of the folder."""

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, up to {self.examples:,} examples: {shown_bytes(self.bytes)} on "
            f"disk and {shown_bytes(self.scratch_bytes)} while it runs "
            f"({shown_bytes(self.free_bytes)} free)"
        )

    def check_room(self) -> None:
        """Raise :class:`~hooks.files.ConfigError` if the disk cannot hold it."""
        needed = self.bytes + self.scratch_bytes
        if needed > self.free_bytes:
            raise ConfigError(
                f"{self.folder} needs about {shown_bytes(needed)} while it is made and its disk "
                f"has {shown_bytes(self.free_bytes)} free; give another disk, ask for fewer "
                "examples (--n-top, --n-quantile, --n-contrast), or insist with --force"
            )


def estimate(
    layout: Layout, n_latents: int, n_active: float, config: CollectConfig, out: Path
) -> CollectSize:
    """The size, from how many activations are not zero.

    Each of them is in at most one example of its latent, so films and sentences together hold at
    most ``n_active`` values that are not zero, whatever their length.
    """
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    sets = np.array([config.set_of(patient) for patient in layout.patients], dtype=np.int64)
    firsts = layout.unit_starts[:-1]
    lengths = np.diff(layout.unit_starts)
    n_examples, zeros, tokens = 0, 0.0, 0.0
    present = np.unique(layout.modality).tolist()
    for modality in present:
        own = layout.modality[firsts] == modality
        studies = np.bincount(sets[np.unique(layout.study[firsts[own]])], minlength=len(SETS))
        fired = np.minimum(config.n_top + config.n_quantile, studies).sum()
        silent = len(SILENT) * np.minimum(config.n_contrast, studies).sum()
        count = int(fired + silent) * n_latents
        n_examples += count
        grid = layout.grid(modality)
        if MODALITIES[modality] in IMAGES and grid is not None:
            zeros += count * grid[0] * grid[1]
        else:
            length = float(np.minimum(lengths[own], config.max_tokens).mean())
            zeros += count * length
            tokens += count * length
    size = (
        n_examples * EXAMPLE_BYTES
        + n_active * VALUE_BYTES
        + zeros * ZERO_BYTES
        + tokens * TOKEN_BYTES
        + n_latents * len(present) * STATS_BYTES
    )
    return CollectSize(
        out, len(layout), n_examples, round(n_active * SPOOL_BYTES), round(size), free
    )
