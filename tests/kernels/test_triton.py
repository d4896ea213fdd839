"""The Triton kernels, where there is no GPU: interpreted, and compiled ahead of time.

Triton reads ``TRITON_INTERPRET`` when a program is decorated, so each way has its own process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooks.files import ConfigError
from sae.kernels import BatchTopK, Weights, select

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = HERE / "golden" / "launches.json"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def python(*args, **environment):
    result = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def parity(interpret):
    plain = ("-m", "pytest", "--noconftest", "-p", "no:cacheprovider")
    output = python(*plain, str(HERE / "interpreted.py"), TRITON_INTERPRET=interpret)
    assert " passed" in output


def test_parity_in_the_interpreter():
    parity("1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_parity_on_a_gpu():
    parity("0")


def test_every_launch_compiles_within_what_devices_have():
    """No stack and so no spills, no atomics, and the resources of the golden table.

    After a change meant to alter them: ``python tests/kernels/launches.py --write``.
    """
    golden = json.loads(GOLDEN.read_text())
    programs = json.loads(python(str(HERE / "launches.py"), TRITON_INTERPRET="0"))
    for name, row in programs.items():
        assert row["stack"] == row["local"] == row["atomics"] == 0, name
        assert row["registers"] <= 255, name
        assert row["shared"] <= (163 if name.endswith("sm_80") else 227) * 1024, name
    for name, row in golden["programs"].items():
        assert row.pop("spills") == 0, name
    version = __import__("triton").__version__
    if version != golden["triton"]:
        pytest.skip(f"the table is of Triton {golden['triton']}, here is {version}")
    assert programs == golden["programs"]


def test_wide_rows_are_loaded_sixteen_bytes_at_a_time():
    """A warp reads 128 columns of float32, or 256 of bfloat16, with one 16-byte load a thread."""
    for name, row in json.loads(GOLDEN.read_text())["programs"].items():
        if "block=256" in name or "block=1024" in name:
            assert (row["wide_loads"] > 0) == ("odd" not in name), name


@pytest.mark.parametrize(
    ("rows", "width", "block", "slices"),
    [
        (32_768, 4096, 256, 16),  # 16 MiB of bfloat16; 1024 columns would be 64
        (131_072, 4096, 64, 64),
        (2_048, 4096, 1024, 4),
        (2_048, 100, 128, 1),  # no wider than the row
        (10**9, 4096, 64, 64),  # nothing fits
    ],
)
def test_slices_fit_the_cache(rows, width, block, slices):
    from sae.kernels.launches import sliced

    gathered = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    launch, found = sliced("decode", gathered, 24 << 20)
    assert (launch.block, found) == (block, slices)


def test_the_package_loads_without_triton():
    assert python("-c", "import sys, sae.kernels; print('triton' in sys.modules)") == "False\n"


def test_what_the_programs_cannot_read_is_refused():
    from sae.kernels.launches import whole_row

    kernels = select("cpu", "triton")
    assert kernels.name == "triton"
    W, b, x = torch.zeros(4, 3), torch.zeros(4), torch.zeros(2, 3)
    wide = Weights(*(tensor.double() for tensor in (W, b, W, x[0])))
    with pytest.raises(ConfigError, match="float64"):
        kernels.encode(wide, x.double(), BatchTopK(1))
    across = torch.zeros(3, 4).T
    with pytest.raises(ConfigError, match=r"W_enc has strides \(1, 4\)"):
        kernels.encode(Weights(across, b, W, x[0]), x, BatchTopK(1))
    assert whole_row("update", 4096).block == 4096
    with pytest.raises(ConfigError, match="DictionaryAdam"):
        whole_row("update", 4097)
