"""A real SIGKILL at any instant: what is on disk is valid, and going on gives the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hooks.files import FolderError, verify
from hooks.store import ActivationFolder

HARVEST = """
import sys, time
from pathlib import Path
from hooks import store
from hooks.harvest import HarvestConfig, harvest
from hooks.maira2 import load_model
from hooks.processor import Maira2Processor
from hooks.studies import read_folder
checkpoint, studies, out, pause = sys.argv[1:]
write = store.ActivationWriter.write
def slow(self, *rest):
    write(self, *rest)
    time.sleep(float(pause))
store.ActivationWriter.write = slow
harvest(load_model(checkpoint), Maira2Processor.from_pretrained(checkpoint),
        read_folder(Path(studies)),
        HarvestConfig(("llm.1.resid_post",), studies_per_part=3), Path(out))
"""

TRAIN = """
import sys
from pathlib import Path
from hooks.store import ActivationFolder
from sae.train import TrainConfig, train
train(ActivationFolder(sys.argv[1]), TrainConfig(site="llm.1.resid_post", expansion=4, k=4,
      steps=int(sys.argv[3]), batch=64, lr=1e-3, warmup_steps=1, threshold_start=5,
      checkpoint_every=10, measure_every=1000), Path(sys.argv[2]))
"""


def start(script, *args):
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, args)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def kill_when(process, ready):
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_killed_harvest_goes_on_to_the_same_bytes(checkpoint, studies_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(HARVEST, checkpoint, studies_folder, whole, 0).wait() == 0
    for parts in (1, 4):
        process = start(HARVEST, checkpoint, studies_folder, killed, 0.3)
        kill_when(process, lambda n=parts: len(list(killed.glob("part-*.json"))) >= n)
        with pytest.raises(FolderError, match="unfinished"):
            ActivationFolder(killed)
    # A kill in the middle of a write leaves a temporary file and an uncommitted part.
    (killed / ".part-00006.safetensors.1.tmp").write_bytes(b"torn")
    (killed / "part-00007.safetensors").write_bytes(b"torn")
    assert start(HARVEST, checkpoint, studies_folder, killed, 0).wait() == 0
    (killed / ".part-00006.safetensors.1.tmp").unlink()
    assert contents(killed) == contents(whole)
    assert verify(killed) == 25


def test_killed_training_goes_on_to_the_same_weights(activations, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(TRAIN, activations.folder, whole, 60).wait() == 0
    process = start(TRAIN, activations.folder, killed, 60)
    kill_when(process, lambda: any((killed / "checkpoints").glob("step_*/manifest.json")))
    assert not (killed / "manifest.json").exists()
    assert start(TRAIN, activations.folder, killed, 60).wait() == 0
    assert (killed / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
