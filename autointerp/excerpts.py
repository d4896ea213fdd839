"""The activations of chosen examples, read back from the spool in one walk in order of rows.

Examples are written by latent and activations lie by row. To look each value up would be a search
for every patch of every film; here every activation that is not zero is looked at once, and those
of a chosen example go to the file of its chapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

if TYPE_CHECKING:
    from autointerp.sweep import Spool, Spooled

LOOKUP = 1 << 22
"""Places of the table that names the example of a unit and latent; units side by side."""
BLOCK = 1 << 20
"""Activations looked at together, if they are not all of one unit."""
_HIT = np.dtype([("example", np.int64), ("row", np.int64), ("value", np.float32)])


class Excerpt(NamedTuple):
    """Activations that are not zero, by example."""

    example: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    def between(self, low: int, high: int) -> Excerpt:
        """Those of the examples from ``low`` to below ``high``."""
        own = slice(*np.searchsorted(self.example, [low, high]))
        return Excerpt(self.example[own], self.row[own], self.value[own])


class Excerpts:
    """Activations of some latents, each on one unit.

    Parameters
    ----------
    unit_starts
        First row of each unit, and the number of rows.
    example, unit, latent
        Numbers of the examples, ascending; no unit and latent twice.
    chapters
        First examples of what :meth:`chapter` gives together, and the number of examples.
    """

    def __init__(
        self,
        spool: Spool,
        spooled: Spooled,
        unit_starts: Int64[np.ndarray, " units_and_1"],
        n_latents: int,
        example: Int64[np.ndarray, " n"],
        unit: Int64[np.ndarray, " n"],
        latent: Int64[np.ndarray, " n"],
        chapters: Int64[np.ndarray, " chapters_and_1"],
    ) -> None:
        self._spool, self._chapters = spool, chapters
        order = np.lexsort((latent, unit))
        example, unit, latent = example[order], unit[order], latent[order]
        assert not np.any((np.diff(unit) == 0) & (np.diff(latent) == 0))
        side_by_side = max(1, LOOKUP // n_latents)
        lookup = np.full(side_by_side * n_latents, -1, dtype=np.int64)
        entry_starts = spooled.ends[unit_starts]
        low = 0
        while low < len(unit):
            first = int(unit[low])
            reach = entry_starts[first : first + side_by_side + 1]
            last = first + max(1, int(np.searchsorted(reach, reach[0] + BLOCK, side="right")) - 1)
            high = int(np.searchsorted(unit, last))
            place = (unit[low:high] - first) * n_latents + latent[low:high]
            lookup[place] = example[low:high]
            self._look(spooled, unit_starts[first : last + 1], n_latents, lookup)
            lookup[place] = -1
            low = high

    def _look(
        self, spooled: Spooled, starts: np.ndarray, n_latents: int, lookup: np.ndarray
    ) -> None:
        """Keep what units' activations have that is in the lookup."""
        ends = spooled.ends[starts[0] : starts[-1] + 1]
        own = slice(int(ends[0]), int(ends[-1]))
        entries = np.diff(spooled.ends[starts])
        place = np.repeat(np.arange(len(entries)) * n_latents, entries)
        place += spooled.latent[own]
        example = lookup[place]
        at = np.flatnonzero(example >= 0)
        hits = np.empty(len(at), dtype=_HIT)
        hits["example"] = example[at]
        hits["row"] = starts[0] + np.searchsorted(ends, at + own.start, side="right") - 1
        hits["value"] = spooled.value[own][at]
        chapter = np.searchsorted(self._chapters, hits["example"], side="right") - 1
        hits = hits[np.argsort(chapter, kind="stable")]
        stop = 0
        for number, count in enumerate(np.bincount(chapter).tolist()):
            start, stop = stop, stop + count
            if count:
                self._spool.append(f"chapter-{number}", hits[start:stop])

    def chapter(self, number: int) -> Excerpt:
        """The activations of the examples of a chapter; its file is gone after."""
        hits = self._spool.array(f"chapter-{number}", _HIT)
        order = np.argsort(hits["example"], kind="stable")
        found = Excerpt(hits["example"][order], hits["row"][order], hits["value"][order])
        self._spool.drop(f"chapter-{number}")
        return found
