"""The study record, its split by patient, and the folder format of this library.

Readers of other data sets are in :mod:`hooks.readers`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from hooks.files import StudyError, nearest
from hooks.grounding import Box
from hooks.html import facts, picture

STUDIES_FILE = "studies.jsonl"
Split = Literal["train", "heldout"]
GivenSplit = Literal["train", "validate", "test"]


class Skipped(NamedTuple):
    """A study that a data set lists and that cannot be built.

    ``reason`` is the kind of gap, a colon, and what was found: reports count by the part before
    the colon. It names files and rows, never the words of a report.
    """

    study_id: str
    reason: str


class Film(BaseModel):
    """One image of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    view: str
    """As the data set names it (``PA``, ``LL`` …), or an empty string."""


class Section(BaseModel):
    """One section of a report, white space collapsed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Lower case: ``findings``, ``impression``, ``indication`` …"""
    text: str


class Sentence(BaseModel):
    """One annotated sentence or phrase about the frontal film."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    boxes: tuple[Box, ...] | None = None
    """On the whole frontal film, as fractions; ``None`` where nobody drew any."""
    extra_boxes: tuple[Box, ...] = ()
    """Of a second reader."""
    labels: tuple[str, ...] = ()
    locations: tuple[str, ...] = ()
    abnormal: bool | None = None
    progression: str | None = None
    """Change against the prior, in the data set's words."""

    @field_validator("boxes", "extra_boxes")
    @classmethod
    def _inside_the_film(cls, boxes: tuple[Box, ...] | None) -> tuple[Box, ...] | None:
        for box in boxes or ():
            if not (0 <= box.x_min < box.x_max <= 1 and 0 <= box.y_min < box.y_max <= 1):
                raise ValueError(
                    f"box {tuple(box)} is not x_min, y_min, x_max, y_max in order within 0–1"
                )
        return boxes


class Change(BaseModel):
    """What a finding did since the prior film (MS-CXR-T)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finding: str
    direction: Literal["improving", "stable", "worsening"]


class Study(BaseModel):
    """One examination: films by path, the clinical text around them, and the report if known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique in a data set; it names the study in every folder written later."""
    frontal: Path
    """The current frontal film (PNG, JPEG or DICOM)."""
    lateral: Path | None = None
    prior: Path | None = None
    """Prior frontal film."""
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    report: str | None = None
    """Teacher-forced as the assistant's turn; without it only the prompt is read."""
    grounded: bool = False
    """Ask for, or hold, a report with boxes."""
    patient: str | None = None
    """Splits never separate studies of one patient; defaults to the study's own id."""
    labels: tuple[str, ...] = ()
    """Study-level findings from the data set, if it has any."""
    uncertain: tuple[str, ...] = ()
    """Findings that the data set's labels call uncertain; not among ``labels``."""
    images: tuple[Film, ...] = ()
    """Every film of the study, those above included, where the data set tells them apart."""
    sections: tuple[Section, ...] = ()
    """The whole report in sections, where it was parsed."""
    sentences: tuple[Sentence, ...] = ()
    changes: tuple[Change, ...] = ()
    prior_id: str | None = None
    """The study that ``prior`` belongs to."""
    taken: str | None = None
    """ISO date, with the time if it is known."""
    given_split: GivenSplit | None = None
    """The data set's own split. :meth:`split` does not use it: it needs the patient alone, so
    that a folder of activations can be split again without the data set."""

    def _repr_html_(self) -> str:
        views = (("frontal", self.frontal), ("lateral", self.lateral), ("prior", self.prior))
        films = "".join(_picture(path, name) for name, path in views if path is not None)
        shown = {
            "patient": self.patient,
            "indication": self.indication,
            "technique": self.technique,
            "comparison": self.comparison,
            "report": self.report,
            "labels": self.labels,
            "sentences": [_with_boxes(sentence) for sentence in self.sentences],
        }
        return f"<div>{films}</div>{facts(f'Study {self.id}', shown)}"

    def films(self) -> tuple[Path, ...]:
        """Paths of the films there are, in MAIRA-2's order."""
        return tuple(p for p in (self.frontal, self.lateral, self.prior) if p is not None)

    def section(self, name: str) -> str | None:
        """The text of a section, or ``None``."""
        return next((section.text for section in self.sections if section.name == name), None)

    def split(self, heldout: float = 0.2) -> Split:
        """``"heldout"`` for that fraction of patients, chosen by a hash, stable everywhere."""
        return split_of(self.patient or self.id, heldout)


def _picture(path: Path, view: str) -> str:
    from hooks.images import read_image

    try:
        return picture(read_image(path), view)
    except StudyError as error:
        return facts(view, {"not shown": error})


def _with_boxes(sentence: Sentence) -> str:
    n = len(sentence.boxes or ())
    return f"{sentence.text} ({n} boxes)" if n else sentence.text


def split_of(patient: str, heldout: float = 0.2) -> Split:
    """Which side of the split a patient is on; the same in every run and on every machine."""
    digest = hashlib.sha256(f"maira-sae split {patient}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < heldout else "train"


class SplitCheck:
    """Looks for patients on two sides of a split, one study after another. A context manager.

    What it remembers lies in a temporary file on disk.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # an empty name makes a private temporary file
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE studies (id TEXT, patient TEXT, prior TEXT, given TEXT)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, study: Study) -> None:
        row = (study.id, study.patient or study.id, study.prior_id, study.given_split)
        self._db.execute("INSERT INTO studies VALUES (?, ?, ?, ?)", row)

    def n_patients(self) -> int:
        """Different patients so far."""
        return self._db.execute("SELECT COUNT(DISTINCT patient) FROM studies").fetchone()[0]

    def leaks(self) -> list[str]:
        """One line a leak; empty when there is none."""
        self._db.execute("CREATE INDEX IF NOT EXISTS by_id ON studies (id)")
        lines = [
            f"patient {patient} is in {first!r} and, with study {study}, in {given!r}"
            for patient, first, study, given in self._db.execute(
                "SELECT s.patient, f.given, s.id, s.given FROM studies s JOIN "
                "(SELECT patient, given, MIN(rowid) FROM studies WHERE given NOT NULL "
                "GROUP BY patient) f ON f.patient = s.patient "
                "WHERE s.given != f.given ORDER BY s.rowid"
            )
        ]
        lines += [
            f"study {study} of patient {patient} has prior {prior} of patient {other}"
            for study, patient, prior, other in self._db.execute(
                "SELECT s.id, s.patient, p.id, p.patient FROM studies s JOIN studies p "
                "ON p.id = s.prior WHERE p.patient != s.patient ORDER BY s.rowid"
            )
        ]
        return lines + [
            f"study {study} is of patient {first} and of patient {last}"
            for study, first, last in self._db.execute(
                "SELECT id, MIN(patient), MAX(patient) FROM studies GROUP BY id "
                "HAVING MIN(patient) != MAX(patient) ORDER BY MIN(rowid)"
            )
        ]

    def repeated(self) -> str | None:
        """The first id that two studies have, if there is one."""
        found = self._db.execute(
            "SELECT id FROM studies GROUP BY id HAVING COUNT(*) > 1 ORDER BY MIN(rowid) LIMIT 1"
        ).fetchone()
        return found and found[0]


def check_splits(studies: Iterable[Study | Skipped]) -> None:
    """Raise unless every patient is on one side of the data set's split and of ours.

    A patient may not be in two of the data set's splits, nor may a study's prior belong to another
    patient, since :func:`split_of` could then part them.

    Raises
    ------
    StudyError
        It counts the leaks and names the first.

    >>> one = {"frontal": Path("film.png"), "patient": "p"}
    >>> sides = (("a", "train"), ("b", "test"))
    >>> parted = [Study(id=name, **one, given_split=side) for name, side in sides]
    >>> check_splits(parted)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    hooks.files.StudyError: ...
    """
    with SplitCheck() as check:
        for study in studies:
            if isinstance(study, Study):
                check.add(study)
        refuse_leaks(check.leaks())


def refuse_leaks(leaks: list[str]) -> None:
    """Raise :class:`StudyError` for what :meth:`SplitCheck.leaks` found, if anything."""
    if leaks:
        raise StudyError(
            f"{len(leaks)} {'leak' if len(leaks) == 1 else 'leaks'} between splits, the first: "
            f"{leaks[0]}; give every study its patient, and every patient one split"
        )


def refuse_skipped(studies: Iterable[Study | Skipped], where: object) -> Iterator[Study]:
    """The studies, raising :class:`StudyError` at the first that was skipped."""
    for study in studies:
        if isinstance(study, Skipped):
            raise StudyError(
                f"{where}, {study.study_id}: {study.reason}; mend it, or go on without it "
                "(strict=False; on the command line, no --strict)"
            )
        yield study


def read_folder(folder: Path) -> list[Study]:
    """Studies of ``folder/studies.jsonl``, as :func:`iter_folder` reads them when strict.

    >>> from phantom.tour import studies
    >>> folder = studies()[0].frontal.parent.parent
    >>> len(read_folder(folder))
    4
    """
    return list(refuse_skipped(iter_folder(folder, strict=True), folder))


def iter_folder(folder: Path, strict: bool = False) -> Iterator[Study | Skipped]:
    """Studies of ``folder/studies.jsonl``: one JSON object a line, image paths relative to it.

    Raises
    ------
    StudyError
        If the file is missing or empty; at a line that is wrong, if ``strict``.
    """
    path = folder / STUDIES_FILE
    if not path.is_file():
        raise StudyError(
            f"{folder} has no {STUDIES_FILE}; write one JSON object a line with at least "
            '"id" and "frontal" (a path relative to the folder)'
        )
    seen: set[str] = set()
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                study = parse_study(_decoded(line, path, number), f"{path} line {number}")
                if study.id in seen:
                    raise StudyError(
                        f"{path} line {number} repeats study id {study.id!r}; make ids unique"
                    )
            except StudyError as error:
                if strict:
                    raise
                yield Skipped(f"line {number}", f"malformed line: {error}")
                continue
            seen.add(study.id)
            yield _located(study, folder)
    if empty:
        raise StudyError(f"{path} is empty; write one JSON object a line, at least id and frontal")


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} line {number} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from None


def _located(study: Study, folder: Path) -> Study:
    """The study with its image paths relative to ``folder``."""
    paths = {
        name: folder / film
        for name in ("frontal", "lateral", "prior")
        if (film := getattr(study, name)) is not None
    }
    images = tuple(Film(path=folder / film.path, view=film.view) for film in study.images)
    return study.model_copy(update={**paths, "images": images})


def parse_study(line: str, where: str) -> Study:
    """One study from JSON; errors say where, which field, and the nearest known name."""
    try:
        return Study.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise StudyError(f"{where} is not JSON: {error}") from None
    except ValidationError as error:
        raise StudyError(f"{where}, {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """The first thing that is wrong with a record, on one line."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    hint = nearest(field, Study.model_fields) if first["type"] == "extra_forbidden" else ""
    return f"field {field!r}: {first['msg']}{hint}"


def iter_labels(studies: list[Study]) -> Iterator[tuple[str, int]]:
    """Labels with the number of studies that carry them, commonest first."""
    counts: dict[str, int] = {}
    for study in studies:
        for label in study.labels:
            counts[label] = counts.get(label, 0) + 1
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
