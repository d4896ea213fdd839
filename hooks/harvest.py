"""Studies × model × sites → an activation folder: streaming, resumable, deterministic.

Studies are cut into parts of a fixed number, in order, and each part is computed by itself. So a
run that was killed continues at the first missing part and ends with the same bytes, and so do any
number of processes that share the parts.

Three things happen at a time: a thread reads the studies of the next part, the model runs on those
of this one, and a thread writes the last one. At most three parts are in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hooks.files import ConfigError, StudyError, fingerprint, is_sealed, nearest
from hooks.policies import POLICIES, PatchSample
from hooks.processor import Maira2Processor
from hooks.progress import track
from hooks.prompts import PromptRunner, encode_study
from hooks.roles import Role
from hooks.rows import Kept, Read, part_rows, read_part
from hooks.sites import Site, resolve_sites, site_width
from hooks.store import DTYPES, ActivationFolder, ActivationWriter, StudyRows
from hooks.studies import Study
from hooks.writing import BackgroundWriter

__all__ = ["POLICIES", "HarvestConfig", "harvest", "harvest_record", "harvest_rows"]

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested, and in which pieces."""

    sites: tuple[str, ...]
    """Site names of one stream, see :mod:`hooks.sites`."""
    policy: str = "published"
    """A key of :data:`hooks.policies.POLICIES`."""
    dtype: str = "bfloat16"
    """Dtype on disk."""
    studies_per_part: int = 64
    """A part is held in memory and committed as a whole; three are held at a time."""
    batch_tokens: int = 8192
    """Padded tokens in a forward pass."""
    patches: PatchSample | None = None
    """Which image patches are kept where the policy keeps any; None keeps all."""

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.policy, POLICIES, "policy"),
            (self.dtype, DTYPES, "dtype"),
        ):
            if value not in known:
                raise ConfigError(
                    f"unknown {what} {value!r}{nearest(value, known)}; choose from {list(known)}"
                )
        for name in ("studies_per_part", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.patches is not None and Role.IMAGE not in POLICIES[self.policy]:
            raise ConfigError(
                f"policy {self.policy!r} keeps no image patches to sample; leave the sample out, "
                "or use policy 'patches' or 'all'"
            )

    def n_parts(self, n_studies: int) -> int:
        """Parts that so many studies make."""
        return -(-n_studies // self.studies_per_part)


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
        maker = StudyMaker(model, processor, studies, config, strict)
        self._begin(maker, harvest_record(model, studies, config), config, out, rank, world)

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
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is outside 0–{world - 1}; give each process its own")
        self.out, self._rank, self._world = out, rank, world
        self._record, self._maker = record, maker
        self._writer = ActivationWriter(out, record)
        self.n_parts = config.n_parts(maker.n_studies)

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

    def run(self) -> ActivationFolder | None:
        """Make this process's parts; the folder if it is sealed then, None if others still work."""
        if self.sealed:
            return ActivationFolder(self.out)
        todo = self.missing(mine=True)
        self._writer.sweep(todo)
        with BackgroundWriter() as writing:
            ready = _ahead(todo, self._maker.read)
            for part, read in track(ready, "harvest", total=len(todo)):
                for one in read.skipped:
                    log.warning("study %r is skipped: %s", one.study_id, one.reason)
                rows = self._maker.rows(read)
                names, widths = self._maker.names, self._maker.widths
                writing.put(partial(self._writer.write, part, rows, names, read.skipped, widths))
        if self.missing():
            return None
        self._check_any()
        self._writer.seal(self.n_parts, sites=self._maker.names, **self._record)
        return ActivationFolder(self.out)

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

    def read(self, part: int) -> Any:
        """What :meth:`rows` needs; its ``skipped`` are the studies that could not be read."""
        ...

    def rows(self, read: Any) -> list[StudyRows]:
        """Rows in the order of the studies."""
        ...


class StudyMaker:
    """Makes the rows of any part of the studies."""

    def __init__(
        self,
        model: Any,
        processor: Maira2Processor,
        studies: Sequence[Study],
        config: HarvestConfig,
        strict: bool,
    ) -> None:
        if not studies:
            raise StudyError("there are no studies to harvest; give at least one")
        sites = resolve_sites(model, config.sites)
        if processor.patches_per_image != model.config.image_seq_length:
            raise ConfigError(
                f"the processor makes {processor.patches_per_image} tokens of a film, the model "
                f"takes {model.config.image_seq_length}; load both from one checkpoint"
            )
        roles = kept_roles(config.policy, sites)
        self.sites, self._strict = sites, strict
        self.kept = Kept(roles, config.patches, DTYPES[config.dtype])
        self.runner = PromptRunner(model, processor, config.batch_tokens)
        self._studies, self._size = studies, config.studies_per_part
        self.n_studies = len(studies)
        self.names = [site.name for site in sites]
        self.widths = {site.name: site_width(model, site) for site in sites}
        if processor.hub_processor is not None:
            encode_study(processor, studies[0])  # compares the two prompts

    def read(self, part: int) -> Read:
        first = part * self._size
        chunk = self._studies[first : first + self._size]
        return read_part(self.runner, chunk, first, self._strict)

    def rows(self, read: Read) -> list[StudyRows]:
        return part_rows(self.runner, self.sites, read, self.kept)


def _ahead(items: Sequence[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Each item with ``read(item)``, which a thread works out while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, item) for item in items[:1]]
        for number, item in enumerate(items):
            found = coming.pop().result()
            coming += [pool.submit(read, after) for after in items[number + 1 : number + 2]]
            yield item, found
            del found


def harvest_record(model: Any, studies: Sequence[Study], config: HarvestConfig) -> dict[str, Any]:
    """What decides the rows of a harvest, as JSON: its config, the model and the studies."""
    sites = resolve_sites(model, config.sites)
    return {
        "harvest": {**asdict(config), "sites": [site.name for site in sites]},
        "model": {
            "id": str(model.config._name_or_path),
            "revision": getattr(model.config, "_commit_hash", None),
            "config_sha256": fingerprint(model.config.to_dict()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "studies_sha256": fingerprint([study.model_dump(mode="json") for study in studies]),
    }


def harvest_rows(
    model: Any, processor: Maira2Processor, studies: Sequence[Study], config: HarvestConfig
) -> Iterator[StudyRows]:
    """The rows of one study after another, computed a part at a time; nothing is written.

    Raises what :func:`harvest` raises, but for folders; a study that cannot be read is an error.
    """
    maker = StudyMaker(model, processor, studies, config, strict=True)
    for part in range(config.n_parts(len(studies))):
        yield from maker.rows(maker.read(part))


def kept_roles(policy: str, sites: Sequence[Site]) -> tuple[Role, ...]:
    """Roles that a policy keeps of what ``sites`` see."""
    if sites[0].stream == "text":
        return POLICIES[policy]
    if Role.IMAGE not in POLICIES[policy]:
        raise ConfigError(
            f"policy {policy!r} keeps no image tokens, and {sites[0].name!r} has nothing else; "
            "use policy 'patches'"
        )
    return (Role.IMAGE,)
