"""Readers whose layout is a table beside images, XML, or DICOM files."""

import zipfile

import pytest

from hooks.files import StudyError
from hooks.readers import read_dicom_folder, read_images, read_iu_xray, read_openi_folder
from hooks.readers.tables import Groups, Row, find_table, read_rows
from hooks.studies import Skipped, Study


def parted(items):
    items = list(items)
    studies = {item.id: item for item in items if isinstance(item, Study)}
    gaps = [(s.study_id, s.reason.split(":")[0]) for s in items if isinstance(s, Skipped)]
    return studies, gaps


def test_iu_xray(write_layout):
    studies, gaps = parted(read_iu_xray(write_layout("iu-xray")))
    assert list(studies) == ["9", "10"]
    ten, nine = studies["10"], studies["9"]
    assert ten.frontal.name == "10_0.dcm.png" and ten.lateral.name == "10_1.dcm.png"
    assert [film.view for film in ten.images] == ["frontal", "lateral", "frontal"]
    assert ten.labels == ("Cardiomegaly", "Opacity")
    assert (ten.indication, ten.comparison, ten.report) == ("Cough, fever", "None.", "Clear.")
    assert nine.report is None and nine.section("impression") == "Normal." and nine.lateral is None
    assert gaps == [
        ("9", "two reports"),
        ("11", "no frontal film"),
        ("12", "no image file"),
        ("13", "films without a report"),
    ]


def test_iu_xray_needs_both_tables(write_layout):
    folder = write_layout("iu-xray")
    (folder / "indiana_projections.csv").unlink()
    with pytest.raises(StudyError, match=r"no indiana_projections\.csv; put both tables"):
        next(read_iu_xray(folder))


def test_openi_folder(write_layout):
    folder = write_layout("open-i")
    studies, gaps = parted(read_openi_folder(folder))
    assert list(studies) == ["2", "10"]
    two = studies["2"]
    assert two.frontal.name == "CXR2_IM-1.png" and two.lateral.name == "CXR2_IM-2.png"
    assert (two.report, two.indication, two.labels) == ("Big heart.", None, ("Cardiomegaly",))
    assert studies["10"].lateral is None
    assert gaps == [
        ("3", "report names no film"),
        ("4", "no image file"),
        ("5", "report is not XML"),
    ]
    turned = parted(read_openi_folder(folder, order=("lateral", "frontal")))[0]
    assert turned["2"].frontal.name == "CXR2_IM-2.png" and "10" not in turned


def test_dicom_folder(write_layout):
    studies, gaps = parted(read_dicom_folder(write_layout("dicom")))
    assert list(studies) == ["1.4", "1.1", "1.2"]
    one, two, alone = studies["1.1"], studies["1.2"], studies["1.4"]
    assert two.prior == one.frontal and two.prior_id == "1.1" and two.lateral.name == "2"
    assert (two.patient, two.taken, one.prior) == ("007", "2020-01-02", None)
    assert alone.patient is None and alone.prior is None  # nobody knows whose it is
    assert gaps == [("a/broken.dcm", "unreadable file"), ("1.3", "no frontal film")]


def test_images_with_a_table(write_layout):
    studies, gaps = parted(read_images(write_layout("images")))
    assert list(studies) == ["a", "b"]
    assert studies["a"].labels == ("X", "Y") and studies["a"].frontal.is_file()
    assert studies["b"].given_split == "validate"
    assert gaps == [
        ("c", "no image file"),
        ("a", "repeats a study id"),
        ("e", "no frontal film"),
        ("f", "record is wrong"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "a.png", "indicaton": "x"}, r"'indicaton' \(did you mean 'indication'\?\)"),
        ({"image": "a.png", "path": "a.png"}, "two columns for 'frontal'"),
        ({"picture": "a.png"}, "no single CSV table with a column 'frontal'"),
    ],
)
def test_columns_of_an_images_table(tmp_path, write_table, columns, message):
    write_table(tmp_path / "t.csv", [columns])
    with pytest.raises(StudyError, match=message):
        next(read_images(tmp_path))


def test_other_columns_are_not_read(tmp_path, write_table, write_film):
    write_film(tmp_path / "a.png")
    write_table(tmp_path / "t.csv", [{"Path": "a.png", "scanner_kVp": "120"}])
    (study,) = read_images(tmp_path)
    assert isinstance(study, Study) and study.id == "a.png"


def test_a_zipped_table(tmp_path, write_table):
    plain = write_table(tmp_path / "plain.csv", [{"a": "1", "b": "x"}], newline="\r\n", bom=True)
    with zipfile.ZipFile(tmp_path / "t.csv.zip", "w") as archive:
        archive.write(plain, "t.csv")
        archive.writestr("__MACOSX/._t.csv", "junk")
    path = find_table(tmp_path, "t")
    assert path is not None and [row.values for row in read_rows(path, ["a"])] == [{"a": "1"}]
    (tmp_path / "t.csv.zip").write_bytes(b"PK")
    with pytest.raises(StudyError, match="is damaged"):
        list(read_rows(path, ["a"]))


def test_tables_that_are_not_utf8_or_not_one(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a\ncaf\xe9\n")
    with pytest.raises(StudyError, match="is not UTF-8"):
        list(read_rows(tmp_path / "t.csv", ["a"]))
    (tmp_path / "tt.csv").touch()
    with pytest.raises(StudyError, match="several tables"):
        find_table(tmp_path, "t*")
    assert find_table(tmp_path, "x") is None


def test_groups_of_rows_in_any_order():
    groups = Groups()
    groups.add("a", (Row(i, {"k": k}) for i, k in enumerate(["10", "9", "10", "x"])), "k")
    groups.add("b", [Row(0, {"k": "9"})], "k")
    assert list(groups.keys("a")) == ["x", "9", "10"]
    assert [row.number for row in groups.rows("a", "10")] == [0, 2]
    assert list(groups.missing("a", "b")) == ["x", "10"] and list(groups.missing("b", "a")) == []
    groups.close()
