"""One pass over rows in blocks: encode, count along, and keep what fired on disk.

A thread counts a block while the next one is encoded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autointerp.contrast import fraction
from autointerp.features import SETS
from autointerp.layout import FolderSource, LiveSource, Piece
from autointerp.tally import Running, Sketch
from hooks.files import ConfigError
from sae.kernels import Above, Code, TopK, Weights, select
from sae.model import MatryoshkaSAE

if TYPE_CHECKING:
    from autointerp.collect import CollectConfig

BLOCK_ROWS = 4096


class Spool:
    """Arrays that grow in unnamed files of a folder, which vanish with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        self._files[name].write(np.ascontiguousarray(values).data)

    def array(self, name: str, dtype: Any) -> np.ndarray:
        file = self._files.get(name)
        if file is None or file.tell() == 0:
            return np.zeros(0, dtype=dtype)
        file.flush()
        return np.memmap(file, dtype=dtype, mode="r")

    def drop(self, name: str) -> None:
        """Give the disk of an array back; it is empty then."""
        if name in self._files:
            self._files.pop(name).close()


class Spooled(NamedTuple):
    """Activations that are not zero, row after row, by ascending latent."""

    ends: np.ndarray
    """Where each row's begin ``[n_rows + 1]``."""
    latent: np.ndarray
    value: np.ndarray


def blocks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same rows, :data:`BLOCK_ROWS` at a time; the last block may be shorter."""
    waiting: list[Piece] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece.modality)
        if count < BLOCK_ROWS:
            continue
        whole = _joined(waiting)
        full = count - count % BLOCK_ROWS
        for start in range(0, full, BLOCK_ROWS):
            yield whole.part(start, start + BLOCK_ROWS)
        waiting, count = [whole.part(full, count)], count - full
    if count:
        yield _joined(waiting)


def _joined(pieces: Sequence[Piece]) -> Piece:
    x, modality, study = zip(*pieces, strict=True)
    return Piece(torch.cat(x), np.concatenate(modality), np.concatenate(study))


class Encoder:
    """The non-zero activations of a dictionary, by the kernels of its device."""

    def __init__(self, sae: MatryoshkaSAE) -> None:
        self.weights = Weights(
            *(t.detach().contiguous() for t in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec))
        )
        self.kernels = select(sae.W_dec.device)
        self.limits = sae.threshold.clamp_min(0) if sae.threshold.ndim else None
        if sae.config.activation == "topk":
            self.selection: Above | TopK = TopK(sae.config.k)
            self.limits = None
        else:
            self.selection = Above(max(0.0, float(sae.threshold.min())))

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n d"]) -> Code:
        """As :meth:`sae.model.MatryoshkaSAE.encode`, without the zeros."""
        code = self.kernels.encode(self.weights, x.to(self.weights.W_dec), self.selection)
        if self.limits is None:
            return code
        kept = code.val > self.limits[code.col]
        ends = torch.cat([code.row_ptr.new_zeros(1), kept.cumsum(0)])
        return code._replace(row_ptr=ends[code.row_ptr], col=code.col[kept], val=code.val[kept])


class _Entries(NamedTuple):
    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    study: np.ndarray
    modality: np.ndarray

    def take(self, chosen: Any) -> _Entries:
        return _Entries(*(column[chosen] for column in self))


class PerModality:
    """What runs along for one modality."""

    def __init__(self, n_latents: int, config: CollectConfig, centre: float) -> None:
        slots = n_latents * len(SETS)
        self.sketch = Sketch(n_latents, centre)
        self.studies_fired = np.zeros(n_latents, dtype=np.int64)
        self.top = Running(slots, config.n_top)
        # A random sample that still has enough when the top ones are taken out of it.
        self.sample = Running(slots, config.n_top + config.n_quantile if config.n_quantile else 0)


class Sweep:
    """Blocks of rows in, statistics and spooled activations out. Use as a context manager."""

    def __init__(self, sae: MatryoshkaSAE, config: CollectConfig, spool: Spool) -> None:
        self.encoder, self.config, self.spool = Encoder(sae), config, spool
        self.F = sae.config.n_latents
        self.n_rows, self.centre = 0, 0.0
        self.modalities: dict[int, PerModality] = {}
        self.sets: list[int] = []
        self._set_of = np.zeros(0, dtype=np.int64)
        self._waiting: list[_Entries] = []
        self._row_counts: list[np.ndarray] = []
        self._worker = ThreadPoolExecutor(1)
        self._counting: Future[None] | None = None

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def known(self, source: FolderSource | LiveSource) -> Iterator[Piece]:
        """The source's pieces; on the way the sets of new patients are looked up."""
        for piece in source.pieces():
            patients = source.patients()
            self.sets += [self.config.set_of(one) for one in patients[len(self.sets) :]]
            yield piece

    def add(self, block: Piece) -> None:
        """Encode a block; it is counted while the next one comes."""
        n = len(block.modality)
        if not bool(block.x.float().sum().isfinite()) and not bool(block.x.isfinite().all()):
            raise ConfigError(
                f"rows {self.n_rows}–{self.n_rows + n - 1} hold NaN or infinity; mend the "
                "activations"
            )
        code = self.encoder(block.x)
        self._wait()
        if len(self._set_of) < len(self.sets):
            self._set_of = np.array(self.sets, dtype=np.int64)
        first, self.n_rows = self.n_rows, self.n_rows + n
        self._counting = self._worker.submit(
            self._count, first, block.modality, block.study, code, self._set_of
        )

    @property
    def n_active(self) -> int:
        """Activations that are not zero, so far."""
        return sum(int(counts.sum()) for counts in self._row_counts)

    def finish(self) -> None:
        """Count what is left."""
        self._wait()
        if self._waiting:
            self._settle(self._joined(), self._set_of)
        for one in self.modalities.values():
            one.top.settle()
            one.sample.settle()

    def _wait(self) -> None:
        if self._counting is not None:
            self._counting.result()

    def _count(
        self, first: int, modality: np.ndarray, study: np.ndarray, code: Code, set_of: np.ndarray
    ) -> None:
        counts = code.row_ptr.diff().cpu().numpy()
        local = np.repeat(np.arange(len(modality)), counts)
        latent = code.col.cpu().numpy().astype(np.int64)
        value = code.val.float().cpu().numpy()
        self.spool.append("latent", latent.astype(np.int32))
        self.spool.append("value", value)
        self._row_counts.append(counts.astype(np.int32))
        if self.centre == 0 and len(value):
            self.centre = float(np.median(value))
        self._waiting.append(_Entries(local + first, latent, value, study[local], modality[local]))
        last = int(study[-1])
        if int(study[0]) != last:
            joined = self._joined()
            done = np.searchsorted(joined.study, last)
            self._settle(joined.take(slice(None, done)), set_of)
            self._waiting = [joined.take(slice(done, None))]

    def _joined(self) -> _Entries:
        return _Entries(*(np.concatenate(c) for c in zip(*self._waiting, strict=True)))

    def _settle(self, entries: _Entries, set_of: np.ndarray) -> None:
        """Count the entries of whole studies."""
        for modality in np.flatnonzero(np.bincount(entries.modality)).tolist():
            own = entries.take(entries.modality == modality)
            if modality not in self.modalities:
                self.modalities[modality] = PerModality(self.F, self.config, self.centre)
            self._tally(modality, self.modalities[modality], own, set_of)

    def _tally(self, modality: int, state: PerModality, own: _Entries, set_of: np.ndarray) -> None:
        state.sketch.add(own.latent, own.value)
        # One cell for a study and latent: its largest value and the first row that has it.
        key = own.study.astype(np.int64) * self.F + own.latent
        order = np.argsort(key)
        key, value, row = key[order], own.value[order], own.row[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        peak = np.maximum.reduceat(value, starts)
        lengths = np.diff(starts, append=len(key))
        is_peak = value == np.repeat(peak, lengths)
        row = np.minimum.reduceat(np.where(is_peak, row, np.iinfo(np.int64).max), starts)
        cell = key[starts]
        self.spool.append(f"cells-{modality}", cell)
        study, latent = np.divmod(cell, self.F)
        state.studies_fired += np.bincount(latent, minlength=self.F)
        slot = set_of[study] * self.F + latent
        state.top.add(slot, peak, row, peak)
        state.sample.add(slot, fraction(self.config.seed, latent, study), row, peak)

    def spooled(self) -> Spooled:
        """All activations, when the pass is finished."""
        counts = np.concatenate(self._row_counts or [np.zeros(0, dtype=np.int32)])
        ends = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=ends[1:])
        latent, value = self.spool.array("latent", np.int32), self.spool.array("value", np.float32)
        return Spooled(ends, latent, value)
