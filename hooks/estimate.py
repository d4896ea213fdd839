"""What a harvest will take, measured on a few of its studies before it starts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hooks.files import ConfigError, StudyError

if TYPE_CHECKING:
    from hooks.harvest import Maker

MEASURED = 8
"""Studies that are run, after half as many to warm up."""
COUNTED = 128
"""Studies whose tokens are counted."""
TABLE_BYTES = 16
"""Bytes a row takes in the token table, at most; the table is compressed."""
MARGIN = 1.02
"""Room for what the estimate does not count: sums, manifests, the file system's own."""


class Estimate(NamedTuple):
    """What is left of a harvest."""

    studies: int
    tokens: int
    """Kept rows."""
    bytes: int
    seconds: float
    free_bytes: int
    """On the disk that will hold it."""

    def __str__(self) -> str:
        return (
            f"{self.studies:,} studies, about {self.tokens:,} kept tokens: "
            f"{shown_bytes(self.bytes)} on disk ({shown_bytes(self.free_bytes)} free), "
            f"{shown_seconds(self.seconds)}"
        )

    def check_room(self, out: Path) -> None:
        """Raise :class:`ConfigError` if the disk cannot hold it."""
        if self.bytes > self.free_bytes:
            raise ConfigError(
                f"{out} needs about {shown_bytes(self.bytes)} and its disk has "
                f"{shown_bytes(self.free_bytes)} free; give another disk, keep fewer tokens "
                "(--policy, --patches), or insist with --force"
            )


def estimate(maker: Maker, places: np.ndarray, out: Path) -> Estimate:
    """Estimate from studies spread evenly over those at ``places``; unreadable ones do not count.

    Parameters
    ----------
    places
        Numbers of the studies that are still to be run.
    """
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if not len(places):
        return Estimate(0, 0, 0, 0.0, free)
    counts = []
    for place in _spread(places, COUNTED):
        try:
            counts.append(maker.count(place))
        except StudyError:
            continue
    tokens = round(float(np.mean(counts or [0])) * len(places))
    row = sum(maker.widths.values()) * maker.kept.dtype.itemsize + TABLE_BYTES
    return Estimate(
        studies=len(places),
        tokens=tokens,
        bytes=round(tokens * row * MARGIN),
        seconds=_seconds_each(maker, _spread(places, MEASURED)) * len(places),
        free_bytes=free,
    )


def _seconds_each(maker: Maker, places: Sequence[int]) -> float:
    for some in (places[: len(places) // 2], places):
        began = time.perf_counter()
        maker.rows(maker.sample(some))
        took = time.perf_counter() - began
    return took / len(places)


def _spread(places: np.ndarray, n: int) -> list[int]:
    chosen = np.linspace(0, len(places) - 1, min(n, len(places))).round().astype(int)
    return places[chosen].tolist()


def shown_bytes(size: float) -> str:
    """A size in decimal units.

    >>> shown_bytes(280e9), shown_bytes(999)
    ('280.0 GB', '999 bytes')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def shown_seconds(seconds: float) -> str:
    """A duration for people.

    >>> shown_seconds(42), shown_seconds(5400)
    ('42 s', '1.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
