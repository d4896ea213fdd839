from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from hooks.files import StudyError
from hooks.images import pixel_values, read_image, to_grey


def test_grey_film_spans_the_whole_range():
    grey = np.asarray(to_grey(Image.fromarray(np.array([[50, 100], [75, 150]], np.uint8))))
    assert grey.tolist() == [[0, 127], [63, 255]]


def test_constant_image_is_black_and_finite():
    film = to_grey(Image.new("L", (30, 30), 77))
    assert np.asarray(film).max() == 0
    assert np.isfinite(pixel_values(film, 14, 0.5, 0.2).numpy()).all()


def test_sixteen_bits_keep_their_depth(tmp_path):
    """convert("L") alone would clip everything above 255 to white."""
    deep = np.linspace(1000, 65000, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = np.asarray(read_image(tmp_path / "deep.png")).ravel().astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1


def test_colour_becomes_grey():
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[0] = (255, 255, 255)
    assert to_grey(Image.fromarray(rgb)).mode == "L"


def test_not_an_image(tmp_path):
    (tmp_path / "film.png").write_text("this is text")
    with pytest.raises(StudyError, match=r"film\.png is not an image.*PNG, JPEG or DICOM"):
        read_image(tmp_path / "film.png")
    with pytest.raises(StudyError, match="no image file"):
        read_image(tmp_path / "absent.png")


def test_truncated_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "film.png")
    whole = (tmp_path / "film.png").read_bytes()
    (tmp_path / "film.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match="is not an image"):
        read_image(tmp_path / "film.png")


def write_dicom(path: Path, pixels: np.ndarray, photometric: str, **extra) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in extra.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


RAMP = np.tile(np.arange(0, 4000, 10), (10, 1))


def test_dicom_monochrome1_is_the_inverse_of_monochrome2(tmp_path):
    first = read_image(write_dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME1"))
    second = read_image(write_dicom(tmp_path / "b.dcm", RAMP, "MONOCHROME2"))
    a, b = np.asarray(first).astype(int), np.asarray(second).astype(int)
    assert b[0, 0] == 0 and b[0, -1] == 255 and a[0, 0] == 255 and a[0, -1] == 0
    assert np.abs(a + b - 255).max() <= 1


def test_dicom_window_of_the_file_wins(tmp_path):
    film = read_image(
        write_dicom(tmp_path / "w.dcm", RAMP, "MONOCHROME2", WindowCenter=1000, WindowWidth=200)
    )
    row = np.asarray(film)[0]
    assert (row[RAMP[0] < 890] == 0).all() and (row[RAMP[0] > 1110] == 255).all()


def test_dicom_without_window_is_cut_at_percentiles(tmp_path):
    pixels = RAMP.copy()
    pixels[0, 0] = 4095
    spiked = np.asarray(read_image(write_dicom(tmp_path / "s.dcm", pixels, "MONOCHROME2")))
    plain = np.asarray(read_image(write_dicom(tmp_path / "p.dcm", RAMP, "MONOCHROME2")))
    assert np.abs(spiked[5].astype(int) - plain[5]).max() <= 3


def test_dicom_without_suffix_is_recognised(tmp_path):
    path = write_dicom(tmp_path / "noname", RAMP, "MONOCHROME2")
    assert read_image(path).size == (400, 10)


def test_dicom_that_is_no_film(tmp_path):
    (tmp_path / "x.dcm").write_text("no")
    with pytest.raises(StudyError, match="is not a DICOM image"):
        read_image(tmp_path / "x.dcm")


def test_the_real_film():
    """PA chest, 1955×1841, MONOCHROME1: lungs must come out darker than the mediastinum."""
    from maira_sae.real_model import film

    image = np.asarray(read_image(film())).astype(float)
    assert image.shape == (1955, 1841)
    middle = image[800:1100]
    lungs = np.minimum(middle[:, 350:500].mean(), middle[:, 1350:1500].mean())
    assert lungs < middle[:, 880:980].mean() - 30
