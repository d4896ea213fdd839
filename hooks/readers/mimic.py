"""MIMIC-CXR-JPG (Johnson et al. 2019), with the reports of MIMIC-CXR beside it.

::

    mimic-cxr-2.0.0-metadata.csv.gz                 needed
    mimic-cxr-2.0.0-{split,chexpert,negbio}.csv.gz  read where they are
    files/p10/p10000032/s50414267/<dicom_id>.jpg
    files/p10/p10000032/s50414267.txt               or mimic-cxr-reports/files/…, or reports/…
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hooks.files import ConfigError, StudyError
from hooks.readers.images import SPLITS, is_film
from hooks.readers.priors import (
    FRONTAL,
    LATERAL,
    Moment,
    choose,
    latest_before,
    moment,
    view_of,
)
from hooks.readers.sections import parse_report
from hooks.readers.tables import Groups, Row, find_table, read_rows
from hooks.studies import Film, Section, Skipped, Study

METADATA = "mimic-cxr-*-metadata"
LABELLERS = ("chexpert", "negbio")
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
VIEW_MEANING = "ViewCodeSequence_CodeMeaning"


@dataclass(frozen=True)
class MimicConfig:
    """How MIMIC-CXR becomes studies."""

    reports: Path | None = None
    """Folder that holds ``p10/…`` of the reports; ``None`` looks in the usual places."""
    labeller: Literal["chexpert", "negbio"] | None = None
    """Whose labels; ``None`` takes CheXpert's where the file is there, or else NegBio's."""
    report_sections: tuple[str, ...] = ("findings",)
    """The first of these that a report has is ``report``. ``body`` is text without a heading, see
    :mod:`hooks.readers.sections`."""
    prior_sections: tuple[str, ...] = ("findings", "impression")
    """Sections of the prior's report that make ``prior_report``, joined by a space. What MAIRA-2
    was given is not published."""

    def __post_init__(self) -> None:
        if self.labeller not in (None, *LABELLERS):
            raise ConfigError(f"labeller is {self.labeller!r}; choose from {list(LABELLERS)}")


class _Exam(NamedTuple):
    id: str
    when: Moment
    films: tuple[Film, ...]
    split: str
    sections: tuple[Section, ...]
    fault: str

    @property
    def frontal(self) -> Film | None:
        return choose(self.films, FRONTAL)


def read_mimic(folder: Path, config: MimicConfig | None = None) -> Iterator[Study | Skipped]:
    """Studies, patient by patient in numeric order, each with its latest earlier study as prior.

    Ids are ``s50414267``, patients ``p10000032``. The frontal film is the first PA, or else AP,
    that is on disk; the lateral the first LATERAL, LL or RL. A prior must have a frontal film on
    disk and a StudyDate, and on the same day a StudyTime, that are surely earlier. ``report`` is
    the FINDINGS; ``indication`` the INDICATION or else the HISTORY. ``labels`` are findings marked
    1, ``uncertain`` those marked -1.

    A malformed row of a table, and a label row without a study in the metadata, are yielded as
    :class:`Skipped`.
    """
    config = config or MimicConfig()
    metadata = find_table(folder, METADATA)
    if metadata is None:
        raise StudyError(f"{folder} has no {METADATA}.csv or .csv.gz; download it into there")
    split, labels = find_table(folder, "mimic-cxr-*-split"), _label_table(folder, config)
    roots = _report_roots(folder, config)
    faults: list[Skipped] = []
    with closing(Groups()) as groups:
        columns = ["ViewPosition", "StudyDate", "StudyTime", VIEW_MEANING]
        needed = ["dicom_id", "subject_id", "study_id"]
        groups.add("films", read_rows(metadata, needed, columns, faults), "subject_id")
        groups.add("ids", read_rows(metadata, ["study_id"], faults=[]), "study_id")
        if split is not None:
            needed = ["subject_id", "study_id", "split"]
            groups.add("split", read_rows(split, needed, faults=faults), "subject_id")
        if labels is not None:
            rows = read_rows(labels, ["study_id"], FINDINGS, faults)
            groups.add("labels", rows, "study_id")
        yield from faults
        for subject in groups.keys("films"):
            yield from _patient(folder, subject, groups, roots, config)
        for study in groups.missing("labels", "ids"):
            number = groups.rows("labels", study)[0].number
            yield Skipped(f"s{study}", f"labels without a study: row {number} of {labels}")


def _label_table(folder: Path, config: MimicConfig) -> Path | None:
    for labeller in [config.labeller] if config.labeller else LABELLERS:
        if path := find_table(folder, f"mimic-cxr-*-{labeller}"):
            return path
    if config.labeller:
        raise StudyError(f"{folder} has no mimic-cxr-…-{config.labeller}.csv; download it")
    return None


def _report_roots(folder: Path, config: MimicConfig) -> list[Path]:
    if config.reports is not None:
        if not config.reports.is_dir():
            raise StudyError(f"no folder of reports {config.reports}; give the one with p10/…")
        return [config.reports]
    places = (".", "mimic-cxr-reports", "reports")
    return [root for place in places if (root := folder / place / "files").is_dir()]


def subject_folder(subject: str) -> Path:
    """``p10/p10000032`` of subject 10000032."""
    return Path(f"p{subject[:2]}") / f"p{subject}"


def _patient(
    folder: Path, subject: str, groups: Groups, roots: list[Path], config: MimicConfig
) -> Iterator[Study | Skipped]:
    by_study: dict[str, list[Row]] = {}
    for row in groups.rows("films", subject):
        by_study.setdefault(row.values["study_id"], []).append(row)
    splits: dict[str, set[str]] = {}
    for row in groups.rows("split", subject):
        splits.setdefault(row.values["study_id"], set()).add(row.values["split"])
    exams = [
        _exam(folder, subject, study, rows, splits.get(study, set()), roots)
        for study, rows in sorted(by_study.items())
    ]
    usable = [exam for exam in exams if exam.frontal is not None and not exam.fault]
    for exam in sorted(exams, key=lambda exam: (str(exam.when), exam.id)):
        labels = groups.rows("labels", exam.id[1:])
        if exam.fault:
            yield Skipped(exam.id, exam.fault)
        elif len(labels) > 1:
            rows = ", ".join(str(row.number) for row in labels)
            yield Skipped(exam.id, f"two label rows: {rows} of the label table")
        else:
            yield _study(exam, latest_before(exam, usable), subject, labels, config)


def _exam(
    folder: Path, subject: str, study: str, rows: list[Row], splits: set[str], roots: list[Path]
) -> _Exam:
    place = folder / "files" / subject_folder(subject) / f"s{study}"
    films = [
        Film(
            path=place / f"{row.values['dicom_id']}.jpg",
            view=view_of(row.values.get("ViewPosition", ""), row.values.get(VIEW_MEANING, "")),
        )
        for row in rows
    ]
    there = tuple(film for film in films if is_film(film.path))
    wanted = [film for film in films if film.view in FRONTAL]
    fault, sections = "", ()
    if not wanted:
        views = ", ".join(film.view or "no view" for film in films)
        fault = f"no frontal film: its views are {views}"
    elif choose(there, FRONTAL) is None:
        fault = f"no image file: {wanted[0].path}"
    elif len(splits) > 1:
        fault = f"two splits: {', '.join(sorted(splits))}"
    elif splits - SPLITS.keys():
        fault = f"unknown split: {splits.pop()!r} is none of {list(SPLITS)}"
    else:
        sections, fault = _report(roots, subject_folder(subject) / f"s{study}.txt")
    values = rows[0].values
    when = moment(values.get("StudyDate", ""), values.get("StudyTime", ""), dropped_zeros=True)
    return _Exam(f"s{study}", when, there, next(iter(splits), ""), sections, fault)


def _report(roots: list[Path], name: Path) -> tuple[tuple[Section, ...], str]:
    """Sections of the report, and what is wrong with it."""
    paths = [path for root in roots if (path := root / name).is_file()]
    contents = {path.read_bytes() for path in paths}
    if len(contents) > 1:
        return (), f"two reports: {' and '.join(map(str, paths))} differ"
    for content in contents:
        try:
            return parse_report(content.decode("utf-8-sig")), ""
        except UnicodeDecodeError:
            return (), f"report is not UTF-8: {paths[0]}"
    return (), ""


def _study(
    exam: _Exam, prior: _Exam | None, subject: str, labels: list[Row], config: MimicConfig
) -> Study:
    text = {section.name: section.text for section in exam.sections}
    lateral, frontal = choose(exam.films, LATERAL), exam.frontal
    assert frontal is not None
    before = prior and prior.frontal
    old = {section.name: section.text for section in prior.sections} if prior else {}
    marked = labels[0].values if labels else {}
    return Study(
        id=exam.id,
        frontal=frontal.path,
        lateral=lateral.path if lateral else None,
        prior=before.path if before else None,
        prior_id=prior.id if prior else None,
        prior_report=" ".join(old[n] for n in config.prior_sections if n in old) or None,
        indication=text.get("indication") or text.get("history"),
        technique=text.get("technique"),
        comparison=text.get("comparison"),
        report=next((text[name] for name in config.report_sections if name in text), None),
        patient=f"p{subject}",
        labels=_marked(marked, 1),
        uncertain=_marked(marked, -1),
        images=exam.films,
        sections=exam.sections,
        taken=str(exam.when) or None,
        given_split=SPLITS.get(exam.split),  # pyright: ignore[reportArgumentType]
    )


def _marked(values: dict[str, str], mark: int) -> tuple[str, ...]:
    """Findings whose cell is that number, written as 1 or 1.0."""
    return tuple(f for f in FINDINGS if values.get(f) in (str(mark), f"{mark}.0"))
