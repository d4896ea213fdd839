"""The benchmark runs the other libraries' own trainers, in their own environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("PEERS_PYTHON", str(ROOT / ".venv-peers" / "bin" / "python"))


@pytest.mark.skipif(not Path(PYTHON).is_file(), reason="run `make interop`")
def test_every_trainer_learns():
    arguments = ("--d-model", "32", "--latents", "256", "--k", "8", "--batch", "256")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "maira_sae", "bench", "train", *arguments),
            *("--steps", "60", "--threads", "1", "--json", "--peers-python", PYTHON),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    names = {"maira_sae", "sae_lens", "dictionary_learning", "dense"}
    for key in ("tokens_per_s", "peak_mb", "loss_60"):
        assert set(result[key]) == names
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
