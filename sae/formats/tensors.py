"""Tensor files of any library, read without running anything they contain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hooks.files import FormatError

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")


class Tensors(NamedTuple):
    """Every tensor of a file by its (dotted) name, with what messages need."""

    path: Path
    values: dict[str, Tensor]

    def listing(self) -> str:
        """``name dtype [shape]`` of all of them."""
        shown = [
            f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            for name, value in self.values.items()
        ]
        return "; ".join(shown) or "nothing"

    def take(self, *names: str) -> list[Tensor]:
        """These tensors in order; an error lists what is missing and what there is."""
        missing = [name for name in names if name not in self.values]
        if missing:
            raise FormatError(f"{self.path} lacks {', '.join(missing)}; it holds {self.listing()}")
        return [self.values[name] for name in names]

    def whole(self, name: str) -> int | None:
        """A stored whole number, or ``None``."""
        value = self.values.get(name)
        if value is None:
            return None
        return whole_numbers([value.item() if value.numel() == 1 else None], name, self.path)[0]


def load_tensors(path: Path) -> Tensors:
    """Read a ``.safetensors``, ``.npz``, ``.pt``, ``.pth`` or ``.bin`` file.

    Raises
    ------
    FormatError
        If it is missing, damaged, or a pickle of anything but tensors and plain containers.
    """
    if not path.is_file():
        raise FormatError(f"no file {path}; check the path, or download it again")
    if path.suffix == ".safetensors":
        try:
            values = load_file(path)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path} is not readable safetensors ({_line(error)}); get it again"
            ) from None
    elif path.suffix == ".npz":
        values = _load_npz(path)
    else:
        values = _load_pickle(path)
    return Tensors(path, values)


def _load_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name].copy()) for name in archive.files}
    except Exception as error:  # a damaged archive can raise nearly anything
        raise FormatError(
            f"{path} is not a plain npz archive ({_line(error)}); get it again"
        ) from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of a damaged pickle can raise nearly anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to run {code[1]}" if code else type(error).__name__
        raise FormatError(
            f"{path} is refused: not a readable file of plain tensors ({reason}); nothing in it "
            "was run; get it again, or save its state dict alone"
        ) from None
    if not isinstance(content, Mapping):
        raise FormatError(
            f"{path} holds a {type(content).__name__}, not a state dict; save state_dict() instead"
        )
    return dict(_flattened(content, ""))


def _flattened(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif isinstance(value, (int, float)):
            yield name, torch.tensor(value)


def read_config(path: Path | None) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file."""
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not readable JSON ({_line(error)}); get it again") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{path} holds a {type(value).__name__}, expected an object; get it again"
        )
    return value


def field(
    config: Mapping[str, Any], name: str, kind: type, where: Path, default: Any = None
) -> Any:
    """A key of a configuration; one of another type is an error. Whole numbers are not bools."""
    value = config.get(name, default)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{where} says {name} {value!r}, expected {kind.__name__}; correct it")
    return value


def whole_numbers(values: Any, name: str, where: Path | None) -> list[int]:
    """A list of whole numbers; anything else is an error."""
    good = isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
        for value in values
    )
    if not good:
        raise FormatError(f"{where} says {name} {values!r}, expected whole numbers; correct it")
    return [int(value) for value in values]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
