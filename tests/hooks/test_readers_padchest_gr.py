import json

import numpy as np
import pytest

from hooks.files import StudyError
from hooks.grounding import Box, parse_grounded
from hooks.images import read_image
from hooks.readers import read_padchest_gr
from hooks.readers.tables import stream_array
from hooks.studies import Skipped, Study


@pytest.fixture
def folder(write_layout):
    return write_layout("padchest-gr")


def read(folder, **options):
    items = list(read_padchest_gr(folder, **options))
    studies = {item.id: item for item in items if isinstance(item, Study)}
    return studies, [item for item in items if isinstance(item, Skipped)]


def test_sentences_with_the_boxes_of_both_readers(folder):
    study = read(folder)[0]["1001"]
    effusion, fracture = study.sentences
    assert effusion.boxes == (Box(0.5, 0.5, 0.75, 1.0),)  # 1.004 is cut to the film's edge
    assert effusion.extra_boxes == (Box(0.5, 0.4, 0.75, 1.0),)
    assert (effusion.labels, effusion.locations) == (("pleural effusion",), ("left",))
    assert (effusion.abnormal, effusion.progression) == (True, "stable")
    assert fracture.boxes is None and fracture.extra_boxes == () and fracture.abnormal is False
    assert study.grounded and study.labels == ("pleural effusion",)


def test_the_report_has_boxes_on_the_square_crop(folder):
    """The film is 80×40: the crop is its middle half, so x 0.5–0.75 becomes 0.5–1."""
    report = read(folder)[0]["1001"].report
    assert report == (
        "<obj>Left effusion.<box><x50><y50><x99><y99></box></obj><obj>No fracture.</obj>"
    )
    assert [phrase.text for phrase in parse_grounded(report)] == ["Left effusion.", "No fracture."]
    assert "Derrame izquierdo." in read(folder, language="es")[0]["1001"].report


def test_a_box_outside_the_crop_is_left_out_of_the_report_only(folder):
    path = folder / "grounded_reports_20240819.json"
    records = json.loads(path.read_text())
    records[0]["findings"][0]["boxes"] = [[0.0, 0.1, 0.2, 0.5]]
    path.write_text(json.dumps(records))
    study = read(folder)[0]["1001"]
    assert study.report.startswith("<obj>Left effusion.</obj>")
    assert study.sentences[0].boxes == (Box(0.0, 0.1, 0.2, 0.5),)


def test_patients_splits_and_priors(folder):
    studies, _ = read(folder)
    one, two = studies["1001"], studies["1002"]
    assert (one.patient, one.given_split, two.given_split) == ("P1", "train", "validate")
    assert one.prior.name == "old.png" and one.prior_id == "900"
    assert two.prior is None and two.report is None  # the named prior film is not there


def test_gaps_are_yielded(folder):
    found = [(s.study_id, s.reason.split(":")[0]) for s in read(folder)[1]]
    assert found == [
        ("1003", "no image file"),
        ("1004", "record is wrong"),
        ("1002", "two reports"),
        ("1005", "no patient"),
        ("1999", "labels without a study"),
    ]
    wrong = next(s.reason for s in read(folder)[1] if s.study_id == "1004")
    assert "in order within 0–1" in wrong and "grounded_reports_20240819.json 4" in wrong


@pytest.mark.parametrize("boxes", [[[0.1, 0.2, 1.5, 0.4]], [[1, 2]], [["a", 0, 1, 1]], 3])
def test_boxes_that_make_no_sense_skip_the_study(folder, boxes):
    path = folder / "grounded_reports_20240819.json"
    records = json.loads(path.read_text())
    records[0]["findings"][0]["boxes"] = boxes
    path.write_text(json.dumps(records))
    skipped = {s.study_id: s.reason for s in read(folder)[1]}
    assert skipped["1001"].startswith("record is wrong: ") and "element 1" in skipped["1001"]


def test_files_that_are_missing_or_cut_off(folder):
    path = folder / "grounded_reports_20240819.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 30])
    with pytest.raises(StudyError, match=r"element 5 is cut off or is not JSON"):
        read(folder)
    path.write_text('{"StudyID": 1}')
    with pytest.raises(StudyError, match=r"does not begin with '\['"):
        read(folder)
    path.write_text('[{"ImageID": 1}]')
    nameless = read(folder)[1][0]
    assert nameless.study_id == "element 1" and "record is wrong: no StudyID" in nameless.reason
    (folder / "master_table.csv").unlink()
    with pytest.raises(StudyError, match=r"no master_table\.csv, which says whose"):
        read(folder)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_an_array_is_streamed_in_pieces_of_any_size(tmp_path, chunk):
    values = [12345, {"a": ["]", "é"]}, [], "x", -1.5e3, True, None, {}]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent, ensure_ascii=False))
        assert list(stream_array(tmp_path / "a.json", chunk)) == values
    (tmp_path / "a.json").write_text(" [ ] ")
    assert list(stream_array(tmp_path / "a.json", chunk)) == []


def test_deep_films_keep_their_depth(folder):
    """Min–max over the whole 16 bits, as MAIRA-2 scales: no value is clipped at 255."""
    grey = np.asarray(read_image(read(folder)[0]["1001"].frontal)).ravel().astype(int)
    assert grey[0] == 0 and grey[-1] == 255
    assert np.abs(grey - np.linspace(0, 255, grey.size)).max() <= 1
