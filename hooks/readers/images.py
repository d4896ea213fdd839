"""A folder of images with one table, and finding image files by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hooks.files import StudyError, nearest
from hooks.readers.tables import find_table, header, read_rows
from hooks.studies import Skipped, Study, describe

COLUMNS = {
    "id": "id",
    "frontal": "frontal",
    "image": "frontal",
    "path": "frontal",
    "filename": "frontal",
    "lateral": "lateral",
    "prior": "prior",
    "prior_id": "prior_id",
    "patient": "patient",
    "split": "given_split",
    "given_split": "given_split",
    "indication": "indication",
    "technique": "technique",
    "comparison": "comparison",
    "prior_report": "prior_report",
    "findings": "report",
    "report": "report",
    "labels": "labels",
}
"""Column of the table → field of the study; labels are separated by semicolons."""

SPLITS = {
    "train": "train",
    "val": "validate",
    "valid": "validate",
    "validation": "validate",
    "validate": "validate",
    "test": "test",
}
"""Names of splits in data sets → ours."""


class FilmFinder:
    """Finds image files by name in the folders under one, without a list of all files."""

    def __init__(self, folder: Path) -> None:
        self.folders = [
            Path(place)
            for place, _, names in os.walk(folder)
            if any(name.lower().endswith((".png", ".jpg", ".jpeg", ".dcm")) for name in names)
        ]

    def find(self, name: str) -> Path | None:
        return next((path for f in self.folders if is_film(path := f / name)), None)


def is_film(path: Path) -> bool:
    """Whether the file exists and is not empty, as one is whose download was cut off."""
    try:
        return path.stat().st_size > 0 and path.is_file()
    except (OSError, ValueError):
        return False


def images_table(folder: Path) -> Path | None:
    """The one CSV table in ``folder`` that names images, if there is one."""
    try:
        path = find_table(folder, "*")
    except StudyError:
        return None
    if path is None:
        return None
    fields = [COLUMNS.get(name.strip().lower()) for name in header(path)]
    return path if "frontal" in fields else None


def read_images(folder: Path) -> Iterator[Study | Skipped]:
    """Studies of the one CSV table in ``folder``, a row each; see :data:`COLUMNS`.

    Image paths are relative to ``folder``. Without an ``id`` column the frontal film's path names
    the study. Other columns are not read, unless their name is nearly one of ours.

    Raises
    ------
    StudyError
        If there is no such table, or a column looks misspelt, or two mean the same.
    """
    path = images_table(folder)
    if path is None:
        raise StudyError(
            f"{folder} has no single CSV table with a column 'frontal' (or 'image', 'path', "
            "'filename'); write one row a study"
        )
    fields: dict[str, str] = {}
    for name in (name.strip() for name in header(path)):
        known = COLUMNS.get(name.lower())
        if known is None and (hint := nearest(name.lower(), COLUMNS)):
            raise StudyError(f"{path} has a column {name!r}{hint}; rename or remove it")
        if known in fields.values():
            raise StudyError(f"{path} has two columns for {known!r}; leave one")
        if known is not None:
            fields[name] = known
    seen: set[str] = set()
    faults: list[Skipped] = []
    for row in read_rows(path, list(fields), faults=faults):
        values: dict[str, Any] = {
            fields[name]: value for name, value in row.values.items() if value
        }
        name = values.setdefault("id", values.get("frontal", f"row {row.number}"))
        skipped = _gap(values, seen, folder)
        if skipped:
            yield Skipped(name, f"{skipped} ({path.name} row {row.number})")
            continue
        seen.add(name)
        try:
            yield Study.model_validate(values)
        except ValidationError as error:
            reason = f"record is wrong: {describe(error)} ({path.name} row {row.number})"
            yield Skipped(name, reason)
    yield from faults


def _gap(values: dict[str, Any], seen: set[str], folder: Path) -> str:
    """What is missing of a row, or nothing; places its paths and names as a study has them."""
    if "frontal" not in values:
        return "no frontal film: the cell is empty"
    if values["id"] in seen:
        return "repeats a study id: make ids unique"
    for view in ("frontal", "lateral", "prior"):
        if view in values:
            values[view] = folder / values[view]
            if not is_film(values[view]):
                return f"no image file: {values[view]}"
    if "labels" in values:
        values["labels"] = tuple(t.strip() for t in values["labels"].split(";") if t.strip())
    if "given_split" in values:
        values["given_split"] = SPLITS.get(values["given_split"].lower(), values["given_split"])
    return ""
