import json
import re

import pytest

from hooks.files import StudyError
from hooks.grounding import Box
from hooks.readers import read_mimic, read_studies, with_ms_cxr, with_ms_cxr_t
from hooks.studies import Change, Skipped, Study

CSV = "MS_CXR_Local_Alignment_v1.1.0.csv"
CSV_T = "MS_CXR_T_temporal_image_classification_v1.0.0.csv"


def phrase(film, text, box, label="Pneumonia", size=(60, 40)):
    names = ("x", "y", "w", "h", "image_width", "image_height")
    return {
        "category_name": label,
        "label_text": text,
        "path": f"files/{film}.jpg",
        **dict(zip(names, (*box, *size), strict=True)),
        "dicom_id": film,
        "split": "val",
    }


PHRASES = [
    phrase("50000003-AP", "left opacity", (30, 10, 15, 20)),
    phrase("50000003-AP", "left opacity", (0, 0, 6, 4)),
    phrase("50000003-AP", "right opacity", (50, 30, 10.5, 10)),
    phrase("50000001-LATERAL", "an opacity behind", (0, 0, 6, 4)),
    phrase("gone", "nobody's", (0, 0, 6, 4)),
]


@pytest.fixture
def folder(write_layout):
    return write_layout("mimic-cxr")


def coco(rows):
    """The same annotations as MS-CXR's JSON writes them."""
    films = list(dict.fromkeys(row["dicom_id"] for row in rows))
    return {
        "images": [
            {"id": i, "file_name": f"{film}.jpg", "width": 60, "height": 40}
            for i, film in enumerate(films)
        ],
        "categories": [{"id": 1, "name": "Pneumonia"}],
        "annotations": [
            {
                "id": i,
                "image_id": films.index(row["dicom_id"]),
                "category_id": 1,
                "bbox": [row["x"], row["y"], row["w"], row["h"]],
                "label_text": row["label_text"],
            }
            for i, row in enumerate(rows)
        ],
    }


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_phrases_with_boxes(folder, write_table, kind):
    path = write_table(folder / CSV, PHRASES, newline="\r\n", bom=True)
    if kind == "json":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(coco(PHRASES)))
    items = list(with_ms_cxr(read_mimic(folder), path))
    studies = {item.id: item for item in items if isinstance(item, Study)}
    study = studies["s50000003"]
    assert study.frontal.name == "50000003-AP.jpg"  # the boxes are on it, not on the PA
    left, right = study.sentences
    assert left.text == "left opacity" and left.labels == ("Pneumonia",)
    assert left.boxes == (Box(0.5, 0.25, 0.75, 0.75), Box(0, 0, 0.1, 0.1))
    assert right.boxes == (Box(50 / 60, 0.75, 1.0, 1.0),)  # half a pixel over the edge is cut
    assert not any(s.sentences for name, s in studies.items() if name != "s50000003")
    skipped = {item.study_id: item.reason for item in items if isinstance(item, Skipped)}
    assert skipped["50000001-LATERAL"].startswith("annotated film is not shown: study s50000001")
    assert skipped["gone"].startswith("annotations without a study")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (phrase("a", "x", (50, 0, 20, 4)), r"box .* is not on a film of 60×40 pixels"),
        (phrase("a", "x", (5, 0, 0, 4)), "record is wrong: box"),
        (phrase("a", "x", ("", 0, 1, 4)), "a number is none among"),
    ],
)
def test_boxes_off_the_film_are_left_out_with_a_reason(folder, write_table, row, message):
    path = write_table(folder / CSV, [PHRASES[0], row])
    items = list(with_ms_cxr(read_mimic(folder), path))
    assert sum(len(item.sentences) for item in items if isinstance(item, Study)) == 1
    (reason,) = [i.reason for i in items if isinstance(i, Skipped) and i.study_id == "a"]
    assert re.search(message, reason) and reason.endswith("row 2")
    path = path.with_suffix(".json")
    path.write_text(json.dumps(coco([PHRASES[0], row])))
    (reason,) = [
        i.reason
        for i in with_ms_cxr(read_mimic(folder), path)
        if isinstance(i, Skipped) and i.study_id == "a"
    ]
    assert re.search(message, reason) and reason.endswith("annotation 2")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "no 'images'")])
def test_a_json_that_is_no_annotation(folder, text, message):
    path = folder / "MS_CXR_Local_Alignment.json"
    path.write_text(text)
    with pytest.raises(StudyError, match=message):
        list(with_ms_cxr(read_mimic(folder), path))


def pair(study, film, previous, previous_film, **changes):
    return {
        "dicom_id": film,
        "subject_id": "10000032",
        "study_id": study,
        "previous_dicom_id": previous_film,
        "previous_study_id": previous,
        **{f"{f}_progression": changes.get(f, "") for f in ("edema", "pleural_effusion")},
    }


def test_changes_bring_their_own_pair_of_films(folder, write_table):
    rows = [
        pair("50000003", "50000003-AP", "50000002", "50000002-AP", edema="worsening"),
        pair("50000001", "50000001-PA", "50000002", "50000002-AP", pleural_effusion="stable"),
        pair("50000002", "50000002-AP", "50000009", "gone", edema="stable"),
        pair("59999999", "a", "b", "c", edema="stable"),
        pair("50000001", "50000001-PA", "50000002", "50000002-AP"),
    ]
    path = write_table(folder / CSV_T, rows)
    items = list(with_ms_cxr_t(read_mimic(folder), path))
    studies = {item.id: item for item in items if isinstance(item, Study)}
    third, first = studies["s50000003"], studies["s50000001"]
    assert third.changes == (Change(finding="edema", direction="worsening"),)
    assert third.frontal.name == "50000003-AP.jpg" and third.prior.name == "50000002-AP.jpg"
    assert third.prior_id == "s50000002" and third.prior_report is None  # it was of another study
    assert first.changes == (Change(finding="pleural_effusion", direction="stable"),)
    assert first.prior_report == "Clear lungs 2. Normal 2."
    skipped = [item for item in items if isinstance(item, Skipped)]
    kinds = {(item.study_id, item.reason.split(":")[0]) for item in skipped}
    assert ("s50000002", "no image file") in kinds
    assert ("s59999999", "changes without a study") in kinds
    assert ("s50000001", "two rows of changes") in kinds


def test_an_unknown_change_is_a_reason_to_skip(folder, write_table):
    rows = [pair("50000003", "50000003-AP", "50000002", "50000002-AP", edema="better")]
    items = list(with_ms_cxr_t(read_mimic(folder), write_table(folder / CSV_T, rows)))
    (bad,) = [i for i in items if isinstance(i, Skipped) and i.study_id == "s50000003"]
    assert "field 'direction': Input should be 'improving'" in bad.reason
    assert bad.reason.endswith("row 1")


def test_files_beside_the_tables_are_added(folder, write_table):
    write_table(folder / CSV, PHRASES)
    row = pair("50000003", "50000003-PA", "50000002", "50000002-AP", edema="improving")
    write_table(folder / CSV_T, [row])
    study = next(s for s in read_studies(folder) if isinstance(s, Study) and s.sentences)
    assert study.id == "s50000003" and study.changes and study.frontal.name == "50000003-AP.jpg"
