import io
import json
import tarfile

import pytest

from hooks.files import StudyError
from hooks.readers import read_openi
from hooks.studies import Skipped, Study, iter_folder, iter_labels, read_folder, split_of


def write(folder, *lines):
    (folder / "studies.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_folder_paths_are_relative_to_it(tmp_path):
    write(tmp_path, '{"id": "a", "frontal": "f.png", "labels": ["X"]}', "")
    (study,) = read_folder(tmp_path)
    assert study.frontal == tmp_path / "f.png"
    assert study.films() == (tmp_path / "f.png",)
    assert study.labels == ("X",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["{"], "line 1 is not JSON"),
        (['{"id": "a"}'], "line 1, field 'frontal': Field required"),
        (
            ['{"id": "a", "frontal": "f", "indicaton": "x"}'],
            "did you mean 'indication'",
        ),
        (['{"id": "a", "frontal": "f"}'] * 2, "line 2 repeats study id 'a'"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(StudyError, match=message):
        read_folder(write(tmp_path, *lines))


def test_bad_lines_are_left_out_with_their_reason(tmp_path):
    good = '{"id": "a", "frontal": "f"}'
    write(tmp_path, good, "{", good, '{"id": "b"}')
    with (tmp_path / "studies.jsonl").open("ab") as file:
        file.write(b'{"id": "caf\xe9"}\n')
    study, *skipped = iter_folder(tmp_path)
    assert isinstance(study, Study) and study.id == "a"
    found = {one.study_id: one.reason for one in skipped if isinstance(one, Skipped)}
    assert list(found) == ["line 2", "line 3", "line 4", "line 5"]
    words = ("is not JSON", "repeats study id 'a'", "field 'frontal'", "is not UTF-8")
    for reason, word in zip(found.values(), words, strict=True):
        assert reason.startswith("malformed line: ") and word in reason


def test_folder_without_studies_says_what_to_write(tmp_path):
    with pytest.raises(StudyError, match=r"has no studies\.jsonl; write one JSON object a line"):
        read_folder(tmp_path)


def test_split_is_stable_and_by_patient():
    sides = {str(i): split_of(str(i)) for i in range(4000)}
    assert sides["0"] == split_of("0") == "train"  # a changed hash would change published splits
    share = sum(side == "heldout" for side in sides.values()) / 4000
    assert 0.17 < share < 0.23
    a, b = (Study(id=i, frontal="f", patient="same") for i in ("1", "2"))
    assert a.split() == b.split()


XML = """<eCitation><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">{comparison}</AbstractText>
<AbstractText Label="INDICATION">Cough</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">Fine.</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>Cardiomegaly/mild</major><major>Opacity/lung/left</major><major>Opacity/base</major>
</MeSH></eCitation>"""


def test_openi_archive(tmp_path):
    archive = tmp_path / "reports.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, findings in (("10", "Big\n heart."), ("9", "Clear."), ("11", "")):
            document = XML.format(findings=findings, comparison="").encode()
            info = tarfile.TarInfo(f"ecgen-radiology/{name}.xml")
            info.size = len(document)
            tar.addfile(info, io.BytesIO(document))
    studies = read_openi(archive, tmp_path / "film.dcm")
    assert [study.id for study in studies] == ["9", "10"]
    assert studies[1].report == "Big heart." and studies[1].comparison is None
    assert studies[1].labels == ("Cardiomegaly", "Opacity")
    assert list(iter_labels(studies)) == [("Cardiomegaly", 2), ("Opacity", 2)]


def test_the_real_openi_reports():
    from maira_sae.real_model import film, openi_archive

    studies = read_openi(openi_archive(), film())
    assert len(studies) == 3425
    counts = dict(iter_labels(studies))
    assert counts["Cardiomegaly"] == 311 and counts["Pleural Effusion"] == 127


def test_study_round_trips_through_json():
    study = Study(id="a", frontal="f.png", report="Clear.", labels=("X",))
    assert Study.model_validate(json.loads(study.model_dump_json())) == study
