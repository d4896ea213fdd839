"""Training rows straight from the model: nothing is written to disk.

For data too large to store (all patches of a large data set) or not allowed to be stored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hooks.files import ConfigError, StudyError
from hooks.harvest import HarvestConfig, harvest_record, harvest_rows
from hooks.processor import Maira2Processor
from hooks.sites import resolve_sites
from hooks.store import Moments, StudyRows
from hooks.studies import Skipped, Study
from hooks.study_list import Chosen
from sae.stream import BUFFER_ROWS, Batch

logger = logging.getLogger(__name__)


class LiveRows:
    """Rows of studies as a model computes them, see :class:`sae.stream.Rows`.

    Each epoch visits the studies in a new order, fills a buffer with whole studies, and shuffles
    its rows. A buffer's last rows, fewer than a batch, are left out of the epoch. To continue at a
    position, at most one buffer is computed again.

    Parameters
    ----------
    config
        Sites, token policy and the dtype rows are rounded to, as a harvest would write them.
    heldout
        Share of patients kept out of training.
    buffer_rows
        Rows that are shuffled together, at least; they stay in memory.
    strict
        Stop at a study that cannot be read. Otherwise it is left out, a warning says why, and
        ``skipped`` keeps it.

    Raises
    ------
    StudyError
        While rows are made: if a study cannot be read and ``strict``, or if none can be.
    """

    def __init__(
        self,
        model: Any,
        processor: Maira2Processor,
        studies: Sequence[Study],
        config: HarvestConfig,
        heldout: float = 0.2,
        buffer_rows: int = BUFFER_ROWS,
        strict: bool = False,
    ) -> None:
        self._parts = (model, processor, config)
        self.sites = [site.name for site in resolve_sites(model, config.sites)]
        self.policy = config.policy
        self._record = harvest_record(model, studies, config)
        self.model: Mapping[str, Any] = self._record["model"]
        aside = np.array([study.split(heldout) == "heldout" for study in studies], dtype=bool)
        self._heldout = Chosen(studies, np.flatnonzero(aside))
        self._training = Chosen(studies, np.flatnonzero(~aside))
        if not self._training or not self._heldout:
            raise ConfigError(
                f"{len(studies)} studies leave {len(self._training)} to train on and "
                f"{len(self._heldout)} held out; both sides need at least one, give more studies"
            )
        self._buffer_rows = buffer_rows
        self._first: Batch | None = None
        self._strict = strict
        self._skipped: dict[str, Skipped] = {}

    def record(self) -> dict[str, Any]:
        return {**self._record, "buffer_rows": self._buffer_rows}

    @property
    def skipped(self) -> list[Skipped]:
        """Studies that could not be read so far, each once."""
        return list(self._skipped.values())

    def width(self, site: str) -> int:
        return self._sample(site).shape[1]

    def moments(self, site: str) -> Moments:
        """Of the first buffer of training rows, the only ones seen before training."""
        x = self._sample(site).double()
        return Moments(len(x), x.mean(dim=0), float(x.square().sum() / len(x)))

    def heldout(self, sites: Sequence[str], limit: int | None = None) -> Iterator[Batch]:
        left = limit
        for rows in self._rows(self._heldout):
            batch = _batch([rows], sites)
            if left is not None:
                batch = _taken(batch, slice(left), {})
                left -= len(batch.roles)
            if len(batch.roles):
                yield batch
            if left == 0:
                return

    def batches(
        self, sites: Sequence[str], batch: int, seed: int, position: Mapping[str, int]
    ) -> Iterator[Batch]:
        epoch, study = position.get("epoch", 0), position.get("study", 0)
        skip = position.get("batches", 0)
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self._training))
            any_batch = False
            while study < len(order):
                rows, last = self._fill(sites, Chosen(self._training, order[study:]))
                if rows is None:
                    break
                shuffle = np.random.default_rng([seed, epoch, study]).permutation(len(rows.roles))
                index = torch.from_numpy(shuffle)
                for number in range(skip, len(index) // batch):
                    any_batch = True
                    taken = index[number * batch : (number + 1) * batch]
                    where = {"epoch": epoch, "study": study, "batches": number + 1}
                    yield _taken(rows, taken, where)
                any_batch = any_batch or skip > 0
                study, skip = study + last, 0
            if not any_batch:
                raise ConfigError(
                    f"no buffer of {len(self._training)} studies holds a batch of {batch} rows; "
                    "give more studies, a larger buffer or a smaller batch"
                )
            epoch, study = epoch + 1, 0

    def _fill(self, sites: Sequence[str], studies: Sequence[Study]) -> tuple[Batch | None, int]:
        """A buffer of the first studies, if any can be read, and how many of them it took."""
        rows: list[StudyRows] = []
        have, took = 0, len(studies)
        for one in self._rows(studies):
            rows.append(one)
            have += len(one.positions)
            if have >= self._buffer_rows:
                took = one.sequence + 1  # studies that were skipped are behind us too
                break
        return _batch(rows, sites) if rows else None, took

    def _rows(self, studies: Sequence[Study]) -> Iterator[StudyRows]:
        model, processor, config = self._parts
        skip = None if self._strict else self._skip
        return harvest_rows(model, processor, studies, config, skip)

    def _skip(self, one: Skipped) -> None:
        if one.study_id not in self._skipped:
            logger.warning("study %r is skipped: %s", one.study_id, one.reason)
            self._skipped[one.study_id] = one

    def _sample(self, site: str) -> torch.Tensor:
        if self._first is None:
            self._first, _ = self._fill(self.sites, self._training)
            if self._first is None:
                raise StudyError(
                    f"none of {len(self._training)} studies to train on can be read, the first "
                    f"because {self.skipped[0].reason}; mend their films"
                )
        return self._first.x[site]


def _batch(rows: Sequence[StudyRows], sites: Sequence[str]) -> Batch:
    x = {site: torch.cat([one.activations[site] for one in rows]).float() for site in sites}
    roles = np.concatenate([one.tokens.role for one in rows]).astype(np.int8)
    return Batch(x, torch.from_numpy(roles), {})


def _taken(rows: Batch, index: slice | torch.Tensor, position: Mapping[str, int]) -> Batch:
    return Batch({site: x[index] for site, x in rows.x.items()}, rows.roles[index], position)
