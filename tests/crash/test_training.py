"""Training that is killed at every write, at random times, and on a full disk goes on exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE

ROOT = Path(__file__).parents[2]


def drive(activations, folder, *arguments):
    ran = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.crash.driver"),
            *(str(activations.folder), str(folder), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_killed_at_every_write_boundary(activations, tmp_path):
    outcomes = drive(activations, tmp_path, "boundaries")
    assert len(outcomes) > 30
    assert set(outcomes.values()) == {"ok"}, outcomes


def test_the_suite_notices_writes_in_place(activations, tmp_path):
    """The mutation: files written where they stand, not renamed over. It has to go red."""
    outcomes = Counter(drive(activations, tmp_path, "boundaries", "--mutate").values())
    assert outcomes["could not go on"] + outcomes["went on to another result"] > 0, outcomes


def test_killed_at_random_times(activations, tmp_path):
    outcomes = drive(activations, tmp_path, "random", "12")
    assert Counter(outcomes.values())["ok"] >= 8
    assert set(outcomes.values()) <= {"ok", "lived"}, outcomes


def test_a_full_disk(activations, tmp_path):
    outcomes = drive(activations, tmp_path, "full")
    assert len(outcomes) >= 3
    assert set(outcomes.values()) == {"ok"}, outcomes


def command(activations, out, steps):
    return [
        *(sys.executable, "-m", "maira_sae", "train", str(activations.folder), "--out", str(out)),
        *("--expansion", "2", "--k", "4", "--batch", "64", "--warmup-steps", "1"),
        *("--steps", str(steps), "--threshold-start", "2", "--checkpoint-every", "100000"),
    ]


def test_sigterm_saves_and_exits_with_3(activations, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = 1500
    assert subprocess.run(command(activations, whole, steps), cwd=ROOT).returncode == 0
    process = subprocess.Popen(
        command(activations, stopped, steps), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (stopped / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "which is saved" in said and "run the same command again" in said
    assert len(said.strip().splitlines()) == 1
    assert any((stopped / "checkpoints").iterdir())
    assert subprocess.run(command(activations, stopped, steps), cwd=ROOT).returncode == 0
    assert (stopped / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_a_flipped_byte_in_a_checkpoint(activations, tmp_path):
    """The newest checkpoint is damaged: the one before it is used, and the run's record says so."""
    from sae.train import train
    from sae.trainer import TrainConfig

    config = TrainConfig("llm.1.resid_post", expansion=2, k=4, steps=30, batch=64, lr=1e-3)
    config = TrainConfig(**{**config.__dict__, "checkpoint_every": 10, "threshold_start": 2})
    whole = train(activations, config, tmp_path / "whole")
    out = tmp_path / "damaged"
    train(activations, config, out)
    for name in ("manifest.json", "sae.safetensors"):
        (out / name).unlink()
    state = out / "checkpoints" / "step_00000030" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-5] ^= 0x10
    state.write_bytes(data)
    again = train(ActivationFolder(activations.folder), config, out)
    for name, value in whole.state_dict().items():
        assert (value == again.state_dict()[name]).all()
    (event,) = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert "step_00000030" in event["refused_checkpoints"][0]


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors", "metrics.json"])
def test_a_damaged_sae_is_refused(activations, tmp_path, name):
    from hooks.files import FolderError, verify
    from sae.train import train
    from sae.trainer import TrainConfig

    config = TrainConfig("llm.1.resid_post", expansion=2, k=4, steps=2, batch=64)
    train(activations, config, tmp_path / "sae")
    path = tmp_path / "sae" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FolderError, match=name):
        MatryoshkaSAE.from_pretrained(tmp_path / "sae")
    with pytest.raises(FolderError, match=name):
        verify(tmp_path / "sae")
