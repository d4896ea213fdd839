"""CSV tables of data sets as they are downloaded: plain, gzipped or zipped, any line ends."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from hooks.files import StudyError, WriteError, nearest
from hooks.studies import Skipped

csv.field_size_limit(2**24)  # whole reports are single fields


class Row(NamedTuple):
    """A line of a table; ``number`` counts data rows from 1, for messages."""

    number: int
    values: dict[str, str]


def find_table(folder: Path, pattern: str) -> Path | None:
    """The table in ``folder`` whose name matches ``pattern`` + ``.csv``, ``.csv.gz``, ``.csv.zip``.

    Raises :class:`StudyError` if several different tables do.
    """
    suffixes = (".csv", ".csv.gz", ".csv.zip")
    found = [path for suffix in suffixes for path in sorted(folder.glob(pattern + suffix))]
    found = [path for path in found if path.is_file()]
    stems = {path.name.split(".csv")[0] for path in found}
    if len(stems) > 1:
        raise StudyError(
            f"{folder} has several tables {pattern}.csv ({', '.join(sorted(stems))}); leave one"
        )
    return found[0] if found else None


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file, decompressed by its suffix; a byte-order mark is dropped, line ends are kept.

    Raises :class:`StudyError` where the file is damaged or is not UTF-8.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as text:
                yield text
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".csv")]
                names = [name for name in names if not name.startswith("__MACOSX")]
                if len(names) != 1:
                    raise StudyError(f"{path} holds {len(names)} CSV files; expected one")
                with archive.open(names[0]) as raw:
                    yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        else:
            with path.open(encoding="utf-8-sig", newline="") as text:
                yield text
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise StudyError(f"{path} is damaged ({error}); download it again") from None


def header(path: Path) -> list[str]:
    """Column names of a table."""
    with open_text(path) as text:
        return next(csv.reader(text), [])


def read_rows(
    path: Path,
    needed: Sequence[str],
    wanted: Sequence[str] = (),
    faults: list[Skipped] | None = None,
) -> Iterator[Row]:
    """Rows of a table, stripped, with the columns ``needed`` and those ``wanted`` that it has.

    Parameters
    ----------
    faults
        Takes the malformed rows; without it, the first is an error.

    Raises
    ------
    StudyError
        For a missing column (the nearest is named), a malformed row and no ``faults``, or a quote
        that is never closed, which hides the rows after it.
    """
    with open_text(path) as text:
        lines = csv.reader(text, strict=True)
        try:
            names = [name.strip() for name in next(lines, [])]
            for column in needed:
                if column not in names:
                    raise StudyError(
                        f"{path} has no column {column!r}{nearest(column, names)}; its columns are "
                        f"{names}"
                    )
            places = {name: names.index(name) for name in (*needed, *wanted) if name in names}
            for number, fields in enumerate(filter(None, _fields(lines)), start=1):
                if isinstance(fields, list) and len(fields) == len(names):
                    yield Row(number, {name: fields[at].strip() for name, at in places.items()})
                    continue
                fault = f"has {len(fields)} fields, the header {len(names)}"
                if isinstance(fields, str):
                    fault = f"has a stray quote ({fields})"
                if faults is None:
                    raise StudyError(
                        f"{path} row {number} {fault}; download it again, or mend its quotes"
                    )
                what = f"malformed row: row {number} {fault}, {path} line {lines.line_num}"
                faults.append(Skipped(f"{path.name} row {number}", what))
        except csv.Error as error:
            raise StudyError(
                f"{path} line {lines.line_num} is not CSV ({error}); mend its quotes, or download "
                "it again"
            ) from None


def _fields(lines: Any) -> Iterator[list[str] | str]:
    """Fields of each row, or what is wrong with it where the next row can be read all the same."""
    while True:
        try:
            yield next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if "expected after" not in str(error):
                raise
            yield str(error)


class Groups:
    """Rows of several tables, grouped by a key such as the patient.

    They lie in a temporary file on disk, so tables may come in any order and of any size; close it
    when done.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # an empty name makes a private temporary file
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE rows (source TEXT, key TEXT, number INTEGER, body TEXT)")
        self._db.execute("CREATE INDEX place ON rows (source, key, number)")

    def add(self, source: str, rows: Iterable[Row], key: str) -> None:
        """File ``rows`` under ``source``, by the value of their column ``key``."""
        values = ((source, row.values[key], row.number, json.dumps(row.values)) for row in rows)
        try:
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", values)
        except sqlite3.OperationalError as error:
            raise WriteError(
                f"the temporary folder {tempfile.gettempdir()} cannot hold the tables ({error}); "
                "set TMPDIR to a folder with more room, then run the same command again"
            ) from error

    def keys(self, source: str) -> Iterator[str]:
        """Keys of a source; numbers first, in numeric order."""
        query = (
            "SELECT key FROM (SELECT DISTINCT key FROM rows WHERE source = ?) "
            "ORDER BY CAST(key AS INTEGER), key"
        )
        for (key,) in self._db.execute(query, (source,)):
            yield key

    def rows(self, source: str, key: str) -> list[Row]:
        """Rows of one key, in the order of the table."""
        query = "SELECT number, body FROM rows WHERE source = ? AND key = ? ORDER BY number"
        return [Row(n, json.loads(body)) for n, body in self._db.execute(query, (source, key))]

    def missing(self, source: str, other: str) -> Iterator[str]:
        """Keys of ``source`` that ``other`` has not."""
        query = (
            "SELECT DISTINCT key FROM rows WHERE source = ? AND key NOT IN "
            "(SELECT key FROM rows WHERE source = ?) ORDER BY CAST(key AS INTEGER), key"
        )
        for (key,) in self._db.execute(query, (source, other)):
            yield key

    def close(self) -> None:
        self._db.close()


def stream_array(path: Path, chunk: int = 1 << 16) -> Iterator[object]:
    """Elements of a JSON file that is one array, read piece by piece.

    Raises :class:`StudyError` where it is not one.
    """
    decoder = json.JSONDecoder()

    def fault(what: str) -> StudyError:
        return StudyError(f"{path} element {count} {what}; expected one JSON array")

    count = 0
    with open_text(path) as text:
        buffer, at, ended = "", 0, False

        def more() -> None:
            nonlocal buffer, at, ended
            piece = text.read(chunk)
            buffer, at, ended = buffer[at:] + piece, 0, not piece

        while not buffer.strip() and not ended:
            more()
        buffer = buffer.lstrip()
        if not buffer.startswith("["):
            raise fault("does not begin with '['")
        at = 1
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at < len(buffer) and buffer[at] == "]":
                return
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError:
                end = len(buffer)
            if end == len(buffer) or buffer[end] not in " \t\r\n,]":  # a number may go on
                if ended:
                    raise fault("is cut off or is not JSON")
                more()
                continue
            count += 1
            yield value
            at = end
