"""The study record, and readers of the places studies come from."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from hooks.files import StudyError, nearest

STUDIES_FILE = "studies.jsonl"
Split = Literal["train", "heldout"]


class Skipped(NamedTuple):
    """A study that was left out."""

    study_id: str
    reason: str


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

    def films(self) -> tuple[Path, ...]:
        """Paths of the films there are, in MAIRA-2's order."""
        return tuple(p for p in (self.frontal, self.lateral, self.prior) if p is not None)

    def split(self, heldout: float = 0.2) -> Split:
        """``"heldout"`` for that fraction of patients, chosen by a hash, stable everywhere."""
        return split_of(self.patient or self.id, heldout)


def split_of(patient: str, heldout: float = 0.2) -> Split:
    """Which side of the split a patient is on; the same in every run and on every machine."""
    digest = hashlib.sha256(f"maira-sae split {patient}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < heldout else "train"


def read_folder(folder: Path) -> list[Study]:
    """Studies of ``folder/studies.jsonl``: one JSON object a line, image paths relative to it.

    Raises
    ------
    StudyError
        If the file is missing or empty, or names the line and field that is wrong.
    """
    path = folder / STUDIES_FILE
    if not path.is_file():
        raise StudyError(
            f"{folder} has no {STUDIES_FILE}; write one JSON object a line with at least "
            '"id" and "frontal" (a path relative to the folder)'
        )
    studies: list[Study] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        study = _parse_line(line, f"{path} line {number}")
        if study.id in seen:
            raise StudyError(f"{path} line {number} repeats study id {study.id!r}; make ids unique")
        seen.add(study.id)
        located = {
            name: folder / film
            for name in ("frontal", "lateral", "prior")
            if (film := getattr(study, name)) is not None
        }
        studies.append(study.model_copy(update=located))
    if not studies:
        raise StudyError(f"{path} is empty; write one JSON object a line, at least id and frontal")
    return studies


def _parse_line(line: str, where: str) -> Study:
    try:
        return Study.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise StudyError(f"{where} is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        hint = nearest(field, Study.model_fields) if first["type"] == "extra_forbidden" else ""
        raise StudyError(f"{where}, field {field!r}: {first['msg']}{hint}") from None


def read_openi(archive: Path, frontal: Path) -> list[Study]:
    """Reports of the Open-i / Indiana collection (Demner-Fushman et al. 2016), in file order.

    The archive (``NLMCXR_reports.tgz``) holds text and MeSH labels but no films, so every study
    is given the film ``frontal``. Reports without FINDINGS are left out. ``labels`` are the main
    headings of the ``major`` MeSH terms.
    """
    if not archive.is_file():
        raise StudyError(f"no Open-i archive {archive}; give the path of NLMCXR_reports.tgz")
    with tarfile.open(archive) as tar:
        documents = {
            member.name: file.read()
            for member in tar
            if member.name.endswith(".xml") and (file := tar.extractfile(member))
        }
    return [
        study
        for name in sorted(documents, key=_natural_key)
        if (study := _openi_study(name, documents[name], frontal))
    ]


def _natural_key(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else 0, name)


def _openi_study(name: str, document: bytes, frontal: Path) -> Study | None:
    root = ET.fromstring(document)
    sections = {
        str(node.get("Label")).upper(): " ".join((node.text or "").split())
        for node in root.iter("AbstractText")
    }
    if not sections.get("FINDINGS"):
        return None
    majors = (node.text or "" for node in root.iter("major"))
    labels = dict.fromkeys(term.split("/")[0].strip() for term in majors if term)
    return Study(
        id=Path(name).stem,
        frontal=frontal,
        indication=sections.get("INDICATION") or None,
        comparison=sections.get("COMPARISON") or None,
        report=sections["FINDINGS"],
        labels=tuple(labels),
    )


def iter_labels(studies: list[Study]) -> Iterator[tuple[str, int]]:
    """Labels with the number of studies that carry them, commonest first."""
    counts: dict[str, int] = {}
    for study in studies:
        for label in study.labels:
            counts[label] = counts.get(label, 0) + 1
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
