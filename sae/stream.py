"""Batches of rows to train on: shuffled, prefetched, with a position that can be saved.

:class:`FolderRows` reads an activation folder that may be larger than memory;
:class:`sae.live.LiveRows` runs the model instead and touches no disk. Training asks nothing else of
either than what :class:`Rows` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from hooks.store import ActivationFolder, Moments

CHUNK_ROWS = 4096
"""Contiguous rows that are read together."""
BUFFER_ROWS = 1 << 18
"""Rows that are shuffled together."""


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

    Parameters
    ----------
    heldout
        Share of patients kept out of training.
    buffer_rows
        Rows (training or not) that are shuffled together; at least a chunk.
    """

    def __init__(
        self, folder: ActivationFolder, heldout: float = 0.2, buffer_rows: int = BUFFER_ROWS
    ) -> None:
        self.folder, self.sites = folder, folder.sites
        self.policy: str = folder.manifest["harvest"]["policy"]
        self.model: Mapping[str, Any] = folder.manifest["model"]
        self._heldout = folder.heldout(heldout)
        codes = {role.name.lower(): int(role) for role in Role}
        names, places = np.unique(folder.column("role").astype(str), return_inverse=True)
        self._roles = np.array([codes[name] for name in names], dtype=np.int8)[places]
        self._buffer_rows = buffer_rows

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
                yield _floats(self._batch(sites, start, stop, own))

    def batches(
        self, sites: Sequence[str], batch: int, seed: int, position: Mapping[str, int]
    ) -> Iterator[Batch]:
        per_epoch = int((~self._heldout).sum())
        if per_epoch < batch:
            raise ConfigError(
                f"{self.folder.folder} offers {per_epoch} rows, a batch needs {batch}; "
                "harvest more studies or make the batch smaller"
            )
        done = position.get("batches", 0)
        epoch, skip = divmod(done * batch, per_epoch)
        pending: Batch | None = None
        for buffer in _ahead(self._shuffled(sites, seed, epoch, skip)):
            pending = buffer if pending is None else _joined(pending, buffer)
            whole = len(pending.roles) - len(pending.roles) % batch
            for start in range(0, whole, batch):
                done += 1
                yield _floats(_taken(pending, slice(start, start + batch), {"batches": done}))
            pending = _taken(pending, slice(whole, None), {})

    def _shuffled(self, sites: Sequence[str], seed: int, epoch: int, skip: int) -> Iterator[Batch]:
        """Buffers of shuffled rows from an epoch on, without its first ``skip`` rows."""
        chunks = self._chunks()
        sizes = np.array([int((~self._heldout[a:b]).sum()) for a, b in chunks])
        together = max(1, self._buffer_rows // CHUNK_ROWS)
        while True:
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(len(chunks))
            for first in range(0, len(order), together):
                group = order[first : first + together]
                size = int(sizes[group].sum())
                shuffle = torch.from_numpy(rng.permutation(size))
                if skip < size:
                    rows = [
                        self._batch(sites, start, stop, ~self._heldout[start:stop])
                        for start, stop in (chunks[i] for i in group if sizes[i])
                    ]
                    yield _taken(_joined(*rows), shuffle[skip:], {})
                skip = max(0, skip - size)
            epoch, skip = epoch + 1, 0

    def _chunks(self) -> list[tuple[int, int]]:
        n = self.folder.n_tokens
        return [(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS)]

    def _batch(self, sites: Sequence[str], start: int, stop: int, chosen: np.ndarray) -> Batch:
        mask = torch.from_numpy(chosen)
        x = {site: self.folder.rows(site, start, stop)[mask] for site in sites}
        return Batch(x, torch.from_numpy(self._roles[start:stop])[mask], {})


def _floats(rows: Batch) -> Batch:
    return rows._replace(x={site: x.float() for site, x in rows.x.items()})


def _taken(rows: Batch, index: slice | Tensor, position: Mapping[str, int]) -> Batch:
    return Batch({site: x[index] for site, x in rows.x.items()}, rows.roles[index], position)


def _joined(*rows: Batch) -> Batch:
    x = {site: torch.cat([one.x[site] for one in rows]) for site in rows[0].x}
    return Batch(x, torch.cat([one.roles for one in rows]), {})


def _ahead(buffers: Iterator[Batch]) -> Iterator[Batch]:
    """The same buffers, each read by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, buffers)
        while True:
            buffer = coming.result()
            coming = reader.submit(next, buffers)
            yield buffer
