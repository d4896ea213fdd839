"""Shuffled batches from an activation folder, with a position that can be saved.

Each epoch visits the folder's chunks of contiguous rows in a new order, gathers many of them into
a buffer, and shuffles the buffer's rows. Reads stay sequential within a chunk, and the sequence of
batches depends only on the seed, so a position is one number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder

CHUNK_ROWS = 4096


class ShuffledRows:
    """Endless batches ``[batch, d]`` of float32 rows.

    Parameters
    ----------
    chosen
        Mask ``[n_tokens]`` of the rows to draw from.
    buffer_rows
        Rows (chosen or not) that are shuffled together; at least a chunk.
    position
        Batches to skip; :attr:`position` of an earlier stream continues it exactly.
    """

    def __init__(
        self,
        folder: ActivationFolder,
        site: str,
        batch: int,
        seed: int,
        chosen: np.ndarray,
        buffer_rows: int = 1 << 18,
        position: int = 0,
    ) -> None:
        self.folder, self.site, self.batch, self.seed = folder, site, batch, seed
        self.chosen, self.position = chosen, position
        self.per_epoch = int(chosen.sum())
        if self.per_epoch < batch:
            raise ConfigError(
                f"{folder.folder} offers {self.per_epoch} rows, a batch needs {batch}; "
                "harvest more studies or make the batch smaller"
            )
        starts = np.arange(0, folder.n_tokens, CHUNK_ROWS)
        self.chunks = [(int(s), min(int(s) + CHUNK_ROWS, folder.n_tokens)) for s in starts]
        self.chunk_sizes = np.array([int(chosen[a:b].sum()) for a, b in self.chunks])
        self.chunks_per_buffer = max(1, buffer_rows // CHUNK_ROWS)

    def __iter__(self) -> Iterator[Float[Tensor, "batch d"]]:
        skip = self.position * self.batch
        epoch, skip = divmod(skip, self.per_epoch)
        pending: list[Tensor] = []
        have = 0
        while True:
            for rows in self._buffers(epoch, skip):
                pending.append(rows)
                have += len(rows)
                if have < self.batch:
                    continue
                joined = torch.cat(pending) if len(pending) > 1 else pending[0]
                whole = have - have % self.batch
                for start in range(0, whole, self.batch):
                    self.position += 1
                    yield joined[start : start + self.batch].float()
                pending, have = [joined[whole:]], have - whole
            epoch, skip = epoch + 1, 0

    def _buffers(self, epoch: int, skip: int) -> Iterator[Tensor]:
        """The epoch's buffers, shuffled, without its first ``skip`` rows."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.chunks))
        for first in range(0, len(order), self.chunks_per_buffer):
            group = order[first : first + self.chunks_per_buffer]
            size = int(self.chunk_sizes[group].sum())
            shuffle = torch.from_numpy(rng.permutation(size))
            if skip >= size:
                skip -= size
                continue
            rows = torch.cat([self._chunk(int(index)) for index in group])
            yield rows[shuffle[skip:]]
            skip = 0

    def _chunk(self, index: int) -> Tensor:
        start, stop = self.chunks[index]
        return self.folder.rows(self.site, start, stop)[torch.from_numpy(self.chosen[start:stop])]
