"""MS-CXR (Boecking et al. 2022): phrases with boxes, added to studies of MIMIC-CXR."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hooks.files import StudyError
from hooks.grounding import Box
from hooks.readers.priors import FRONTAL
from hooks.readers.tables import open_text, read_rows
from hooks.studies import Sentence, Skipped, Study

NUMBERS = ("x", "y", "w", "h", "image_width", "image_height")
EDGE = 1.0
"""Pixels that a box may reach over the film's edge; it is cut there."""


class _Phrase(NamedTuple):
    label: str
    text: str
    boxes: list[Box]


def with_ms_cxr(studies: Iterable[Study | Skipped], annotations: Path) -> Iterator[Study | Skipped]:
    """Studies of MIMIC-CXR, those with annotated films with their phrases as ``sentences``.

    Where the annotated film is another frontal one than the study's, it becomes the study's
    ``frontal``, since the boxes are on it. A phrase on several rows is one sentence with several
    boxes.

    Parameters
    ----------
    annotations
        ``MS_CXR_Local_Alignment_v….csv``, or the COCO ``.json``.

    Yields
    ------
    Skipped
        For an annotation that is malformed or whose box is not on its film; for an annotated film
        that no study can show, at the end, or beside a study that shows another annotated film.

    Raises
    ------
    StudyError
        If the file cannot be read.
    """
    faults: list[Skipped] = []
    read = _read_json if annotations.suffix == ".json" else _read_csv
    phrases = read(annotations, faults)
    yield from faults
    for study in studies:
        if isinstance(study, Skipped):
            yield study
            continue
        frontal = study.frontal
        films = sorted(
            (film for film in study.images if film.path.stem in phrases),
            key=lambda film: film.path != frontal,
        )
        shown = next((film for film in films if film.view in FRONTAL), None)
        for film in films:
            found = phrases.pop(film.path.stem)
            if film is shown:
                study = study.model_copy(
                    update={"frontal": film.path, "sentences": _sentences(found)}
                )
            else:
                other = shown.path if shown else frontal
                reason = f"annotated film is not shown: study {study.id} shows {other.name}"
                yield Skipped(film.path.stem, reason)
        yield study
    for name in phrases:
        yield Skipped(name, f"annotations without a study: film {name} of {annotations}")


def _sentences(phrases: list[_Phrase]) -> tuple[Sentence, ...]:
    return tuple(
        Sentence(text=phrase.text, boxes=tuple(phrase.boxes), labels=(phrase.label,))
        for phrase in phrases
    )


def _add(
    found: dict[str, list[_Phrase]], film: str, label: str, text: str, box: Box
) -> dict[str, list[_Phrase]]:
    phrases = found.setdefault(film, [])
    for phrase in phrases:
        if (phrase.label, phrase.text) == (label, text):
            phrase.boxes.append(box)
            return found
    phrases.append(_Phrase(label, text, [box]))
    return found


def _read_csv(path: Path, faults: list[Skipped]) -> dict[str, list[_Phrase]]:
    found: dict[str, list[_Phrase]] = {}
    needed = ["dicom_id", "category_name", "label_text", *NUMBERS]
    for row in read_rows(path, needed, faults=faults):
        values = row.values
        box = _box([values[name] for name in NUMBERS])
        if isinstance(box, str):
            reason = f"record is wrong: {box}, {path} row {row.number}"
            faults.append(Skipped(values["dicom_id"], reason))
        else:
            _add(found, values["dicom_id"], values["category_name"], values["label_text"], box)
    return found


def _read_json(path: Path, faults: list[Skipped]) -> dict[str, list[_Phrase]]:
    found: dict[str, list[_Phrase]] = {}
    with open_text(path) as text:
        try:
            document = json.load(text)
            films = {film["id"]: film for film in document["images"]}
            labels = {label["id"]: label["name"] for label in document["categories"]}
            for number, one in enumerate(document["annotations"], start=1):
                film = films[one["image_id"]]
                box = _box([*one["bbox"], film["width"], film["height"]])
                name = Path(film["file_name"]).stem
                if isinstance(box, str):
                    reason = f"record is wrong: {box}, {path} annotation {number}"
                    faults.append(Skipped(name, reason))
                else:
                    _add(found, name, labels[one["category_id"]], one["label_text"].strip(), box)
        except json.JSONDecodeError as error:
            raise StudyError(f"{path} is not JSON: {error}") from None
        except (KeyError, TypeError) as error:
            raise StudyError(f"{path} is not MS-CXR's COCO file: no {error}") from None
    return found


def _box(numbers: list[Any]) -> Box | str:
    """Corners as fractions, from left, top, width, height and the film's size in pixels.

    Or what is wrong with them.
    """
    try:
        x, y, w, h, width, height = map(float, numbers)
    except ValueError:
        return f"a number is none among {NUMBERS}: {numbers}"
    inside = x >= -EDGE and y >= -EDGE and x + w <= width + EDGE and y + h <= height + EDGE
    if not (inside and w > 0 and h > 0):
        return f"box {(x, y, w, h)} is not on a film of {width:g}×{height:g} pixels"
    return Box(
        max(x, 0) / width,
        max(y, 0) / height,
        min(x + w, width) / width,
        min(y + h, height) / height,
    )
