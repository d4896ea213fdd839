"""Open-i / Indiana reports as XML (Demner-Fushman et al. 2016)."""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hooks.files import StudyError
from hooks.readers.images import FilmFinder
from hooks.studies import Film, Section, Skipped, Study

ARCHIVE = "NLMCXR_reports.tgz"
ORDER = ("frontal", "lateral")


def read_openi(archive: Path, frontal: Path) -> list[Study]:
    """Reports of the collection, in file order, each with the film ``frontal``.

    The archive (``NLMCXR_reports.tgz``) holds text and MeSH labels but no films. Reports without
    FINDINGS are left out. ``labels`` are the main headings of the ``major`` MeSH terms.
    """
    if not archive.is_file():
        raise StudyError(f"no Open-i archive {archive}; give the path of NLMCXR_reports.tgz")
    with tarfile.open(archive) as tar:
        documents = {
            member.name: file.read()
            for member in tar
            if member.name.endswith(".xml") and (file := tar.extractfile(member))
        }
    reports = []
    for name in sorted(documents, key=_natural_key):
        try:
            reports.append(_parse(name, documents[name]))
        except ET.ParseError as error:
            raise StudyError(f"{archive}: {name} is not XML ({error}); download it again") from None
    return [_study(report, frontal) for report in reports if report.text("findings")]


def read_openi_folder(folder: Path, order: Sequence[str] = ORDER) -> Iterator[Study | Skipped]:
    """Reports as ``*.xml`` anywhere in ``folder``, with the PNG films they name.

    Parameters
    ----------
    order
        What a report's films are, in the order in which it lists them. The files do not say it:
        frontal first, lateral second is the habit of the collection. Further films have no view.
    """
    films = FilmFinder(folder)
    for path in sorted(folder.rglob("*.xml"), key=lambda path: _natural_key(path.name)):
        try:
            report = _parse(path.name, path.read_bytes())
        except ET.ParseError as error:
            yield Skipped(path.stem, f"report is not XML: {path}: {error}")
            continue
        found = [films.find(f"{name}.png") for name in report.films]
        views = [order[i] if i < len(order) else "" for i in range(len(found))]
        images = tuple(
            Film(path=film, view=view)
            for film, view in zip(found, views, strict=True)
            if film is not None
        )
        by_view = {film.view: film.path for film in reversed(images)}
        if not report.films:
            yield Skipped(report.id, f"report names no film: {path}")
        elif "frontal" not in by_view:
            yield Skipped(report.id, f"no image file: {report.films[0]}.png is not in {folder}")
        else:
            study = _study(report, by_view["frontal"])
            yield study.model_copy(update={"lateral": by_view.get("lateral"), "images": images})


class _Report(NamedTuple):
    id: str
    sections: tuple[Section, ...]
    labels: tuple[str, ...]
    films: tuple[str, ...]

    def text(self, name: str) -> str | None:
        return next((section.text for section in self.sections if section.name == name), None)


def _natural_key(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else 0, name)


def _parse(name: str, document: bytes) -> _Report:
    root = ET.fromstring(document)
    sections = {
        str(node.get("Label")).lower(): " ".join((node.text or "").split())
        for node in root.iter("AbstractText")
    }
    majors = (node.text or "" for node in root.iter("major"))
    films = (node.get("id") for node in root.iter("parentImage"))
    return _Report(
        Path(name).stem,
        tuple(Section(name=name, text=text) for name, text in sections.items() if text),
        tuple(dict.fromkeys(term.split("/")[0].strip() for term in majors if term)),
        tuple(film for film in films if film),
    )


def _study(report: _Report, frontal: Path) -> Study:
    return Study(
        id=report.id,
        frontal=frontal,
        indication=report.text("indication"),
        comparison=report.text("comparison"),
        report=report.text("findings"),
        labels=report.labels,
        sections=report.sections,
    )
