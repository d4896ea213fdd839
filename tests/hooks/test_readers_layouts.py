import json
import subprocess
import sys

import pytest

from hooks.files import StudyError
from hooks.readers import collect_studies, detect_layout, read_studies, survey
from hooks.studies import Skipped, Study, check_splits

COUNTS = {
    "mimic-cxr": (7, 3),
    "padchest-gr": (2, 5),
    "iu-xray": (2, 4),
    "open-i": (2, 3),
    "dicom": (3, 2),
    "images": (2, 4),
}


@pytest.mark.parametrize("layout", COUNTS)
def test_each_layout_is_told_by_its_files(write_layout, layout):
    folder = write_layout(layout)
    assert detect_layout(folder) == layout
    items = list(read_studies(folder))
    n_skipped = sum(isinstance(item, Skipped) for item in items)
    assert (len(items) - n_skipped, n_skipped) == COUNTS[layout]
    ids = [item.id for item in items if isinstance(item, Study)]
    assert len(set(ids)) == len(ids)
    found = survey(items)
    assert found.studies == COUNTS[layout][0] and found.leaks == []
    assert sum(gap.n for gap in found.gaps.values()) == COUNTS[layout][1]
    with pytest.raises(StudyError, match="strict=False"):
        list(read_studies(folder, strict=True))


@pytest.mark.parametrize("layout", COUNTS)
def test_readers_yield_before_they_have_read_all(write_layout, layout):
    assert isinstance(next(iter(read_studies(write_layout(layout)))), Study | Skipped)


def test_a_studies_file_comes_before_everything(write_layout):
    folder = write_layout("mimic-cxr")
    film = next(folder.rglob("*.jpg")).relative_to(folder)
    line = {"id": "mine", "frontal": str(film), "images": [{"path": str(film), "view": "PA"}]}
    (folder / "studies.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n")
    assert detect_layout(folder) == "studies.jsonl"
    (study,) = read_studies(folder)
    assert isinstance(study, Study) and study.images[0].path == folder / film == study.frontal
    assert len(list(read_studies(folder, layout="mimic-cxr"))) == 10


def test_folders_that_are_in_no_layout_or_in_two(write_layout, tmp_path):
    folder = write_layout("mimic-cxr")
    (folder / "grounded_reports_1.json").write_text("[]")
    with pytest.raises(StudyError, match="holds mimic-cxr and padchest-gr; put them into folders"):
        detect_layout(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"has no studies\.jsonl, nor another data set"):
        detect_layout(tmp_path / "empty")
    with pytest.raises(StudyError, match="no folder"):
        detect_layout(tmp_path / "nowhere")
    with pytest.raises(StudyError, match=r"unknown layout 'mimic' \(did you mean 'mimic-cxr'"):
        read_studies(folder, layout="mimic")


def test_collecting_refuses_leaks_and_nothing(write_layout, write_table, tmp_path):
    found = collect_studies(write_layout("images"))
    assert len(found) == 2 and len(found.skipped) == 4
    folder = tmp_path / "other"
    write_table(folder / "t.csv", [{"image": "gone.png"}])
    with pytest.raises(StudyError, match=r"no study that can be read; 1 were skipped, gone\.png"):
        collect_studies(folder)
    rows = [
        {"id": name, "image": "../images/films/a.png", "patient": "p", "split": split}
        for name, split in (("a", "train"), ("b", "test"))
    ]
    write_table(folder / "t.csv", rows)
    with pytest.raises(StudyError, match="1 leak between splits, the first: patient p is in"):
        collect_studies(folder)


def test_a_survey_counts(write_layout):
    folder = write_layout("padchest-gr")
    found = survey(read_studies(folder))
    assert (found.patients, found.films, found.sentences, found.boxes) == (2, 2, 2, 1)
    assert found.have["prior"] == 1 and found.have["lateral"] == 0
    assert found.labels == {"pleural effusion": 1}
    assert found.given_splits == {"train": 1, "validate": 1}
    assert found.gaps["no image file"].n == 1 and "1003" in found.gaps["no image file"].first


def test_unreadable_images_are_found_when_opened(write_layout):
    folder = write_layout("mimic-cxr")
    next(folder.rglob("50000009-PA.jpg")).write_bytes(b"no JPEG")
    assert "unreadable image" not in survey(read_studies(folder)).gaps
    gap = survey(read_studies(folder), open_films=True).gaps["unreadable image"]
    assert gap.n == 1 and gap.first.startswith("s50000009: unreadable image: ")


def test_a_prior_of_another_patient_is_a_leak():
    one, two = (
        Study(id="1", frontal="f", patient="a"),
        Study(id="2", frontal="f", patient="b", prior="f", prior_id="1"),
    )
    check_splits([one, Skipped("x", "y"), two.model_copy(update={"patient": "a"})])
    with pytest.raises(StudyError, match="study 2 of patient b has prior 1 of patient a"):
        check_splits([two, one])
    nameless = two.model_copy(update={"patient": None})
    with pytest.raises(StudyError, match="study 2 of patient 2 has prior 1"):
        check_splits([one, nameless])


def test_readers_import_neither_datasets_nor_pydicom_nor_pandas():
    code = "import sys, hooks.readers; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ("datasets", "pydicom", "pandas", "pyarrow", "transformers")
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout
