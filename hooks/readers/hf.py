"""Studies to and from ``datasets.Dataset``, films as image columns."""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hooks.files import StudyError, nearest
from hooks.images import read_image
from hooks.readers.dicom import is_dicom
from hooks.readers.images import is_film
from hooks.studies import Skipped, Study, describe

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

FILMS = ("frontal", "lateral", "prior")
_SUFFIX = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif"}


def _features() -> Features:
    from datasets import Features, Image, Value

    text = Value("string")
    boxes = [[Value("float64")]]
    sentence = {
        "text": text,
        "boxes": boxes,
        "extra_boxes": boxes,
        "labels": [text],
        "locations": [text],
        "abnormal": Value("bool"),
        "progression": text,
    }
    special: dict[str, Any] = {
        **dict.fromkeys(FILMS, Image()),
        "grounded": Value("bool"),
        "labels": [text],
        "uncertain": [text],
        "images": [{"path": text, "view": text}],
        "sections": [{"name": text, "text": text}],
        "sentences": [sentence],
        "changes": [{"finding": text, "direction": text}],
    }
    return Features({name: special.get(name, text) for name in Study.model_fields})


def to_dataset(
    studies: Iterable[Study | Skipped], embed: bool = False, cache_dir: Path | None = None
) -> Dataset:
    """A data set with a column for every field of :class:`~hooks.studies.Study`.

    Studies are written one after another into a cache on disk, so an iterator of any length will
    do. Those that were skipped are left out.

    Parameters
    ----------
    embed
        Keep the films' bytes in the data set; without it their paths. DICOM films, which
        ``datasets`` cannot decode, are kept as 8-bit PNG either way.
    cache_dir
        Where the Arrow files lie; default: the cache of ``datasets``.
    """
    from datasets import Dataset

    def rows() -> Iterator[dict[str, Any]]:
        for study in studies:
            if isinstance(study, Study):
                row = study.model_dump(mode="json")
                films = {name: _film(getattr(study, name), embed) for name in FILMS}
                yield {**row, **films}

    return Dataset.from_generator(
        rows,
        features=_features(),
        cache_dir=str(cache_dir) if cache_dir else None,  # pyright: ignore[reportArgumentType]
        fingerprint=uuid.uuid4().hex,  # the generator may hold a file open, so it has no hash
    )


def _film(path: Path | None, embed: bool) -> dict[str, Any] | None:
    if path is None:
        return None
    if not is_film(path):
        raise StudyError(f"no image file {path}; check the path in the study")
    if path.suffix.lower() in {".dcm", ".dicom"} or is_dicom(path):
        buffer = io.BytesIO()
        read_image(path).save(buffer, "PNG")
        return {"path": None, "bytes": buffer.getvalue()}
    # datasets drops bytes beside a path that exists
    return {"path": None, "bytes": path.read_bytes()} if embed else {"path": str(path)}


def from_dataset(
    dataset: Dataset | IterableDataset,
    folder: Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Study | Skipped]:
    """Studies of a data set, row by row.

    Parameters
    ----------
    folder
        Where films whose bytes are in the data set are written, named by their checksum.
    columns
        Field of the study → column of the data set, for sets that were not made by
        :func:`to_dataset`: ``{"frontal": "image", "report": "findings"}``. Columns whose names are
        fields need none; other columns are not read. Without ids, rows are numbered.

    Raises
    ------
    StudyError
        If a field or column does not exist, there is no frontal film, or bytes have no ``folder``.
    """
    from datasets import Image

    names = list(dataset.column_names or [])
    fields = {name: name for name in Study.model_fields if name in names}
    for field, column in (columns or {}).items():
        if field not in Study.model_fields:
            raise StudyError(f"a study has no field {field!r}{nearest(field, Study.model_fields)}")
        if column not in names:
            raise StudyError(f"the data set has no column {column!r}{nearest(column, names)}")
        fields[field] = column
    if "frontal" not in fields:
        raise StudyError(
            f"the data set has no column 'frontal'; name it with columns={{'frontal': …}}, from "
            f"{names}"
        )
    films = [fields[name] for name in FILMS if name in fields]
    for column in films:
        if isinstance((dataset.features or {}).get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    for number, row in enumerate(dataset.select_columns(list(fields.values()))):
        values = {field: row[column] for field, column in fields.items()}
        values = {field: value for field, value in values.items() if value is not None}
        name = str(values.setdefault("id", f"row{number}"))
        for field in FILMS:
            if field in values:
                values[field] = _path(values[field], folder, name)
        missing = [str(values[f]) for f in FILMS if f in values and not is_film(Path(values[f]))]
        if "frontal" not in values:
            yield Skipped(name, f"no frontal film: row {number} of the data set")
        elif missing:
            yield Skipped(name, f"no image file: {missing[0]} of row {number}")
        else:
            try:
                yield Study.model_validate_json(json.dumps(values, default=str))
            except ValidationError as error:
                yield Skipped(name, f"record is wrong: {describe(error)} of row {number}")


def _path(film: Any, folder: Path | None, name: str) -> str:
    """Where the film lies; bytes are written there first."""
    if isinstance(film, str):
        return film
    content = film["bytes"]
    if content is None:
        return film["path"]
    if folder is None:
        raise StudyError(
            f"study {name}: its film is inside the data set; give a folder to write films into"
        )
    suffix = next((s for magic, s in _SUFFIX.items() if content.startswith(magic)), None)
    if suffix is None:
        suffix = ".dcm" if content[128:132] == b"DICM" else Path(film["path"] or "").suffix
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)
