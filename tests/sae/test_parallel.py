"""Two gloo processes train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

RANK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from hooks.store import ActivationFolder
from sae.train import train
from sae.trainer import TrainConfig
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    dist.init_process_group("gloo")
folder, out, changes = sys.argv[1:]
base = dict(site="llm.1.resid_post", expansion=4, k=4, steps=50, batch=64, lr=3e-3, warmup_steps=5,
            threshold_start=5, threshold_beta=0.9, dead_after_tokens=500, checkpoint_every=25,
            measure_every=50, dtype="float64")
train(ActivationFolder(folder), TrainConfig(**{**base, **json.loads(changes)}), Path(out))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(folder, out, ranks, **changes):
    """Train with ``ranks`` processes; returns the weights and the lines of metrics."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-c", RANK),
                *(str(folder), str(out), json.dumps(changes)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                **{"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "sae.safetensors"), lines


@pytest.fixture(scope="module")
def alone(activations, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return {
        dtype: run(activations.folder, out / dtype, 1, dtype=dtype)
        for dtype in ("float64", "float32")
    }


def compare(got, want, tolerance):
    for name, value in want[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(got[1], want[1], strict=True):
        assert mine["step"] == reference["step"]
        for key in ("loss", "batch_fvu", "batch_l0", "auxiliary", "threshold"):
            assert mine[key] == pytest.approx(reference[key], rel=tolerance, abs=tolerance), key
        assert mine["dead"] == reference["dead"]


@pytest.mark.parametrize("shard", [False, True], ids=["data", "latents"])
def test_two_ranks_equal_one(activations, alone, tmp_path, shard):
    got = run(activations.folder, tmp_path / "two", 2, shard_latents=shard)
    assert any(line["dead"] > 0 and line["auxiliary"] > 0 for line in got[1])
    compare(got, alone["float64"], 1e-8)


@pytest.mark.parametrize("shard", [False, True], ids=["data", "latents"])
def test_float32_losses(activations, alone, tmp_path, shard):
    _, lines = run(activations.folder, tmp_path / "two", 2, shard_latents=shard, dtype="float32")
    for mine, reference in zip(lines, alone["float32"][1], strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)


@pytest.mark.parametrize("changes", [{"activation": "topk"}, {"sampled_prefixes": 3}])
@pytest.mark.parametrize("shard", [False, True], ids=["data", "latents"])
def test_other_settings(activations, tmp_path, changes, shard):
    changes = {**changes, "steps": 20, "role_weights": {"report": 2.0}, "max_norm": 1.3}
    want = run(activations.folder, tmp_path / "one", 1, **changes)
    got = run(activations.folder, tmp_path / "two", 2, shard_latents=shard, **changes)
    assert any(line["left_out"] for line in got[1])
    compare(got, want, 1e-8)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_resume_with_another_number_of_ranks(activations, alone, tmp_path, first, then):
    out = tmp_path / "sae"
    run(activations.folder, out, first, shard_latents=True)
    for name in ("manifest.json", "sae.safetensors", "checkpoints/step_00000050/manifest.json"):
        (out / name).unlink()
    compare(run(activations.folder, out, then, shard_latents=True), alone["float64"], 1e-8)
