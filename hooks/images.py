"""Films: reading PNG, JPEG and DICOM to 8-bit grey, and turning them into pixel values."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hooks.files import StudyError

WINDOW_PERCENTILES = (0.5, 99.5)
"""Window of a DICOM film that carries none of its own."""

BROKEN = (
    *(UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, OverflowError, Image.DecompressionBombError),
)
"""What Pillow's decoders raise on damaged bytes: not all of them check before they read."""

DEEP_MODES = {"I", "I;16", "I;16L", "I;16B", "F"}
"""Pillow modes with more than 8 bits a pixel, which ``convert("L")`` would clip."""


def to_grey(image: Image.Image | np.ndarray) -> Image.Image:
    """Grey film with its darkest pixel at 0 and its brightest at 255.

    16-bit and float images keep their depth until they are scaled; a constant image is black.
    """
    if isinstance(image, Image.Image) and image.mode not in DEEP_MODES:
        grey = image if image.mode == "L" else image.convert("L")
        found: Any = grey.getextrema()  # a pair, for one plane
        if found[1] > found[0]:
            return Image.frombytes("L", grey.size, grey.tobytes().translate(_stretch(*found)))
        image = grey
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim != 2:
        raise StudyError(
            f"a film has shape {pixels.shape}; expected one grey plane [height, width]"
        )
    low, high = float(pixels.min()), float(pixels.max())
    scaled = np.zeros_like(pixels) if high <= low else (pixels - low) / (high - low) * 255
    return Image.fromarray(scaled.astype(np.uint8))


@lru_cache(maxsize=1024)
def _stretch(low: int, high: int) -> bytes:
    """What each of 256 levels becomes where ``low`` shall be 0 and ``high`` 255."""
    levels = (np.arange(256.0).clip(low, high) - low) / (high - low) * 255
    return levels.astype(np.uint8).tobytes()


def read_image(path: Path) -> Image.Image:
    """Read a film as 8-bit grey (mode ``L``), at its original size.

    PNGs of 16 bits (PadChest) are scaled from their darkest to their brightest pixel, as MAIRA-2's
    own preprocessing scales every film: cutting at percentiles first would show it a contrast it
    was not trained on. A burnt-in marker thus stays the brightest spot.

    DICOM files (by suffix ``.dcm`` or by their preamble) are inverted when MONOCHROME1 and
    windowed by their own VOI LUT, or else at :data:`WINDOW_PERCENTILES`.

    Raises
    ------
    StudyError
        If the file is missing or is not an image.
    """
    if not path.is_file():
        raise StudyError(f"no image file {path}; check the path in the study")
    if _is_dicom(path):
        return to_grey(_read_dicom(path))
    try:
        with Image.open(path) as image:
            return to_grey(image)
    except BROKEN as error:
        raise StudyError(
            f"{path} is not an image that can be read ({type(error).__name__}); "
            "give a PNG, JPEG or DICOM file"
        ) from None


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    with path.open("rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def _read_dicom(path: Path) -> np.ndarray:
    """Film ``[height, width]`` in float, white is dense, windowed."""
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array
    except (InvalidDicomError, AttributeError, ValueError, NotImplementedError) as error:
        raise StudyError(
            f"{path} is not a DICOM image that can be read ({error}); give a PNG, JPEG or DICOM"
        ) from None
    if stored.ndim != 2:
        raise StudyError(f"{path} holds {stored.shape} pixels; expected one grey frame")
    pixels: Any = np.asarray(apply_modality_lut(stored, dataset))
    if "WindowCenter" in dataset or "VOILUTSequence" in dataset:
        pixels = np.asarray(apply_voi_lut(pixels, dataset), dtype=np.float64)
    else:
        low, high = np.percentile(pixels, WINDOW_PERCENTILES)
        pixels = np.clip(pixels.astype(np.float64), low, high)
    photometric = dataset.PhotometricInterpretation
    if photometric == "MONOCHROME1":
        return pixels.max() - pixels
    if photometric == "MONOCHROME2":
        return pixels
    raise StudyError(f"{path} is {photometric}; a film is MONOCHROME1 or MONOCHROME2")


def pixel_plane(image: Image.Image, size: int, mean: float, std: float) -> np.ndarray:
    """Grey film as ``[size, size]``: short edge to ``size``, centre crop, 0–1, normalised."""
    width, height = image.size
    short = min(width, height)
    resized = (
        image
        if short == size
        else image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    grey = np.frombuffer(resized.tobytes(), dtype=np.uint8).reshape(resized.height, resized.width)
    return _levels(mean, std)[grey[top : top + size, left : left + size]]


@lru_cache(maxsize=16)
def _levels(mean: float, std: float) -> np.ndarray:
    """Pixel values of 256 levels; not to be written to."""
    return ((np.arange(256, dtype=np.float32) / 255 - mean) / std).astype(np.float32)


def pixel_values(
    image: Image.Image, size: int, mean: float, std: float
) -> Float[Tensor, "3 size size"]:
    """:func:`pixel_plane` three times over."""
    plane = torch.from_numpy(pixel_plane(image, size, mean, std))
    return plane.expand(3, size, size).contiguous()
