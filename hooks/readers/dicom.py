"""A folder of DICOM files, as it comes from an archive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from hooks.files import StudyError
from hooks.readers.priors import (
    FRONTAL,
    LATERAL,
    Moment,
    choose,
    latest_before,
    moment,
    view_of,
)
from hooks.readers.tables import Groups, Row
from hooks.studies import Film, Skipped, Study

TAGS = (
    "PatientID",
    "StudyInstanceUID",
    "SOPInstanceUID",
    "Modality",
    "ViewPosition",
    "ViewCodeSequence",
    "StudyDate",
    "StudyTime",
)
PROJECTIONS = ("CR", "DX", "RG", "")
"""Modalities that are films; an empty one is not held against a file."""


def read_dicom_folder(folder: Path) -> Iterator[Study | Skipped]:
    """Studies by patient, from the headers of all DICOM files below ``folder``.

    Ids are StudyInstanceUIDs. The view is ViewPosition, or ViewCodeSequence where that is empty; a
    study whose files tell no frontal view is skipped. The prior is the latest earlier study of the
    patient; a study without PatientID counts as a patient of its own and has none. Files of
    other modalities than CR, DX and RG, and files that are not DICOM, are not read.

    Raises
    ------
    StudyError
        If pydicom is not installed.
    """
    with closing(Groups()) as groups:
        faults: list[Skipped] = []
        groups.add("files", _headers(folder, faults), "patient")
        yield from faults
        for patient in groups.keys("files"):
            yield from _patient(folder, groups.rows("files", patient))


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble."""
    with path.open("rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def _headers(folder: Path, faults: list[Skipped]) -> Iterator[Row]:
    """One row a film; what cannot be read goes to ``faults``."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise StudyError(
            f"{folder} holds DICOM, and pydicom is not installed; pip install 'maira-sae[dicom]'"
        ) from None
    for number, path in enumerate(_files(folder), start=1):
        name = str(path.relative_to(folder))
        named = path.suffix.lower() in {".dcm", ".dicom"}
        if not (named or is_dicom(path)):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        except (InvalidDicomError, OSError, ValueError, AttributeError, EOFError) as error:
            faults.append(Skipped(name, f"unreadable file: {path}: {error}"))
            continue
        values = {tag: str(header.get(tag) or "") for tag in TAGS}
        if values["Modality"] not in PROJECTIONS:
            continue
        if not values["StudyInstanceUID"]:
            faults.append(Skipped(name, f"no study: {path} has no StudyInstanceUID"))
            continue
        codes = header.get("ViewCodeSequence") or []
        values["ViewCodeSequence"] = str(codes[0].get("CodeMeaning", "")) if codes else ""
        values["file"] = name
        values["patient"] = values["PatientID"] or f" {values['StudyInstanceUID']}"
        yield Row(number, values)


def _files(folder: Path) -> Iterator[Path]:
    """Files anywhere below, folder by folder in the order of their names."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(place) / name


class _Exam(NamedTuple):
    id: str
    patient: str
    when: Moment
    films: tuple[Film, ...]

    @property
    def frontal(self) -> Film | None:
        return choose(self.films, FRONTAL)


def _patient(folder: Path, rows: list[Row]) -> Iterator[Study | Skipped]:
    by_study: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        films = by_study.setdefault(row.values["StudyInstanceUID"], {})
        films.setdefault(row.values["SOPInstanceUID"] or row.values["file"], row.values)
    exams = [_exam(folder, study, list(films.values())) for study, films in by_study.items()]
    usable = [exam for exam in exams if exam.frontal is not None]
    for exam in sorted(exams, key=lambda exam: (str(exam.when), exam.id)):
        frontal, lateral = exam.frontal, choose(exam.films, LATERAL)
        if frontal is None:
            views = ", ".join(film.view or "no view" for film in exam.films)
            yield Skipped(exam.id, f"no frontal film: its views are {views}")
            continue
        prior = latest_before(exam, usable) if exam.patient else None
        yield Study(
            id=exam.id,
            frontal=frontal.path,
            lateral=lateral.path if lateral else None,
            prior=prior.frontal.path if prior and prior.frontal else None,
            prior_id=prior.id if prior else None,
            patient=exam.patient or None,
            images=exam.films,
            taken=str(exam.when) or None,
        )


def _exam(folder: Path, study: str, films: list[dict[str, str]]) -> _Exam:
    first = films[0]
    return _Exam(
        study,
        first["PatientID"],
        moment(first["StudyDate"], first["StudyTime"]),
        tuple(
            Film(
                path=folder / film["file"],
                view=view_of(film["ViewPosition"], film["ViewCodeSequence"]),
            )
            for film in films
        ),
    )
