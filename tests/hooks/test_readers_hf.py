import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from hooks.files import StudyError
from hooks.images import read_image
from hooks.readers import from_dataset, read_studies, to_dataset
from hooks.studies import Skipped, Study


def known(folder):
    return [s for s in read_studies(folder) if isinstance(s, Study)]


@pytest.mark.parametrize("layout", ["mimic-cxr", "padchest-gr", "images"])
def test_studies_come_back_as_they_were(write_layout, tmp_path, layout):
    folder = write_layout(layout)
    dataset = to_dataset(read_studies(folder), cache_dir=tmp_path / "cache")
    studies = known(folder)
    assert len(dataset) == len(studies) > 1
    assert isinstance(dataset[0]["frontal"], Pillow.Image)
    assert list(from_dataset(dataset)) == studies


def test_bytes_go_with_the_data_set(write_layout, tmp_path):
    folder = write_layout("padchest-gr")
    studies = known(folder)
    dataset = to_dataset(iter(studies), embed=True, cache_dir=tmp_path / "cache")
    with pytest.raises(StudyError, match="give a folder to write films into"):
        next(from_dataset(dataset))
    back = list(from_dataset(dataset, tmp_path / "films"))
    assert len(list((tmp_path / "films").iterdir())) == 3
    for one, other in zip(studies, back, strict=True):
        assert isinstance(other, Study) and other.report == one.report
        assert other.frontal.read_bytes() == one.frontal.read_bytes()  # 16 bits and all


def test_dicom_becomes_png(write_layout, tmp_path):
    studies = known(write_layout("dicom"))
    back = list(from_dataset(to_dataset(studies, cache_dir=tmp_path / "cache"), tmp_path / "films"))
    for one, other in zip(studies, back, strict=True):
        assert isinstance(other, Study) and other.frontal.suffix == ".png"
        assert read_image(other.frontal).tobytes() == read_image(one.frontal).tobytes()


def test_a_data_set_of_others(tmp_path, write_film):
    film = str(write_film(tmp_path / "a.png"))
    columns = {"image": [film, None, str(tmp_path / "gone.png")], "findings": ["A.", "B.", "C."]}
    dataset = Dataset.from_dict(columns | {"extra": [1, 2, 3]}).cast(
        Features({"image": Image(), "findings": Value("string"), "extra": Value("int64")})
    )
    names = {"frontal": "image", "report": "findings"}
    first, *others = from_dataset(dataset, columns=names)
    assert isinstance(first, Study) and (first.id, first.report) == ("row0", "A.")
    assert [s.reason.split(":")[0] for s in others if isinstance(s, Skipped)] == [
        "no frontal film",
        "no image file",
    ]
    for wrong, message in (
        ({}, r"no column 'frontal'; name it with columns="),
        ({"frontal": "imge"}, r"no column 'imge' \(did you mean 'image'"),
        ({"frntal": "image"}, r"no field 'frntal' \(did you mean 'frontal'"),
    ):
        with pytest.raises(StudyError, match=message):
            next(from_dataset(dataset, columns=wrong))


def test_a_streamed_and_a_saved_data_set(write_layout, tmp_path):
    folder = write_layout("images")
    dataset = to_dataset(read_studies(folder), cache_dir=tmp_path / "cache")
    assert list(from_dataset(dataset.to_iterable_dataset())) == known(folder)
    dataset.save_to_disk(tmp_path / "saved")
    for _ in range(2):
        back = known(tmp_path / "saved")
        assert [s.id for s in back] == [s.id for s in known(folder)]
        assert back[0].frontal.read_bytes() == known(folder)[0].frontal.read_bytes()
        assert back[0].frontal.parent == tmp_path / "saved" / "films"
