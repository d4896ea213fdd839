"""PadChest-GR (de Castro et al. 2024): sentences with the boxes of two readers, and priors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import ValidationError

from hooks.files import StudyError
from hooks.grounding import Box, GroundedPhrase, crop_box, write_grounded
from hooks.readers.images import SPLITS, FilmFinder
from hooks.readers.tables import Groups, find_table, read_rows, stream_array
from hooks.studies import Film, Sentence, Skipped, Study, describe

REPORTS = "grounded_reports*.json"
MASTER = "master_table"
EDGE = 0.01
"""A box this far outside the film, as a fraction, is cut to it; further out is an error."""


def reports_file(folder: Path) -> Path | None:
    """The file of grounded reports, if it is there; the newest by name."""
    found = sorted(folder.glob(REPORTS))
    return found[-1] if found else None


def read_padchest_gr(
    folder: Path, language: Literal["en", "es"] = "en"
) -> Iterator[Study | Skipped]:
    """Studies of ``grounded_reports_*.json``, in its order; PNG films in any folder below.

    ``master_table.csv`` gives the patient and the split; a study that is not in it is skipped, as
    its patient is unknown. ``report`` is the grounded text that MAIRA-2 writes: the sentences in
    their order, each with its first reader's boxes moved from the film to the model's square crop
    (a box outside the crop is left out). ``sentences`` keep both readers' boxes on the whole film.

    A prior film that is named but not on disk is left out, and the study kept.
    """
    path, table = reports_file(folder), find_table(folder, MASTER)
    if path is None:
        raise StudyError(f"{folder} has no {REPORTS}; download it into there")
    if table is None:
        raise StudyError(
            f"{folder} has no {MASTER}.csv, which says whose each study is; download it into there"
        )
    finder = FilmFinder(folder)
    seen: set[str] = set()
    with closing(Groups()) as groups:
        columns = ["StudyID", "PatientID", "split"]
        faults: list[Skipped] = []
        groups.add("master", read_rows(table, columns, ["label_group"], faults), "StudyID")
        yield from faults
        for number, record in enumerate(stream_array(path), start=1):
            if not isinstance(record, Mapping) or not record.get("StudyID"):
                yield Skipped(f"element {number}", f"record is wrong: no StudyID in {path}")
                continue
            name = str(record["StudyID"])
            if name in seen:
                yield Skipped(name, f"two reports: element {number} of {path} repeats the StudyID")
                continue
            seen.add(name)
            try:
                rows = [row.values for row in groups.rows("master", name)]
                yield _study(record, name, rows, finder, language)
            except ValidationError as error:
                yield Skipped(name, f"record is wrong: {describe(error)} ({path} {number})")
            except (StudyError, OSError, TypeError, ValueError, AttributeError) as error:
                yield Skipped(name, f"record is wrong: {error} ({path} element {number})")
        for name in groups.keys("master"):
            if name not in seen:
                row = groups.rows("master", name)[0].number
                yield Skipped(name, f"labels without a study: row {row} of {table}")


def _study(
    record: Mapping[str, Any],
    name: str,
    rows: list[dict[str, str]],
    finder: FilmFinder,
    language: str,
) -> Study | Skipped:
    image = str(record.get("ImageID") or "")
    frontal = finder.find(image) if image else None
    if not image:
        return Skipped(name, "no frontal film: the record has no ImageID")
    if frontal is None:
        return Skipped(name, f"no image file: {image} is in no folder below")
    patients = {row["PatientID"] for row in rows}
    splits = {row["split"].lower() for row in rows}
    if not rows or not all(patients):
        return Skipped(name, f"no patient: {MASTER}.csv does not say whose it is")
    if len(patients) > 1 or len(splits) > 1:
        return Skipped(name, f"two splits: {MASTER}.csv gives {patients} and {splits}")
    split = splits.pop()
    if split not in SPLITS:
        return Skipped(name, f"unknown split: {split!r} is none of {list(SPLITS)}")
    sentences = tuple(_sentence(finding, language) for finding in record.get("findings") or ())
    if not all(sentence.text for sentence in sentences):
        return Skipped(name, f"no sentence: a finding has no sentence_{language}")
    prior = finder.find(str(record.get("PreviousImageID") or "-"))
    labels = dict.fromkeys(label for sentence in sentences for label in sentence.labels)
    return Study(
        id=name,
        frontal=frontal,
        prior=prior,
        prior_id=str(record["PreviousStudyID"])
        if prior and record.get("PreviousStudyID")
        else None,
        report=_grounded(frontal, sentences) if sentences else None,
        grounded=True,
        patient=patients.pop(),
        labels=tuple(labels),
        images=(Film(path=frontal, view="frontal"),),
        sentences=sentences,
        given_split=SPLITS[split],  # pyright: ignore[reportArgumentType]
    )


def _sentence(finding: Mapping[str, Any], language: str) -> Sentence:
    """A finding; the file leaves out keys where nothing is abnormal."""
    boxes = finding.get("boxes")
    return Sentence(
        text=" ".join(str(finding.get(f"sentence_{language}") or "").split()),
        boxes=tuple(map(_box, boxes)) if boxes else None,
        extra_boxes=tuple(map(_box, finding.get("extra_boxes") or ())),
        labels=tuple(finding.get("labels") or ()),
        locations=tuple(finding.get("locations") or ()),
        abnormal=finding.get("abnormal"),
        progression=_progression(finding.get("progression")),
    )


def _progression(value: Any) -> str | None:
    """One string, whether the file has a string, a list or nothing."""
    if isinstance(value, list):
        return "; ".join(map(str, value)) or None
    return str(value) if value else None


def _box(corners: Any) -> Box:
    box = Box(*(float(corner) for corner in corners))
    if min(box) < -EDGE or max(box) > 1 + EDGE:
        raise StudyError(f"box {tuple(box)} lies outside the film; corners are fractions")
    return Box(*(min(max(corner, 0.0), 1.0) for corner in box))


def _grounded(film: Path, sentences: tuple[Sentence, ...]) -> str:
    width, height = film_size(film)
    return write_grounded(
        [
            GroundedPhrase(
                sentence.text,
                [c for box in sentence.boxes or () if (c := crop_box(box, width, height))],
            )
            for sentence in sentences
        ]
    )


def film_size(film: Path) -> tuple[int, int]:
    """Width and height of an image file, from its header."""
    with Image.open(film) as image:
        return image.size
