"""Compile every Triton program in every shape it is launched in, without a GPU.

``python tests/kernels/launches.py`` prints the table of resources; with ``--write`` it replaces
``golden/launches.json``, which ``test_triton_launches.py`` compares with. Triton's interpreter
must be off (``TRITON_INTERPRET`` unset), so this runs in its own process.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.kernels.launches import LAUNCHES, Launch
from sae.kernels.programs import SIZES

GOLDEN = Path(__file__).parent / "golden" / "launches.json"
CAPABILITIES = (80, 90)
TYPES = ("fp32", "bf16")
VARIANTS: dict[str, tuple[dict[str, bool], ...]] = {
    "reverse": ({"WALK": True}, {"WALK": False}),
    "column": ({"CENTRE": True}, {"CENTRE": False}),
    "update": tuple({"DECODER": d, "SHADOW": s} for d in (True, False) for s in (True, False)),
}
INT64 = {"ends", "col", "row", "col_ptr", "seg_ptr", "seg_begin", "seg_end"}
FLOAT32 = {
    *("bias", "floors", "val", "residual", "partial", "scale", "group_weights", "weight"),
    *("sums", "bias_grad", "W", "exp_avg", "exp_avg_sq"),
}
SCALARS = {"step", "rest_1", "beta_2", "rest_2", "root_2", "eps"}
INTEGERS = {*SIZES, "D", "F"}


def argument_type(program: str, name: str, dtype: str) -> str:
    """Triton's name for the type of an argument, as the launchers pass it."""
    if name in INTEGERS:
        return "i32"
    if name in SCALARS:
        return "fp32"
    if name == "counts" or (program == "compact" and name == "col"):
        return "*i32"
    if name in INT64:
        return "*i64"
    if name == "shadow":
        return "*bf16"
    return "*fp32" if name in FLOAT32 else f"*{dtype}"


def cases() -> list[tuple[str, Launch, str, bool, dict[str, bool]]]:
    """Program, launch, type of its data, whether 16 divides the width, compile-time switches.

    Widths that 16 does not divide are for toys, so they are compiled for one launch alone. An
    update keeps a copy of its fp32 weights if and only if the rest runs in another type.
    """
    return [
        (name, launch, dtype, aligned, switches)
        for name, (_, launches) in LAUNCHES.items()
        for launch in launches
        for dtype in TYPES
        for aligned in ((True, False) if launch is launches[-1] else (True,))
        for switches in VARIANTS.get(name, ({},))
        if switches.get("SHADOW", dtype != "fp32") == (dtype != "fp32")
    ]


def label(
    name: str, launch: Launch, dtype: str, aligned: bool, switches: dict[str, bool], sm: int
) -> str:
    chosen = "".join(f" {switch.lower()}" for switch, on in switches.items() if on)
    odd = "" if aligned else " odd"
    return f"{name} block={launch.block} {dtype}{chosen}{odd} sm_{sm}"


def resources(
    case: tuple[str, Launch, str, bool, dict[str, bool]], disassemble: bool
) -> dict[str, dict[str, int]]:
    """What the compiled program needs, on each device."""
    name, launch, dtype, aligned, switches = case
    program = LAUNCHES[name][0]
    constants: dict[str, Any] = {"BLOCK": launch.block, "UNROLL": launch.unroll, **switches}
    constants = {k: v for k, v in constants.items() if k in program.arg_names}
    signature, attributes = {}, {}
    for i, argument in enumerate(program.arg_names):
        kind = "constexpr" if argument in constants else argument_type(name, argument, dtype)
        signature[argument] = kind
        if kind.startswith("*") or (argument in ("D", "F") and aligned):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constants, attributes)
    found = {}
    for sm in CAPABILITIES:
        compiled = triton.compile(source, GPUTarget("cuda", sm, 32), launch.options())
        found[label(*case, sm)] = {
            **usage(compiled.asm["cubin"], disassemble),
            "shared": compiled.metadata.shared,
            "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", compiled.asm["ptx"], re.M)),
            "wide_loads": len(re.findall(r"\bld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        }
    return found


def usage(cubin: bytes, disassemble: bool) -> dict[str, int]:
    """Registers, stack and spills, by the tool in Triton's wheel.

    Spills live on the stack, so without one there are none. Disassembling takes ten times as long
    as compiling; it counts the loads and stores of local memory all the same.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def run(option: str) -> str:
        return subprocess.run(
            [tool, option, handle.name], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as handle:
        handle.write(cubin)
        handle.flush()
        text = run("-res-usage")
        match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
        assert match, text
        found = {"registers": int(match[1]), "stack": int(match[2]), "local": int(match[3])}
        if disassemble:
            found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", run("-sass")))
    return found


def table(disassemble: bool, processes: int = 2) -> dict[str, dict[str, int]]:
    """Resources of every case; Triton's own cache makes a second run quick."""
    work = partial(resources, disassemble=disassemble)
    spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        parts = list(pool.map(work, cases(), chunksize=4))
    return dict(sorted(row for part in parts for row in part.items()))


def main() -> None:
    write = "--write" in sys.argv
    programs = table(disassemble=write)
    if write:
        rows = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in programs.items())
        version = json.dumps(triton.__version__)
        text = f'{{"triton": {version}, "programs": {{\n' + ",\n".join(rows) + "\n}}\n"
        GOLDEN.write_text(text)
    else:
        sys.stdout.write(json.dumps(programs))


if __name__ == "__main__":
    main()
