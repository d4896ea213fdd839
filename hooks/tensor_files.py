"""Row ranges of a safetensors file, read straight into memory that the caller owns.

A memory map would be filled page by page and then copied; one read call for a range is as fast as
the file system, and a thread that reads lets the others run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hooks.files import FolderError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""


class Place(NamedTuple):
    """Where a tensor's bytes lie in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def tensor_layout(path: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file.

    Raises
    ------
    FolderError
        If the header is damaged or a dtype is none of :data:`DTYPES`.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        return {
            name: Place(
                DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"{path} is not a readable tensor file ({type(error).__name__}: {error}); delete its "
            "folder and make it again"
        ) from None


def read_rows(path: Path, place: Place, first: int, out: Tensor) -> None:
    """Fill ``out`` ``[rows, d]`` with a tensor's rows from ``first`` on.

    Raises
    ------
    FolderError
        If the file ends too early or cannot be read.
    """
    if out.numel() == 0:
        return
    row = place.shape[1] * place.dtype.itemsize
    view = memoryview(out.view(torch.uint8).numpy().data).cast("B")
    offset = place.offset + first * row
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while len(view):
                got = os.preadv(descriptor, [view], offset)
                if got == 0:
                    raise FolderError(
                        f"{path} ends {len(view)} bytes too early; delete its folder and make it "
                        "again"
                    )
                view, offset = view[got:], offset + got
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error}); check the disk") from None
