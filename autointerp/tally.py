"""Running statistics of every latent at once: sums, a histogram, and the best of each slot.

All work is on the entries that are not zero, in numpy: nothing here loops over latents or tokens.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt32

STEPS = 16
"""Bins per octave, equally wide within one."""
OCTAVES = 16
"""Octaves of the histogram, 2⁸ either way of a centre. What is beyond counts in the end bins."""
BINS = STEPS * OCTAVES
RESOLUTION = 1 / STEPS
"""A quantile is within this share of the exact one, for values inside the histogram's octaves."""
_MANTISSA = 23 - STEPS.bit_length() + 1


class Running:
    """The ``k`` entries of highest priority in each of ``n_slots``; of equal ones the first row.

    Entries come with ascending rows within a slot. The result does not depend on how they are cut
    into batches. Priorities are positive.
    """

    def __init__(self, n_slots: int, k: int) -> None:
        self.k = k
        self.priority = np.zeros((n_slots, k), dtype=np.float32)
        self.row = np.full((n_slots, k), -1, dtype=np.int64)
        self.value = np.zeros((n_slots, k), dtype=np.float32)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._n_waiting = 0

    def add(
        self,
        slot: Int64[np.ndarray, " n"],
        priority: Float32[np.ndarray, " n"],
        row: Int64[np.ndarray, " n"],
        value: Float32[np.ndarray, " n"],
    ) -> None:
        """Offer entries; those that cannot stay are dropped at once."""
        if self.k == 0:
            return
        stays = np.flatnonzero(priority > self.priority[slot, -1])
        if len(stays) == 0:
            return
        self._waiting.append((slot[stays], priority[stays], row[stays], value[stays]))
        self._n_waiting += len(stays)
        if self._n_waiting >= max(1 << 16, len(self.priority)):
            self.settle()

    def settle(self) -> None:
        """Merge what waits; slots then hold their best, in descending order, -1 where empty."""
        if not self._waiting:
            return
        slot, priority, row, value = (
            np.concatenate(arrays) for arrays in zip(*self._waiting, strict=True)
        )
        self._waiting, self._n_waiting = [], 0
        touched = np.unique(slot)
        slot = np.concatenate([np.repeat(touched, self.k), slot])
        priority = np.concatenate([self.priority[touched].ravel(), priority])
        row = np.concatenate([self.row[touched].ravel(), row])
        value = np.concatenate([self.value[touched].ravel(), value])
        # Bits of positive floats are ordered as they are. The sort is stable and rows ascend, so
        # the first row wins among equals.
        falling = np.uint64(0xFFFFFFFF) - priority.view(np.uint32).astype(np.uint64)
        order = np.argsort((slot.astype(np.uint64) << np.uint64(32)) | falling, kind="stable")
        starts = np.flatnonzero(np.diff(slot[order], prepend=-1))
        lengths = np.diff(starts, append=len(order))
        best = order[(starts[:, None] + np.arange(self.k)).ravel()]
        assert lengths.min() >= self.k
        shape = (len(touched), self.k)
        self.priority[touched] = priority[best].reshape(shape)
        self.row[touched] = row[best].reshape(shape)
        self.value[touched] = value[best].reshape(shape)


class Sketch:
    """Count, sum, maximum and a histogram of the values of each latent that are above zero.

    The histogram has :data:`STEPS` bins in each octave around ``centre``, a power of two.
    """

    def __init__(self, n_latents: int, centre: float) -> None:
        exponent = int(np.floor(np.log2(centre))) - OCTAVES // 2
        self._base = (exponent + 127) * STEPS
        self.total = np.zeros(n_latents, dtype=np.float64)
        self.max = np.zeros(n_latents, dtype=np.float32)
        self.histogram: UInt32[np.ndarray, "F bins"] = np.zeros((n_latents, BINS), dtype=np.uint32)

    def add(self, latent: Int64[np.ndarray, " n"], value: Float32[np.ndarray, " n"]) -> None:
        np.add.at(self.total, latent, value.astype(np.float64))
        np.maximum.at(self.max, latent, value)
        step = (value.view(np.int32) >> _MANTISSA) - self._base
        place = latent * BINS + np.clip(step, 0, BINS - 1)
        np.add.at(self.histogram.reshape(-1), place, np.uint32(1))

    @property
    def count(self) -> Int64[np.ndarray, " F"]:
        """Values of each latent."""
        return self.histogram.sum(axis=1, dtype=np.int64)

    def quantile(self, q: float) -> Float[np.ndarray, " F"]:
        """Quantile of each latent's values, linear within a bin, never above the maximum.

        0 for a latent without values.
        """
        edges = ((np.arange(BINS + 1) + self._base) << _MANTISSA).astype(np.int32).view(np.float32)
        running = self.histogram.cumsum(axis=1, dtype=np.int64)
        count = running[:, -1]
        rank = q * np.maximum(count - 1, 0)
        place = (running <= rank[:, None]).sum(axis=1).clip(max=BINS - 1)
        at = np.arange(len(count))
        own = self.histogram[at, place].astype(np.float64)
        before = running[at, place] - own
        share = np.where(own > 0, (rank - before + 0.5) / np.maximum(own, 1), 0.0).clip(0, 1)
        low, high = edges[place].astype(np.float64), edges[place + 1].astype(np.float64)
        found = np.minimum(low + share * (high - low), self.max)
        return np.where(count > 0, found, 0.0)
