"""Batches of like length: as few padded tokens and passes as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

PASS_TOKENS = 128
"""What a forward pass costs beside its tokens, in tokens."""
CPU_TOKENS, DEVICE_TOKENS = 2048, 8192
"""Padded tokens of a pass, at most, where nothing is asked: more fall out of a processor's cache,
fewer do not fill an accelerator."""


def default_tokens(device: torch.device) -> int:
    """Padded tokens of a forward pass on a device, at most."""
    return CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS


def length_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices in batches that together cost least; shorter sequences come first.

    A batch costs its padded tokens and :data:`PASS_TOKENS`. What a batch is does not depend on
    anything but the lengths.

    >>> length_batches([40, 900, 41, 39, 880], 2000)
    [[3, 0, 2], [4, 1]]

    Parameters
    ----------
    most
        Padded tokens of a batch, at most; a longer sequence is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    cost: list[Any] = [0]
    begins: list[int] = []
    for end, longest in enumerate([lengths[i] for i in order], 1):
        best, begin = cost[end - 1] + longest, end - 1
        for first in range(end - 2, -1, -1):
            padded = (end - first) * longest
            if padded > most:
                break
            if cost[first] + padded < best:
                best, begin = cost[first] + padded, first
        cost.append(best + PASS_TOKENS)
        begins.append(begin)
    cuts, end = [len(order)], len(order)
    while end:
        end = begins[end - 1]
        cuts.append(end)
    return [order[first:last] for first, last in pairwise(reversed(cuts))]
