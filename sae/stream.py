"""Batches of rows to train on: shuffled, prefetched, with a position that can be saved.

:class:`FolderRows` reads an activation folder that may be larger than memory;
:class:`sae.live.LiveRows` runs the model instead and touches no disk. Training asks nothing else of
either than what :class:`Rows` lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import cycle, pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder, Moments

CHUNK_ROWS = 4096
"""Contiguous rows that are read together."""
BLOCK_VALUES = 1 << 15
"""Values that are widened together."""
BUFFER_ROWS = 1 << 18
"""Rows that are shuffled together."""
GATHERERS = 2
"""Threads that gather and widen the batches to come: one alone copies more slowly than a thread
reads from memory."""

S = TypeVar("S")
R = TypeVar("R")


class Batch(NamedTuple):
    """Rows of one step, the same tokens at every site."""

    x: Mapping[str, Float[Tensor, "batch d"]]
    """float32 activations by site."""
    roles: Int8[Tensor, " batch"]
    """:class:`hooks.roles.Role` of each row."""
    position: Mapping[str, int]
    """Where the stream goes on after this batch; JSON."""


class Rows(Protocol):
    """Where training rows come from."""

    @property
    def sites(self) -> Sequence[str]: ...

    @property
    def policy(self) -> str:
        """Token policy, a key of :data:`hooks.harvest.POLICIES`."""
        ...

    @property
    def model(self) -> Mapping[str, Any]:
        """Identity of the model that made the rows."""
        ...

    def record(self) -> dict[str, Any]:
        """What makes two sources the same data; JSON."""
        ...

    def width(self, site: str) -> int:
        """Width ``d`` of a site; an unknown one is an error that names the nearest."""
        ...

    def moments(self, site: str) -> Moments:
        """Mean and mean squared norm of a site's rows."""
        ...

    def batches(
        self, sites: Sequence[str], batch: int, seed: int, position: Mapping[str, int]
    ) -> Iterator[Batch]:
        """Endless training batches; ``{}`` is the first position."""
        ...

    def heldout(self, sites: Sequence[str], limit: int | None = None) -> Iterator[Batch]:
        """Rows of held-out patients in order, all of them or the first ``limit``."""
        ...


class FolderRows:
    """Rows of an activation folder, see :class:`Rows`.

    Each epoch visits the folder's chunks of contiguous rows in a new order, gathers many of them
    into a buffer, and shuffles the buffer's rows, while a thread reads the next buffer. Reads stay
    sequential within a chunk, and the batches depend only on the seed, so a position is one number.
    :func:`sae.mixing.mixing` measures how well that mixes studies.

    Parameters
    ----------
    heldout
        Share of patients kept out of training.
    buffer_rows
        Rows (training or not) that are shuffled together; at least a chunk. Two buffers are in
        memory.
    chunk_rows
        Contiguous rows that are read together: fewer mix better, more read faster.
    """

    def __init__(
        self,
        folder: ActivationFolder,
        heldout: float = 0.2,
        buffer_rows: int = BUFFER_ROWS,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self.folder, self.sites = folder, folder.sites
        self.policy = folder.policy
        self.model: Mapping[str, Any] = folder.manifest["model"]
        self._heldout = folder.heldout(heldout)
        self._roles = folder.roles()
        self._buffer_rows, self._chunk_rows = buffer_rows, chunk_rows
        self.n_training = int((~self._heldout).sum())

    def record(self) -> dict[str, Any]:
        files = self.folder.manifest["files"]
        return {name: sums["sha256"] for name, sums in files.items() if name.startswith("part-")}

    def width(self, site: str) -> int:
        return self.folder.width(site)

    def moments(self, site: str) -> Moments:
        return self.folder.moments(site)

    def heldout(self, sites: Sequence[str], limit: int | None = None) -> Iterator[Batch]:
        chosen = self._heldout
        if limit is not None:
            chosen = chosen & (np.cumsum(chosen) <= limit)
        for start, stop in self._chunks():
            own = chosen[start:stop]
            if own.any():
                yield self._batch(sites, start, stop, own)

    def batches(
        self, sites: Sequence[str], batch: int, seed: int, position: Mapping[str, int]
    ) -> Iterator[Batch]:
        per_epoch = self.n_training
        if per_epoch < batch:
            raise ConfigError(
                f"{self.folder.folder} offers {per_epoch} rows, a batch needs {batch}; "
                "harvest more studies or make the batch smaller"
            )
        done = position.get("batches", 0)
        epoch, skip = divmod(done * batch, per_epoch)
        pending: Batch | None = None
        with ThreadPoolExecutor(GATHERERS) as pool:
            for buffer in _ahead(self._buffers(sites, seed, epoch, skip)):
                first = batch - (len(pending.roles) if pending is not None else 0)
                starts = [0, *range(first, len(buffer.order), batch)]
                parts = [slice(*pair) for pair in pairwise([*starts, len(buffer.order)])]
                # All of a buffer's rows are out before the next is asked for, which reuses its
                # memory.
                for taken in _in_turn(pool, buffer.take, parts):
                    pending = taken if pending is None else _joined(pending, taken)
                    if len(pending.roles) == batch:
                        done += 1
                        yield pending._replace(position={"batches": done})
                        pending = None

    def row_numbers(self, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Rows of the folder in the order in which an epoch's batches take them; reads nothing."""
        chunks = self._chunks()
        for group, order in self._plan(seed, epoch):
            rows = np.concatenate([np.arange(*chunks[i]) for i in group])
            yield rows[order]

    def _plan(self, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks that are buffered together, and in which order their training rows leave."""
        chunks = self._chunks()
        together = max(1, self._buffer_rows // self._chunk_rows)
        rng = np.random.default_rng([seed, epoch])
        chunk_order = rng.permutation(len(chunks))
        for first in range(0, len(chunk_order), together):
            group = chunk_order[first : first + together]
            training = np.concatenate([~self._heldout[slice(*chunks[i])] for i in group])
            places = np.flatnonzero(training)
            yield group, places[rng.permutation(len(places))]

    def _buffers(self, sites: Sequence[str], seed: int, epoch: int, skip: int) -> Iterator[_Buffer]:
        """Buffers from an epoch on, without its first ``skip`` rows."""
        chunks = self._chunks()
        # One is in use while the other is read; fresh memory would cost as much as the reading.
        most = min(self.folder.n_tokens, max(self._buffer_rows, self._chunk_rows))
        slots = cycle([self._room(sites, most), self._room(sites, most)])
        while True:
            for group, order in self._plan(seed, epoch):
                if skip < len(order):
                    room, filled = next(slots), 0
                    for start, stop in (chunks[i] for i in group):
                        for site, x in room.x.items():
                            self.folder.read_into(site, start, x[filled : filled + stop - start])
                        own = torch.from_numpy(self._roles[start:stop])
                        room.roles[filled : filled + stop - start] = own
                        filled += stop - start
                    yield _Buffer(room, order[skip:])
                skip = max(0, skip - len(order))
            epoch, skip = epoch + 1, 0

    def _room(self, sites: Sequence[str], rows: int) -> Batch:
        folder = self.folder
        x = {
            site: torch.empty(rows, folder.width(site), dtype=folder.dtype(site)) for site in sites
        }
        return Batch(x, torch.empty(rows, dtype=torch.int8), {})

    def _chunks(self) -> list[tuple[int, int]]:
        n, size = self.folder.n_tokens, self._chunk_rows
        return [(start, min(start + size, n)) for start in range(0, n, size)]

    def _batch(self, sites: Sequence[str], start: int, stop: int, chosen: np.ndarray) -> Batch:
        mask = torch.from_numpy(chosen)
        x = {site: self.folder.rows(site, start, stop)[mask].float() for site in sites}
        return Batch(x, torch.from_numpy(self._roles[start:stop])[mask], {})


class _Buffer(NamedTuple):
    """Rows in memory, in the dtype on disk, and the order in which they are taken."""

    rows: Batch
    order: np.ndarray

    def take(self, part: slice) -> Batch:
        index = self.order[part]
        x = {site: gather_floats(rows, index) for site, rows in self.rows.x.items()}
        return Batch(x, torch.from_numpy(self.rows.roles.numpy()[index]), {})


def gather_floats(rows: Float[Tensor, "n d"], index: np.ndarray) -> Float[Tensor, "m d"]:
    """``rows[index]`` in float32, from memory on the host.

    numpy on one thread: a few copies are over before torch's threads have met, and where cores are
    shared they wait for each other for longer than the copies take.
    """
    if rows.dtype == torch.bfloat16:  # the upper half of a float32
        halves = rows.view(torch.int16).numpy().view(np.uint16)
        wide = np.empty((len(index), rows.shape[1]), dtype=np.uint32)
        step = max(1, BLOCK_VALUES // rows.shape[1])
        narrow = np.empty((min(step, len(index)), rows.shape[1]), dtype=np.uint16)
        for first in range(0, len(index), step):  # a block stays in the cache between its passes
            block = wide[first : first + step]
            own = narrow[: len(block)]
            # "clip", because numpy copies once more where it may have to raise; rows exist.
            halves.take(index[first : first + step], axis=0, out=own, mode="clip")
            np.copyto(block, own)
            np.left_shift(block, np.uint32(16), out=block)
        return torch.from_numpy(wide.view(np.float32))
    return torch.from_numpy(rows.numpy().take(index, axis=0).astype(np.float32, copy=False))


def _joined(*rows: Batch) -> Batch:
    x = {site: torch.cat([one.x[site] for one in rows]) for site in rows[0].x}
    return Batch(x, torch.cat([one.roles for one in rows]), {})


def _in_turn(pool: Executor, work: Callable[[S], R], items: Iterable[S]) -> Iterator[R]:
    """``work(item)`` of each item in order; the next :data:`GATHERERS` are under way meanwhile."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > GATHERERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _ahead(buffers: Iterator[_Buffer]) -> Iterator[_Buffer]:
    """The same buffers, each read by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, buffers)
        while True:
            buffer = coming.result()
            coming = reader.submit(next, buffers)
            yield buffer
