"""The mathematics of one training step, in interchangeable implementations.

:class:`Kernels` says what is computed, :mod:`sae.kernels.reference` says it in formulas, and
:func:`select` picks the fastest implementation that runs on a device.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from hooks.files import ConfigError
from sae.kernels.adam import DictionaryAdam
from sae.kernels.autograd import nested_loss
from sae.kernels.cpu import CPUKernels
from sae.kernels.interface import (
    BatchTopK,
    Code,
    Decoded,
    Kernels,
    Nested,
    Selection,
    TopK,
    Weights,
)
from sae.kernels.reference import ReferenceKernels

__all__ = [
    "BatchTopK",
    "CPUKernels",
    "Code",
    "Decoded",
    "DictionaryAdam",
    "Kernels",
    "Nested",
    "ReferenceKernels",
    "Selection",
    "TopK",
    "Weights",
    "nested_loss",
    "select",
]

VARIABLE = "MAIRA_SAE_KERNELS"
"""Environment variable that names the implementation to use where the caller names none."""
NAMES = ("reference", "cpu", "triton")


def select(device: torch.device | str, name: str | None = None) -> Kernels:
    """The implementation called ``name``, or the fastest one for ``device``.

    ``name`` comes from the argument, else from the environment variable ``MAIRA_SAE_KERNELS``,
    else it is ``triton`` on a CUDA device of compute capability 8.0 or more if Triton is
    installed, and ``cpu`` otherwise.

    Raises
    ------
    ConfigError
        If the name is unknown, or Triton is asked for and not installed.

    >>> select("cpu", "reference").name
    'reference'
    """
    name = name or os.environ.get(VARIABLE) or _fastest(torch.device(device))
    if name == "reference":
        return ReferenceKernels()
    if name == "cpu":
        return CPUKernels()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "kernels 'triton' were asked for, but Triton is not installed; "
                "install the package triton, or ask for 'cpu'"
            )
        from sae.kernels.triton import TritonKernels  # Triton is optional

        return TritonKernels()
    raise ConfigError(f"kernels {name!r} are unknown; the known ones are {', '.join(NAMES)}")


def _fastest(device: torch.device) -> str:
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "triton" if modern and importlib.util.find_spec("triton") is not None else "cpu"
