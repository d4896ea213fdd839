"""Which data set a folder holds, and its studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hooks.files import StudyError, nearest
from hooks.progress import track
from hooks.readers import dicom, images, iu_xray, mimic, openi, padchest_gr
from hooks.readers.ms_cxr import with_ms_cxr
from hooks.readers.ms_cxr_t import with_ms_cxr_t
from hooks.readers.tables import find_table
from hooks.studies import (
    STUDIES_FILE,
    Skipped,
    Study,
    iter_folder,
    refuse_skipped,
)
from hooks.study_list import StudyList

MS_CXR = "MS_CXR_Local_Alignment*"
MS_CXR_T = "MS_CXR_T_temporal_image_classification*"


class Layout(NamedTuple):
    """A way in which a folder holds studies."""

    found: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Study | Skipped]]
    sign: str
    """What the folder is known by."""


def _has_openi(folder: Path) -> bool:
    for pattern in ("*.xml", "*/*.xml"):
        for path in folder.glob(pattern):
            with path.open("rb") as handle:
                return b"<eCitation" in handle.read(400)
    return False


def _has_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _has_dicom(folder: Path) -> bool:
    return any(
        path.suffix.lower() in {".dcm", ".dicom"} or dicom.is_dicom(path)
        for path in folder.rglob("*")
        if path.is_file()
    )


def _read_dataset(folder: Path) -> Iterator[Study | Skipped]:
    """Films are inside a saved data set; they are written into ``films`` in its folder."""
    from datasets import load_from_disk

    from hooks.readers.hf import from_dataset

    return from_dataset(load_from_disk(str(folder)), folder / "films")  # pyright: ignore[reportArgumentType]


def _annotations(folder: Path) -> Path | None:
    """MS-CXR's table, or else its COCO file."""
    found = sorted(folder.glob(f"{MS_CXR}.json"))
    return find_table(folder, MS_CXR) or (found[-1] if found else None)


def _read_mimic(folder: Path) -> Iterator[Study | Skipped]:
    """MIMIC-CXR with the additions whose files lie beside its tables."""
    studies = mimic.read_mimic(folder)
    if changes := find_table(folder, MS_CXR_T):
        studies = with_ms_cxr_t(studies, changes)
    if phrases := _annotations(folder):
        studies = with_ms_cxr(studies, phrases)
    return studies


SPECIFIC = {
    "mimic-cxr": Layout(
        lambda folder: find_table(folder, mimic.METADATA) is not None,
        _read_mimic,
        f"{mimic.METADATA}.csv[.gz]",
    ),
    "padchest-gr": Layout(
        lambda folder: padchest_gr.reports_file(folder) is not None,
        padchest_gr.read_padchest_gr,
        padchest_gr.REPORTS,
    ),
    "iu-xray": Layout(
        lambda folder: find_table(folder, iu_xray.REPORTS) is not None,
        iu_xray.read_iu_xray,
        f"{iu_xray.REPORTS}.csv",
    ),
    "open-i": Layout(_has_openi, openi.read_openi_folder, "Open-i XML reports"),
    "dataset": Layout(_has_dataset, _read_dataset, "a saved datasets.Dataset"),
}
GENERAL = {
    "images": Layout(
        lambda folder: images.images_table(folder) is not None,
        images.read_images,
        "one CSV table with a column 'frontal'",
    ),
    "dicom": Layout(_has_dicom, dicom.read_dicom_folder, "DICOM files"),
}
OWN = "studies.jsonl"
LAYOUTS = {OWN: Layout(lambda folder: (folder / STUDIES_FILE).is_file(), iter_folder, OWN)}
LAYOUTS |= SPECIFIC | GENERAL


def detect_layout(folder: Path) -> str:
    """The key of :data:`LAYOUTS` that ``folder`` is in; a ``studies.jsonl`` comes before all.

    Raises
    ------
    StudyError
        If it is in none, or in two data sets' layouts at once.
    """
    if not folder.is_dir():
        raise StudyError(f"no folder {folder}; give one that holds studies")
    if LAYOUTS[OWN].found(folder):
        return OWN
    found = [name for name, layout in SPECIFIC.items() if layout.found(folder)]
    if len(found) > 1:
        raise StudyError(
            f"{folder} holds {' and '.join(found)}; put them into folders of their own"
        )
    for name, layout in GENERAL.items():
        if not found and layout.found(folder):
            found = [name]
    if not found:
        signs = ", ".join(layout.sign for layout in LAYOUTS.values() if layout.sign != OWN)
        raise StudyError(
            f"{folder} has no {STUDIES_FILE}, nor another data set that is known by {signs}; "
            'write one JSON object a line with at least "id" and "frontal"'
        )
    return found[0]


def read_studies(
    folder: Path, strict: bool = False, layout: str | None = None
) -> Iterator[Study | Skipped]:
    """Studies of a data set as it is downloaded, one after another.

    Parameters
    ----------
    strict
        Raise at the first study that cannot be built, instead of yielding why.
    layout
        A key of :data:`LAYOUTS`; default: what :func:`detect_layout` finds.

    Raises
    ------
    StudyError
        For a folder or table that cannot be read, and, when strict, for any gap.
    """
    if layout is not None and layout not in LAYOUTS:
        raise StudyError(
            f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}; choose from {list(LAYOUTS)}"
        )
    studies = LAYOUTS[layout or detect_layout(folder)].read(folder)
    return refuse_skipped(studies, folder) if strict else studies


def collect_studies(folder: Path, strict: bool = False, layout: str | None = None) -> StudyList:
    """All studies of a folder as a sequence that lies on disk, and those that were skipped.

    Raises
    ------
    StudyError
        As :func:`read_studies` and :class:`~hooks.study_list.StudyList`.
    """
    return StudyList(track(read_studies(folder, strict, layout), "studies"), folder)
