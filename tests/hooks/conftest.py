"""Small synthetic copies of the data sets' real layouts, gaps included."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid


def film(path: Path, size=(60, 40), bits=8) -> Path:
    """A grey ramp of that width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    ramp = np.linspace(0, 2**bits - 1, width * height).reshape(height, width)
    Image.fromarray(ramp.astype(np.uint8 if bits == 8 else np.uint16)).save(path)
    return path


def table(path: Path, rows, newline="\n", bom=False) -> Path:
    """A CSV of dicts, gzipped if the name says so."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def dicom(path: Path, **tags) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 8, 10, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.arange(80, dtype=np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


REPORT = (
    "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
    " INDICATION:  Cough {n}.\n \n TECHNIQUE:  Two views.\n \n COMPARISON:  None.\n \n"
    " FINDINGS: \n \n Clear lungs {n}.\n \n IMPRESSION: \n \n Normal {n}.\n"
)

# study → patient, date, time, films (view or, after a slash, the meaning of its code)
EXAMS = {
    "50000001": ("10000032", "21800506", "213014.531", ["PA", "LATERAL"]),
    "50000002": ("10000032", "21800506", "83045.0", ["AP"]),  # the same day, in the morning
    "50000003": ("10000032", "21800626", "165500.312", ["AP", "PA"]),
    "50000004": ("10000032", "", "", ["PA"]),  # no date
    "50000005": ("10000764", "21331002", "", ["/postero-anterior", "/lateral"]),
    "50000006": ("10000764", "21331002", "121314.0", ["AP"]),  # the same day, one without time
    "50000007": ("10000764", "21340101", "121314.0", ["LATERAL"]),  # no frontal film
    "50000008": ("10000898", "21340101", "121314.0", ["PA"]),  # its film is missing
    "50000009": ("10000935", "21340101", "121314.0", ["PA"]),  # no report
}


def write_mimic(folder: Path) -> Path:
    metadata, split, chexpert = [], [], []
    for study, (subject, day, clock, views) in EXAMS.items():
        for view in views:
            position, _, meaning = view.partition("/")
            dicom_id = f"{study}-{position or meaning}"
            metadata.append(
                {
                    "dicom_id": dicom_id,
                    "subject_id": subject,
                    "study_id": study,
                    "PerformedProcedureStepDescription": "CHEST (PA AND LAT)",
                    "ViewPosition": position,
                    "StudyDate": day,
                    "StudyTime": clock,
                    "ViewCodeSequence_CodeMeaning": meaning,
                }
            )
            split.append(
                {
                    "dicom_id": dicom_id,
                    "study_id": study,
                    "subject_id": subject,
                    "split": "test" if subject == "10000764" else "train",
                }
            )
            place = folder / "files" / "p10" / f"p{subject}" / f"s{study}"
            if study != "50000008":
                film(place / f"{dicom_id}.jpg")
        if study != "50000009":
            report = folder / "files" / "p10" / f"p{subject}" / f"s{study}.txt"
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(REPORT.format(n=study[-1]))
    for study, edema, effusion in (
        ("50000001", "1.0", "-1.0"),
        ("50000002", "0.0", ""),
        ("59999999", "1.0", ""),  # of no study
    ):
        row = {"subject_id": "10000032", "study_id": study}
        chexpert.append({**row, "Edema": edema, "Pleural Effusion": effusion})
    table(folder / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    table(folder / "mimic-cxr-2.0.0-split.csv.gz", split)
    table(folder / "mimic-cxr-2.0.0-chexpert.csv", chexpert, newline="\r\n", bom=True)
    return folder


GROUNDED = [
    {
        "StudyID": "1001",
        "ImageID": "a.png",
        "PreviousStudyID": "900",
        "PreviousImageID": "old.png",
        "findings": [
            {
                "sentence_en": "Left effusion.",
                "sentence_es": "Derrame izquierdo.",
                "abnormal": True,
                "boxes": [[0.5, 0.5, 0.75, 1.004]],
                "extra_boxes": [[0.5, 0.4, 0.75, 1.0]],
                "labels": ["pleural effusion"],
                "locations": ["left"],
                "progression": "stable",
            },
            {"sentence_en": "No fracture.", "sentence_es": "Sin fractura.", "abnormal": False},
        ],
    },
    {"StudyID": "1002", "ImageID": "b.png", "PreviousImageID": "gone.png", "findings": []},
    {"StudyID": "1003", "ImageID": "missing.png", "findings": []},
    {
        "StudyID": "1004",
        "ImageID": "b.png",
        "findings": [{"sentence_en": "X.", "boxes": [[0.9, 0.1, 0.2, 0.3]]}],
    },
    {"StudyID": "1002", "ImageID": "b.png", "findings": []},
    {"StudyID": "1005", "ImageID": "b.png", "findings": []},
]


def write_padchest_gr(folder: Path) -> Path:
    film(folder / "Padchest_GR_files" / "PadChest_GR" / "a.png", (80, 40), 16)
    film(folder / "Padchest_GR_files" / "PadChest_GR" / "b.png", (40, 80), 16)
    film(folder / "PadChest_GR_progression_prior_studies" / "old.png", bits=16)
    (folder / "grounded_reports_20240819.json").write_text(json.dumps(GROUNDED, indent=1))
    master = [
        {"StudyID": study, "PatientID": patient, "split": split, "label_group": group}
        for study, patient, split, group in (
            ("1001", "P1", "train", "effusion"),
            ("1001", "P1", "train", "normal"),
            ("1002", "P2", "validation", ""),
            ("1004", "P3", "test", ""),
            ("1999", "P4", "test", ""),
        )
    ]
    table(folder / "master_table.csv", master, newline="\r\n")
    return folder


def write_iu_xray(folder: Path) -> Path:
    empty = {"MeSH": "normal", "Problems": "normal", "image": "Xray Chest PA and Lateral"}
    reports = [
        {"uid": uid, **empty, "indication": indication, "comparison": "None.", **rest}
        for uid, indication, rest in (
            ("10", "Cough,\nfever", {"findings": "Clear.", "impression": "Normal."}),
            ("9", "", {"findings": "", "impression": "Normal."}),
            ("9", "", {"findings": "Again.", "impression": ""}),
            ("11", "", {"findings": "Lateral only.", "impression": ""}),
            ("12", "", {"findings": "Film gone.", "impression": ""}),
        )
    ]
    reports[0]["MeSH"] = "Cardiomegaly/mild;Opacity/lung/left;Opacity/base"
    table(folder / "indiana_reports.csv", reports, newline="\r\n", bom=True)
    names = ("10", "Frontal"), ("10", "Lateral"), ("10", "Frontal"), ("9", "Frontal")
    names += ("11", "Lateral"), ("12", "Frontal"), ("13", "Frontal")
    projections = [
        {"uid": uid, "filename": f"{uid}_{i}.dcm.png", "projection": view}
        for i, (uid, view) in enumerate(names)
    ]
    table(folder / "indiana_projections.csv", projections)
    for row in projections:
        if row["uid"] != "12":
            film(folder / "images" / "images_normalized" / row["filename"])
    return folder


XML = """<?xml version="1.0" encoding="utf-8"?><eCitation><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>
<AbstractText Label="FINDINGS">Big heart.</AbstractText></Abstract></Article></MedlineCitation>
<MeSH><major>Cardiomegaly/mild</major></MeSH>{films}</eCitation>"""


def write_openi(folder: Path) -> Path:
    (folder / "ecgen-radiology").mkdir(parents=True)
    for number, names in (
        (2, ["CXR2_IM-1", "CXR2_IM-2"]),
        (10, ["CXR10_IM-1"]),
        (3, []),
        (4, ["CXR4_gone"]),
    ):
        for name in names:
            if "gone" not in name:
                film(folder / "NLMCXR_png" / f"{name}.png")
        films = "".join(f'<parentImage id="{name}"/>' for name in names)
        (folder / "ecgen-radiology" / f"{number}.xml").write_text(XML.format(films=films))
    (folder / "ecgen-radiology" / "5.xml").write_text("<eCitation")
    return folder


def write_dicom(folder: Path) -> Path:
    common = {"Modality": "DX", "PatientID": "007"}
    for name, tags in {
        "b/1.dcm": {"StudyInstanceUID": "1.2", "StudyDate": "20200102", "ViewPosition": "PA"},
        "b/2": {"StudyInstanceUID": "1.2", "StudyDate": "20200102", "ViewPosition": "LL"},
        "a/1.dcm": {"StudyInstanceUID": "1.1", "StudyDate": "20190102", "ViewPosition": "AP"},
        "c/1.dcm": {"StudyInstanceUID": "1.3", "StudyDate": "20210102"},
        "d/1.dcm": {"StudyInstanceUID": "1.4", "StudyDate": "20210102", "ViewPosition": "PA"},
        "e/ct.dcm": {"StudyInstanceUID": "1.5", "Modality": "CT"},
    }.items():
        dicom(folder / name, **{**common, **tags, **({"PatientID": ""} if "d/" in name else {})})
    (folder / "a" / "broken.dcm").write_bytes(b"not DICOM")
    (folder / "readme.txt").write_text("DICOM export")
    return folder


def write_images(folder: Path) -> Path:
    film(folder / "films" / "a.png")
    film(folder / "films" / "b.png")
    rows = [
        {"id": "a", "image": "films/a.png", "patient": "p1", "split": "train", "labels": "X; Y"},
        {"id": "b", "image": "films/b.png", "patient": "p2", "split": "val", "labels": ""},
        {"id": "c", "image": "films/gone.png", "patient": "p3", "split": "", "labels": ""},
        {"id": "a", "image": "films/a.png", "patient": "p1", "split": "train", "labels": ""},
        {"id": "e", "image": "", "patient": "", "split": "", "labels": ""},
        {"id": "f", "image": "films/b.png", "patient": "p2", "split": "mine", "labels": ""},
    ]
    table(folder / "table.csv", rows, newline="\r\n", bom=True)
    return folder


WRITERS = {
    "mimic-cxr": write_mimic,
    "padchest-gr": write_padchest_gr,
    "iu-xray": write_iu_xray,
    "open-i": write_openi,
    "dicom": write_dicom,
    "images": write_images,
}


@pytest.fixture
def write_layout(tmp_path):
    """A function from a layout's name to a folder in that layout."""
    return lambda name: WRITERS[name](tmp_path / name)


@pytest.fixture
def write_film():
    return film


@pytest.fixture
def write_table():
    return table
