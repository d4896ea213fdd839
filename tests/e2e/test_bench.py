"""The benchmark commands run, agree with each other and end in the JSON that scripts rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maira_sae.bench_kernels import PASSES, ceilings
from maira_sae.bench_train import StepShape
from sae.kernels import gpu_model

ROOT = Path(__file__).parents[2]
SMALL = ("--d-model", "16", "--latents", "96", "--k", "4", "--batch", "64", "--threads", "1")


def bench(*arguments, code=0):
    ran = subprocess.run(
        [sys.executable, "-m", "maira_sae", "bench", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == code, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]) if code == 0 else ran.stderr


def test_training_agrees_with_plain_torch():
    result = bench("train", *SMALL, "--steps", "20", "--peers", "dense")
    assert set(result["tokens_per_s"]) == set(result["peak_mb"]) == {"maira_sae", "dense"}
    ours, plain = result["loss_20"]["maira_sae"], result["loss_20"]["dense"]
    assert ours == pytest.approx(plain, rel=1e-4) and ours > 0
    assert result["config"]["latents"] == 96


def test_a_peer_without_an_environment_and_an_unknown_one():
    said = bench("train", *SMALL, "--peers", "sae_lens", "--peers-python", "/nowhere", code=2)
    assert "build it with `make peers`" in said
    said = bench("train", *SMALL, "--peers", "sparsity", code=2)
    assert "unknown trainer 'sparsity'" in said


def test_the_budget_of_a_step():
    result = bench("kernels", *SMALL, "--steps", "8")
    assert set(result["ms"]) == set(result["modelled_ms"])
    assert result["ms_step"] == pytest.approx(sum(result["ms"].values()))
    assert sum(result["modelled_h100"].values()) > 0


def test_every_pass_of_the_model_belongs_to_one_phase():
    passes = gpu_model.sparse_step(gpu_model.Shape(adam="separate"))
    for row in passes:
        assert sum(row.name.startswith(names) for names in PASSES.values()) == 1, row.name


def test_ceilings_are_rates():
    found = ceilings(StepShape(64, 256, 8, 128, threads=1), "cpu")
    assert found.gemm > 1e8 and found.memory > 1e7 and found.cache > 1e6


def test_the_cost_of_checkpoints():
    result = bench("resume", *SMALL)
    assert 0 < result["share_at_every_1000_steps"] < 1
    assert result["checkpoint_mb"] > 3 * 2 * 16 * 96 * 4 / 1e6
