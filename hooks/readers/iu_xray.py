"""IU-Xray as two CSV tables: ``indiana_reports.csv`` and ``indiana_projections.csv``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from hooks.files import StudyError
from hooks.readers.images import FilmFinder
from hooks.readers.tables import Groups, Row, find_table, read_rows
from hooks.studies import Film, Section, Skipped, Study

REPORTS, PROJECTIONS = "indiana_reports", "indiana_projections"
SECTIONS = ("indication", "comparison", "findings", "impression")


def read_iu_xray(folder: Path) -> Iterator[Study | Skipped]:
    """Studies in the order of their ``uid``; films may lie in any folder below.

    The first film of each projection is taken. There are no patients in the tables: each study
    counts as its own. ``labels`` are the main headings of the ``MeSH`` terms, as in the XML.
    """
    tables = {name: find_table(folder, name) for name in (REPORTS, PROJECTIONS)}
    for name, path in tables.items():
        if path is None:
            raise StudyError(f"{folder} has no {name}.csv; put both tables of the data set there")
    reports, projections = tables[REPORTS], tables[PROJECTIONS]
    assert reports is not None and projections is not None
    films = FilmFinder(folder)
    faults: list[Skipped] = []
    with closing(Groups()) as groups:
        groups.add("reports", read_rows(reports, ["uid"], ["MeSH", *SECTIONS], faults), "uid")
        needed = ["uid", "filename", "projection"]
        groups.add("films", read_rows(projections, needed, faults=faults), "uid")
        yield from faults
        for uid in groups.keys("reports"):
            first, *others = groups.rows("reports", uid)
            yield _study(uid, first, groups.rows("films", uid), films, projections)
            for row in others:
                yield Skipped(uid, f"two reports: row {row.number} of {reports} repeats the uid")
        for uid in groups.missing("films", "reports"):
            row = groups.rows("films", uid)[0]
            yield Skipped(uid, f"films without a report: row {row.number} of {projections}")


def _study(
    uid: str, report: Row, films: list[Row], finder: FilmFinder, table: Path
) -> Study | Skipped:
    found = [
        (finder.find(row.values["filename"]), row.values["projection"].lower()) for row in films
    ]
    images = tuple(Film(path=path, view=view) for path, view in found if path is not None)
    by_view = {film.view: film.path for film in reversed(images)}
    if not any(view == "frontal" for _, view in found):
        return Skipped(uid, f"no frontal film: {table.name} lists none")
    if "frontal" not in by_view:
        names = [row.values["filename"] for row in films]
        return Skipped(uid, f"no image file: {', '.join(names)} of {table.name}")
    texts = {name: " ".join(report.values.get(name, "").split()) for name in SECTIONS}
    terms = report.values.get("MeSH", "").split(";")
    labels = dict.fromkeys(head for term in terms if (head := term.split("/")[0].strip()))
    return Study(
        id=uid,
        frontal=by_view["frontal"],
        lateral=by_view.get("lateral"),
        indication=texts["indication"] or None,
        comparison=texts["comparison"] or None,
        report=texts["findings"] or None,
        labels=tuple(labels),
        images=images,
        sections=tuple(Section(name=n, text=text) for n, text in texts.items() if text),
    )
