"""The shapes in which Triton programs are launched: a closed table, compiled ahead by the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks.files import ConfigError
from sae.kernels import programs


@dataclass(frozen=True)
class Launch:
    """How one program is compiled and launched."""

    block: int
    """Columns of one program instance, ``BLOCK``; a power of two."""
    warps: int
    unroll: int = 4
    """Gathered rows in flight in one iteration, ``UNROLL``."""
    fusion: bool = True
    """Whether a product and a sum may round once (FMA); fixed, since Triton's default changes.

    Where a program's result must not depend on what surrounds a sum, it is off.
    """

    def options(self) -> dict[str, Any]:
        """Triton's compile options; nothing here uses its pipelining, so one stage."""
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": self.fusion}


FILTER = (Launch(1024, 4),)
GATHER = (Launch(64, 1), Launch(128, 1), Launch(256, 1), Launch(1024, 2, 2))
COLUMN = tuple(Launch(g.block, g.warps, g.unroll, fusion=False) for g in GATHER)
ROW = (
    Launch(64, 1, fusion=False),
    Launch(256, 1, fusion=False),
    Launch(1024, 4, fusion=False),
    Launch(4096, 8, 2, fusion=False),
)

LAUNCHES: dict[str, tuple[Any, tuple[Launch, ...]]] = {
    "bias": (programs.bias_program, FILTER),
    "count": (programs.count_program, FILTER),
    "compact": (programs.compact_program, FILTER),
    "decode": (programs.decode_program, GATHER),
    "contribute": (programs.contribute_program, GATHER),
    "reverse": (programs.reverse_program, GATHER),
    "segment": (programs.segment_program, COLUMN),
    "column": (programs.column_program, COLUMN),
    "sum": (programs.sum_program, (Launch(128, 1, fusion=False),)),
    "update": (programs.update_program, ROW),
}
"""Every program, and every shape it is ever launched in, narrowest first."""


def sliced(name: str, gathered: Tensor, cache_bytes: int) -> tuple[Launch, int]:
    """The widest launch whose slice of ``gathered`` [rows, D] fits, and how many slices D makes.

    No wider than it need be to hold D in one slice; the narrowest, if none fits.
    """
    rows, D = gathered.shape
    launches = LAUNCHES[name][1]
    chosen = launches[0]
    for launch in launches[1:]:
        if chosen.block >= D or rows * launch.block * gathered.element_size() > cache_bytes:
            break
        chosen = launch
    return chosen, -(-D // chosen.block)


def whole_row(name: str, D: int) -> Launch:
    """The narrowest launch that holds a row of width D.

    Raises
    ------
    ConfigError
        If D is wider than all.
    """
    launches = LAUNCHES[name][1]
    for launch in launches:
        if launch.block >= D:
            return launch
    raise ConfigError(
        f"the fused {name} takes widths to {launches[-1].block}, this one is {D}; "
        "compute gradients and update with DictionaryAdam"
    )


def run(
    name: str, launch: Launch, grid: tuple[int, ...], *arguments: Any, **constants: Any
) -> None:
    """Launch a program on the device of its first tensor."""
    program, _ = LAUNCHES[name]
    constants |= {"BLOCK": launch.block}
    if "UNROLL" in program.arg_names:
        constants["UNROLL"] = launch.unroll
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants, **launch.options())
