import gzip
import shutil
import tracemalloc

import pytest

from hooks.files import ConfigError, StudyError
from hooks.readers import MimicConfig, read_mimic, read_studies
from hooks.studies import Skipped, Study, check_splits


@pytest.fixture
def folder(write_layout):
    return write_layout("mimic-cxr")


def read(folder, **config):
    items = list(read_mimic(folder, MimicConfig(**config)))
    studies = {item.id: item for item in items if isinstance(item, Study)}
    return studies, {item.study_id: item.reason for item in items if isinstance(item, Skipped)}


def test_films_sections_and_labels(folder):
    study = read(folder)[0]["s50000001"]
    assert study.frontal.name == "50000001-PA.jpg" and study.lateral.name == "50000001-LATERAL.jpg"
    assert [film.view for film in study.images] == ["PA", "LATERAL"]
    assert (study.report, study.indication) == ("Clear lungs 1.", "Cough 1.")
    assert (study.technique, study.comparison) == ("Two views.", "None.")
    assert study.section("impression") == "Normal 1." and study.section("addendum") is None
    assert (study.labels, study.uncertain) == (("Edema",), ("Pleural Effusion",))
    assert (study.patient, study.given_split) == ("p10000032", "train")
    assert study.taken == "2180-05-06T21:30:14"


def test_pa_comes_before_ap_and_view_codes_fill_in(folder):
    studies, _ = read(folder)
    assert studies["s50000003"].frontal.name == "50000003-PA.jpg"
    assert studies["s50000005"].frontal.name == "50000005-postero-anterior.jpg"
    assert studies["s50000005"].lateral.name == "50000005-lateral.jpg"
    assert studies["s50000002"].lateral is None


def test_priors_by_date_and_time(folder):
    studies, _ = read(folder)
    priors = {name: study.prior_id for name, study in studies.items()}
    assert priors == {
        "s50000001": "s50000002",  # the same day, but 08:30 written as 83045.0
        "s50000002": None,
        "s50000003": "s50000001",
        "s50000004": None,  # without a date: nobody's prior, and has none
        "s50000005": None,
        "s50000006": None,  # the same day as one without a time
        "s50000009": None,
    }
    later = studies["s50000003"]
    assert later.prior == studies["s50000001"].frontal
    assert later.prior_report == "Clear lungs 1. Normal 1."
    assert read(folder, prior_sections=("impression",))[0]["s50000003"].prior_report == "Normal 1."


def test_a_prior_needs_its_film(folder):
    next(folder.rglob("50000001-PA.jpg")).unlink()
    studies, skipped = read(folder)
    assert studies["s50000003"].prior_id == "s50000002"
    assert skipped["s50000001"].startswith("no image file: ")


def test_gaps_are_yielded(folder):
    studies, skipped = read(folder)
    assert skipped["s50000007"] == "no frontal film: its views are LATERAL"
    assert skipped["s50000008"].endswith("50000008-PA.jpg")
    assert skipped["s59999999"].startswith("labels without a study: row 3 of ")
    assert set(skipped) == {"s50000007", "s50000008", "s59999999"}
    assert studies["s50000009"].report is None and studies["s50000009"].sections == ()


def test_strict_raises_at_the_first_gap(folder):
    with pytest.raises(StudyError, match=r"s50000007: no frontal film.*strict=False"):
        list(read_studies(folder, strict=True))


def test_an_empty_file_is_no_film(folder):
    next(folder.rglob("50000002-AP.jpg")).write_bytes(b"")
    assert read(folder)[1]["s50000002"].startswith("no image file: ")


def test_reports_may_lie_apart(folder, tmp_path):
    for path in folder.rglob("s*.txt"):
        moved = tmp_path / "reports" / path.relative_to(folder / "files")
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    assert read(folder)[0]["s50000001"].report is None
    assert read(folder, reports=tmp_path / "reports")[0]["s50000001"].report == "Clear lungs 1."
    shutil.copytree(tmp_path / "reports", folder / "mimic-cxr-reports" / "files")
    assert read(folder)[0]["s50000001"].report == "Clear lungs 1."
    with pytest.raises(StudyError, match="no folder of reports"):
        read(folder, reports=tmp_path / "nowhere")


def test_two_different_reports_of_a_study(folder):
    name = "p10/p10000032/s50000001.txt"
    other = folder / "reports" / "files" / name
    other.parent.mkdir(parents=True)
    shutil.copy(folder / "files" / name, other)
    assert "s50000001" in read(folder)[0]  # a copy is no second report
    other.write_text("FINDINGS: Else.")
    studies, skipped = read(folder)
    assert skipped["s50000001"].startswith("two reports: ")
    assert studies["s50000003"].prior_id == "s50000002"


def test_a_report_in_another_encoding(folder):
    next(folder.rglob("s50000002.txt")).write_bytes(b"FINDINGS: caf\xe9")
    assert read(folder)[1]["s50000002"].startswith("report is not UTF-8: ")


def test_history_stands_in_for_the_indication(folder):
    next(folder.rglob("s50000002.txt")).write_bytes(
        b"\xef\xbb\xbfHISTORY: Fall.\r\nFINDINGS: A.\r\n"
    )
    study = read(folder)[0]["s50000002"]
    assert (study.indication, study.report) == ("Fall.", "A.")


def test_a_report_without_headings(folder):
    next(folder.rglob("s50000002.txt")).write_text("COMPARISON: None.\n \n Heart is big.\n")
    study = read(folder)[0]["s50000002"]
    assert study.report is None and study.comparison == "None."
    sections = ("findings", "body")
    assert read(folder, report_sections=sections)[0]["s50000002"].report == "Heart is big."


def test_labels_of_negbio(folder, write_table):
    row = {"subject_id": "10000032", "study_id": "50000002", "Fracture": "1.0"}
    write_table(folder / "mimic-cxr-2.0.0-negbio.csv.gz", [row])
    assert read(folder)[0]["s50000002"].labels == ()
    assert read(folder, labeller="negbio")[0]["s50000002"].labels == ("Fracture",)
    (folder / "mimic-cxr-2.0.0-chexpert.csv").unlink()
    assert read(folder)[0]["s50000002"].labels == ("Fracture",)
    with pytest.raises(StudyError, match=r"no mimic-cxr-…-chexpert\.csv"):
        read(folder, labeller="chexpert")
    with pytest.raises(ConfigError, match="labeller is 'chex'"):
        MimicConfig(labeller="chex")  # pyright: ignore[reportArgumentType]


def test_a_leak_in_the_split_table(folder):
    path = folder / "mimic-cxr-2.0.0-split.csv.gz"
    check_splits(read_mimic(folder))
    content = gzip.decompress(path.read_bytes()).decode()
    lines = [
        line.replace("train", "test") if "50000003" in line else line
        for line in content.splitlines()
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(StudyError, match=r"patient p10000032 is in 'train' and, with study s500"):
        check_splits(read_mimic(folder))


def test_damaged_tables_name_file_and_row(folder):
    path = folder / "mimic-cxr-2.0.0-metadata.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match=r"metadata\.csv\.gz is damaged .*download it again"):
        read(folder)
    path.write_bytes(gzip.compress(b"dicom_id,subject_id,study\na,1,2\n"))
    with pytest.raises(StudyError, match=r"no column 'study_id' \(did you mean 'study'\?\)"):
        read(folder)
    path.write_bytes(gzip.compress(b'dicom_id,subject_id,study_id\na,1,"2\nb,1,3\n'))
    with pytest.raises(StudyError, match=r"metadata\.csv\.gz line 3 is not CSV \(unexpected end"):
        read(folder)
    path.unlink()
    with pytest.raises(StudyError, match="download it into there"):
        read(folder)


def test_malformed_rows_are_yielded_and_the_others_read(folder):
    before, _ = read(folder)
    path = folder / "mimic-cxr-2.0.0-metadata.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[3:3] = ["cut,off", '"stray" quote,1,2,,,,,']
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    studies, skipped = read(folder)
    assert studies == before
    assert "malformed row: row 3 has 2 fields, the header 8" in skipped[f"{path.name} row 3"]
    assert "malformed row: row 4 has a stray quote" in skipped[f"{path.name} row 4"]
    split = folder / "mimic-cxr-2.0.0-split.csv.gz"
    lines = gzip.decompress(split.read_bytes()).decode().splitlines()
    split.write_bytes(gzip.compress("\n".join([*lines, "a"]).encode()))
    assert f"{split.name} row {len(lines)}" in read(folder)[1]
    with pytest.raises(StudyError, match=r"row 3: malformed row.*--strict"):
        list(read_studies(folder, strict=True))


def write_many(folder, n_patients, write_table):
    """Four films of two studies a patient, in an order that parts each patient's rows."""
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
    rows = []
    for film in range(4):
        for patient in range(n_patients):
            study = 50_000_000 + 2 * patient + film % 2
            view = ("PA", "AP", "LATERAL", "LATERAL")[film]
            values = (f"{study}-{film}", 10_000_000 + patient, study, view, "21800101", film * 1e4)
            rows.append(dict(zip(columns, values, strict=True)))
    write_table(folder / "mimic-cxr-2.0.0-metadata.csv.gz", rows)
    labels = [{"study_id": row["study_id"], "Edema": "1.0"} for row in rows[: 2 * n_patients]]
    write_table(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    for row in rows:
        place = folder / "files" / "p10" / f"p{row['subject_id']}" / f"s{row['study_id']}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row['dicom_id']}.jpg").write_bytes(b"x")
    return folder


def test_memory_does_not_grow_with_the_data_set(tmp_path, write_table):
    """20,000 films of 5,000 patients; as a list, their studies take 39 MB."""
    few = write_many(tmp_path / "few", 5, write_table)
    many = write_many(tmp_path / "many", 5000, write_table)
    assert sum(isinstance(study, Study) for study in read_mimic(few)) == 10  # imports are done
    tracemalloc.start()
    try:
        n = sum(1 for study in read_mimic(many) if isinstance(study, Study) and study.labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 10_000
    assert peak < 2e6, f"{peak / 1e6:.1f} MB for 20,000 rows"
