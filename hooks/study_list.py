"""Studies of a data set of any size, on disk until they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

from hooks.files import StudyError, WriteError
from hooks.studies import Skipped, SplitCheck, Study, refuse_leaks

T = TypeVar("T")


class _Records(Sequence[T], Generic[T]):
    """A sequence by its length and one record at a time."""

    def _record(self, place: int) -> T:
        """Of ``0 … len - 1``."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._record(place)


class Spool(_Records[T], Generic[T]):
    """Records in a temporary file without a name: 8 bytes of memory each, whatever their size.

    Threads and forked processes may read at the same time, once all is written.
    """

    def __init__(self, write: Callable[[T], str], read: Callable[[str], T]) -> None:
        self._write, self._read = write, read
        self._file = tempfile.TemporaryFile(prefix="maira-sae-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])

    def append(self, record: T) -> None:
        """Add a record.

        Raises
        ------
        WriteError
            If the temporary folder is full.
        """
        line = self._write(record).encode()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise WriteError(
                f"the temporary folder {tempfile.gettempdir()} cannot hold the list of studies "
                f"({error}); set TMPDIR to a folder with more room, then run the same command again"
            ) from error
        self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _record(self, place: int) -> T:
        start, stop = self._starts[place], self._starts[place + 1]
        return self._read(os.pread(self._file.fileno(), stop - start, start).decode())


class StudyList(Spool[Study]):
    """Studies in the order of their data set, and what it lists besides.

    Parameters
    ----------
    studies
        As readers yield them; read to the end.
    where
        What they are, for errors.

    Raises
    ------
    StudyError
        If there is none, two have one id, or a patient is on two sides of a split.
    """

    def __init__(self, studies: Iterable[Study | Skipped], where: object = "the data set") -> None:
        super().__init__(_written, lambda line: Study.model_validate(json.loads(line)))
        self.skipped: Sequence[Skipped] = (
            skipped := Spool(json.dumps, lambda line: Skipped(*json.loads(line)))
        )
        """What cannot be built, with the reason."""
        with SplitCheck() as check:
            for study in studies:
                if isinstance(study, Skipped):
                    skipped.append(study)
                else:
                    check.add(study)
                    self.append(study)
            refuse_leaks(check.leaks())
            if twice := check.repeated():
                raise StudyError(f"{where} has two studies {twice!r}; make ids unique")
        if not len(self):
            why = "its tables are empty"
            if skipped:
                why = f"{len(skipped)} were skipped, {skipped[0][0]} for {skipped[0][1]}"
            raise StudyError(f"{where} has no study that can be read; {why}")


class Chosen(_Records[T], Generic[T]):
    """Some of a sequence's records, in the order of their ``places``."""

    def __init__(self, records: Sequence[T], places: np.ndarray) -> None:
        self._records, self._places = records, places

    def __len__(self) -> int:
        return len(self._places)

    def _record(self, place: int) -> T:
        return self._records[int(self._places[place])]


def _written(study: Study) -> str:
    return json.dumps(study.model_dump(mode="json", exclude_defaults=True), sort_keys=True)


def studies_sha256(studies: Iterable[Study]) -> str:
    """:func:`hooks.files.fingerprint` of studies, one after another.

    >>> from hooks.files import fingerprint
    >>> studies_sha256([Study(id="a", frontal="f.png")]) == fingerprint(
    ...     [{"id": "a", "frontal": "f.png"}]
    ... )
    True
    """
    return sha256_of_list(map(_written, studies))


def sha256_of_list(items: Iterable[str]) -> str:
    """Of the JSON list of ``items``, as ``json.dumps`` writes it."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update((", " if number else "").encode() + item.encode())
    digest.update(b"]")
    return digest.hexdigest()


class Mapped(_Records[T], Generic[T]):
    """Records made from others when they are asked for."""

    def __init__(self, records: Sequence[Study], make: Callable[[Study], T]) -> None:
        self._records, self._make = records, make

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, place: int) -> T:
        return self._make(self._records[place])
