"""Studies × model × sites → an activation folder: streaming, resumable, deterministic.

Studies are cut into parts of a fixed number, in order, and each part is computed by itself. So a
run that was killed continues at the first missing part and ends with the same bytes, and so do any
number of processes that share the parts.

On an accelerator three things happen at a time: a thread reads the studies of the next part, the
model runs on those of this one, and a thread writes the last one. On a processor several parts are
made at a time, see :mod:`hooks.streams`, and a thread writes. In memory are as many parts as are
made at a time, and two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from hooks.estimate import Estimate, estimate
from hooks.files import ConfigError, StudyError, fingerprint, is_sealed
from hooks.harvest_config import HarvestConfig
from hooks.policies import POLICIES
from hooks.processor import Maira2Processor
from hooks.progress import track
from hooks.rows import RowMaker
from hooks.sites import resolve_sites
from hooks.store import ActivationFolder, ActivationWriter, StudyRows
from hooks.streams import in_threads, shared_cores
from hooks.studies import Skipped, Study
from hooks.writing import BackgroundWriter

__all__ = ["POLICIES", "Harvest", "HarvestConfig", "harvest", "harvest_record", "harvest_rows"]

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


def harvest(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
    strict: bool = False,
    retry_skipped: bool = False,
) -> ActivationFolder:
    """Write the activations of ``studies`` at ``config.sites`` into the folder ``out``.

    A folder that already holds this very harvest is completed, or returned as it is.

    Parameters
    ----------
    strict
        Stop at a study that cannot be read. Otherwise it is left out, ``skipped.jsonl`` says why,
        and the manifest counts it.
    retry_skipped
        Compute again the parts in which studies had been skipped, as after their films were mended.

    Raises
    ------
    StudyError
        If there are no studies, or none can be read, or one cannot and ``strict``.
    SiteError
        If a site does not exist in ``model``.
    FolderError
        If ``out`` holds something else.
    WriteError
        If the disk is full. What was written stays, and the same call goes on from there.
    """
    job = Harvest(model, processor, studies, config, out, strict)
    if retry_skipped:
        job.reopen_skipped()
    folder = job.run()
    assert folder is not None  # alone, there is nobody to wait for
    return folder


class Harvest:
    """A harvest, or one process's share of it; see :func:`harvest`.

    Parameters
    ----------
    rank, world
        This process takes every ``world``-th part from ``rank`` on. Processes share nothing but
        ``out``; whichever finishes last seals it. A missing process's parts are made by starting
        again, with any number of processes.

    Attributes
    ----------
    streams
        Parts that are made at a time, each in a thread of its own; the rows do not depend on it.
        Set it before :meth:`run`; at first it is :func:`hooks.streams.default_streams`.
    """

    def __init__(
        self,
        model: Any,
        processor: Maira2Processor,
        studies: Sequence[Study],
        config: HarvestConfig,
        out: Path,
        strict: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        maker = RowMaker(model, processor, studies, config, strict)
        record = harvest_record(model, studies, config)
        self._begin(maker, record, config, out, rank, world, studies)

    @classmethod
    def of(
        cls,
        maker: Maker,
        record: Mapping[str, Any],
        config: HarvestConfig,
        out: Path,
        rank: int = 0,
        world: int = 1,
    ) -> Harvest:
        """A harvest of whatever ``maker`` makes; ``record`` is all that decides its rows."""
        job = cls.__new__(cls)
        job._begin(maker, record, config, out, rank, world)
        return job

    def _begin(
        self,
        maker: Maker,
        record: Mapping[str, Any],
        config: HarvestConfig,
        out: Path,
        rank: int,
        world: int,
        studies: Sequence[Study] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is outside 0–{world - 1}; give each process its own")
        self.out, self._rank, self._world = out, rank, world
        self._record, self._maker, self._studies = record, maker, studies
        self._size = config.studies_per_part
        self._writer = ActivationWriter(out, record)
        self.n_parts = config.n_parts(maker.n_studies)
        self.streams = maker.streams

    @property
    def sealed(self) -> bool:
        """Whether the folder is finished."""
        return is_sealed(self.out)

    def missing(self, mine: bool = False) -> list[int]:
        """Parts that are not committed, of all processes or of this one."""
        parts = range(self._rank, self.n_parts, self._world) if mine else range(self.n_parts)
        return [part for part in parts if not self._writer.has(part)]

    def reopen_skipped(self) -> None:
        """Forget the parts in which studies were skipped. Call it in one process, before others."""
        if parts := list(self._writer.skipped(self.n_parts)):
            self._writer.reopen(parts)

    def estimate(self) -> Estimate:
        """What the missing parts of all processes will take, from a few of their studies.

        The time is that of as many processes as there are, each as fast as this one.
        """
        if self._studies is None or not isinstance(self._maker, RowMaker):
            raise ConfigError("only a harvest of given reports can be estimated; start it instead")
        chunks = (self._studies[p * self._size : (p + 1) * self._size] for p in self.missing())
        found = estimate(self._maker, [study for chunk in chunks for study in chunk], self.out)
        return found._replace(seconds=found.seconds / self._world)

    def run(self) -> ActivationFolder | None:
        """Make this process's parts; the folder if it is sealed then, None if others still work."""
        if self.sealed:
            return ActivationFolder(self.out)
        todo = self.missing(mine=True)
        self._writer.sweep(todo)
        with BackgroundWriter() as writing:
            for _ in track(self._made(todo, writing), "harvest", total=len(todo)):
                pass
        if self.missing():
            return None
        self._check_any()
        self._writer.seal(self.n_parts, sites=self._maker.names, **self._record)
        return ActivationFolder(self.out)

    def _made(self, todo: Sequence[int], writing: BackgroundWriter) -> Iterator[int]:
        """Each part once its rows are made and handed over."""

        def make(part: int, read: Any) -> None:
            for one in read.skipped:
                log.warning("study %r is skipped: %s", one.study_id, one.reason)
            rows = self._maker.rows(read)
            names, widths = self._maker.names, self._maker.widths
            writing.put(partial(self._writer.write, part, rows, names, read.skipped, widths))

        streams = min(self.streams, len(todo))
        if streams > 1:
            with shared_cores(streams):
                yield from in_threads(
                    todo, lambda part: make(part, self._maker.read(part)), streams
                )
            return
        # On a processor there is nothing to overlap with: a thread that reads only takes the
        # interpreter, and a core, from the model's own threads.
        ahead = self._maker.device.type != "cpu"
        for part, read in (_ahead if ahead else _each)(todo, self._maker.read):
            make(part, read)
            yield part

    def _check_any(self) -> None:
        skipped = [one for part in self._writer.skipped(self.n_parts).values() for one in part]
        if len(skipped) == self._maker.n_studies:
            raise StudyError(
                f"none of {len(skipped)} studies could be read, the first because "
                f"{skipped[0].reason}; mend them, delete {self.out} and run again"
            )


class Maker(Protocol):
    """Makes the rows of any part; ``read`` runs in a thread while the model is busy."""

    n_studies: int
    names: list[str]
    """Of the sites."""
    widths: dict[str, int]
    """By site."""
    streams: int
    """Parts that are made at a time where nothing is asked; threads call the methods."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def read(self, part: int) -> Any:
        """What :meth:`rows` needs; its ``skipped`` are the studies that could not be read."""
        ...

    def rows(self, read: Any) -> list[StudyRows]:
        """Rows in the order of the studies."""
        ...


def _ahead(items: Sequence[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each item with ``read(item)``, which a thread works out while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, item) for item in items[:1]]
        for number, item in enumerate(items):
            found = coming.pop().result()
            coming += [pool.submit(read, after) for after in items[number + 1 : number + 2]]
            yield item, found
            del found


def _each(items: Sequence[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """As :func:`_ahead`, without a thread."""
    for item in items:
        yield item, read(item)


def harvest_record(model: Any, studies: Sequence[Study], config: HarvestConfig) -> dict[str, Any]:
    """What decides the rows of a harvest, as JSON: its config, the model and the studies."""
    sites = resolve_sites(model, config.sites)
    return {
        "harvest": {
            **asdict(config),
            "sites": [site.name for site in sites],
            "batch_tokens": config.tokens_on(model.device),
        },
        "model": {
            "id": str(model.config._name_or_path),
            "revision": getattr(model.config, "_commit_hash", None),
            "config_sha256": fingerprint(model.config.to_dict()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "studies_sha256": fingerprint(
            [study.model_dump(mode="json", exclude_defaults=True) for study in studies]
        ),
    }


def harvest_rows(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    config: HarvestConfig,
    skip: Callable[[Skipped], None] | None = None,
) -> Iterator[StudyRows]:
    """The rows of one study after another, computed a part at a time; nothing is written.

    ``skip`` is told of each study that cannot be read; without it, such a study is an error. Raises
    what :func:`harvest` raises, but for folders.
    """
    maker = RowMaker(model, processor, studies, config, strict=skip is None)
    for part in range(config.n_parts(len(studies))):
        read = maker.read(part)
        if skip is not None:
            for one in read.skipped:
                skip(one)
        yield from maker.rows(read)
