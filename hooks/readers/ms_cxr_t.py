"""MS-CXR-T (Bannur et al. 2023): changes of findings, added to studies of MIMIC-CXR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from hooks.readers.images import is_film
from hooks.readers.tables import Row, read_rows
from hooks.studies import Change, Skipped, Study, describe

SUFFIX = "_progression"
CHANGING = ("consolidation", "edema", "pleural_effusion", "pneumonia", "pneumothorax")
NEEDED = ("study_id", "dicom_id", "previous_study_id", "previous_dicom_id")


def with_ms_cxr_t(studies: Iterable[Study | Skipped], table: Path) -> Iterator[Study | Skipped]:
    """Studies of MIMIC-CXR, those in the table with its pair of films and their ``changes``.

    The annotated film becomes ``frontal`` and the previous one ``prior``. ``prior_report`` stays
    only where the study's own prior was the same study. The temporal sentence pairs of MS-CXR-T are
    not read.

    Yields
    ------
    Skipped
        In place of a study whose annotated films are not on disk or whose changes are malformed,
        and at the end for a row whose study did not come by.
    """
    columns = [f"{finding}{SUFFIX}" for finding in CHANGING]
    rows: dict[str, Row] = {}
    faults: list[Skipped] = []
    for row in read_rows(table, NEEDED, columns, faults):
        name = f"s{row.values['study_id'].removeprefix('s')}"
        if name in rows:
            yield Skipped(name, f"two rows of changes: row {row.number} of {table}")
        else:
            rows[name] = row
    yield from faults
    for study in studies:
        row = rows.pop(study.id, None) if isinstance(study, Study) else None
        yield study if row is None else _with_changes(study, row, table)
    for name, row in rows.items():
        yield Skipped(name, f"changes without a study: row {row.number} of {table}")


def _with_changes(study: Study | Skipped, row: Row, table: Path) -> Study | Skipped:
    assert isinstance(study, Study)
    where, values = f"{table} row {row.number}", row.values
    before = f"s{values['previous_study_id'].removeprefix('s')}"
    place = study.frontal.parent
    frontal = place / f"{values['dicom_id']}.jpg"
    prior = place.parent / before / f"{values['previous_dicom_id']}.jpg"
    for film in (frontal, prior):
        if not is_film(film):
            return Skipped(study.id, f"no image file: {film} of {where}")
    marked = {f: values.get(f"{f}{SUFFIX}", "").lower() for f in CHANGING}
    try:
        changes = [
            Change(finding=f, direction=mark)  # pyright: ignore[reportArgumentType]
            for f, mark in marked.items()
            if mark not in ("", "nan")
        ]
    except ValidationError as error:
        return Skipped(study.id, f"record is wrong: {describe(error)}, {where}")
    return study.model_copy(
        update={
            "frontal": frontal,
            "prior": prior,
            "prior_id": before,
            "prior_report": study.prior_report if before == study.prior_id else None,
            "changes": tuple(changes),
        }
    )
