"""The real-input demonstration in its quick size: real towers, film, reports and LLM server."""

import json
import subprocess
import sys
import time
from pathlib import Path

from hooks.files import verify

KEYS = {
    *("model", "site", "n_tokens", "harvest_tokens_per_s", "train_tokens_per_s", "fvu", "l0"),
    *("dead_fraction", "ce_recovered", "probes", "labels", "steering", "seconds", "versions"),
    "seed",
}


def demo(out):
    command = [Path(sys.executable).with_name("maira-sae"), "demo", "--real", "--quick", "--json"]
    result = subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_quick_demo_and_its_resume(tmp_path):
    out = tmp_path / "demo"
    summary = demo(out)
    assert set(summary) >= KEYS
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["model"]["projector"] == "untrained"
    assert summary["n_tokens"] > 5000
    assert set(summary["steering"]) >= {"before", "after", "latent", "strength"}
    assert len(summary["labels"]) == 2
    assert set(summary["labels"][0]) >= {"latent", "label", "balanced_accuracy", "baseline"}
    for folder in ("model", "activations", "sae", "labels"):
        assert verify(out / folder) > 0
    log = (out / "stages" / "server.log").read_text()
    assert "POST /v1/chat/completions" in log

    began = time.monotonic()
    assert demo(out) == summary
    assert time.monotonic() - began < 60
