"""The demonstration on the phantom, in its quick size."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hooks.files import verify
from phantom import LABELS

KEYS = {
    *("model", "site", "n_tokens", "harvest_tokens_per_s", "train_tokens_per_s", "fvu", "l0"),
    *("dead_fraction", "ce_recovered", "probes", "labels", "steering", "seconds", "versions"),
    *("seed", "findings"),
}


def demo(out, *more):
    command = [Path(sys.executable).with_name("maira-sae"), "demo", "--quick", "--json", *more]
    return subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=570)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    result = demo(out)
    assert result.returncode == 0, result.stderr
    return out, json.loads(result.stdout.strip().splitlines()[-1])


def test_every_stage_leaves_its_folder_and_its_figures(finished):
    out, summary = finished
    assert set(summary) >= KEYS
    assert summary == json.loads((out / "summary.json").read_text())
    for folder in (
        "studies",
        *(f"{s}-{what}" for s in ("text", "vision") for what in ("activations", "sae")),
        "labels",
    ):
        assert verify(out / folder) > 0
    assert set(summary["findings"]) == set(LABELS)
    for finding in summary["findings"].values():
        assert set(finding) >= {"auroc", "latent", "label", "pixel_auroc"}
        assert 0 <= finding["auroc"] <= 1
    mean = summary["mean_over_findings"]
    assert mean["auroc"] > mean["random_auroc"]
    assert mean["patch_auroc"] > mean["random_patch_auroc"]
    assert {one["direction"] for one in summary["steering"]["edits"]} == {"on", "off"}
    page = (out / "dashboard.html").read_text()
    assert page.count("data:image/webp;base64,") >= 6 * len(LABELS)


def test_running_again_resumes(finished):
    out, summary = finished
    began = time.monotonic()
    again = demo(out)
    assert json.loads(again.stdout.strip().splitlines()[-1]) == summary
    assert time.monotonic() - began < 30


def test_bench_steer_ends_with_every_key(finished):
    bench = [Path(sys.executable).with_name("maira-sae"), "bench", "steer", "--quick", "--json"]
    asked = ["--demo", finished[0], "--findings", "cardiomegaly,nodule_right_upper"]
    ran = subprocess.run([*bench, *asked], capture_output=True, text=True, timeout=570)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    wanted = {"overhead_one", "overhead_twenty", "history_auroc", "review_top1", "search_p10"}
    assert all(isinstance(result[key], float) for key in wanted)
    assert list(result["findings"]) == ["cardiomegaly", "nodule_right_upper"]
    keys = ("asserted", "removed", "side_effects", "random_flips", "mean_difference_asserted")
    for found in result["findings"].values():
        assert 0 < found["n"] <= 3
        assert all(0 <= found[key] <= 1 for key in keys)
        assert set(found["intervals"]) >= set(keys)
        assert set(found["written_on"]) == {"vision.3.resid_post"}
    refused = subprocess.run([*bench, "--findings", "cardiomegal"], capture_output=True, text=True)
    assert refused.returncode == 2 and "did you mean 'cardiomegaly'" in refused.stderr


def test_another_seed_is_another_folder(finished):
    out, _ = finished
    result = demo(out, "--seed", "1")
    assert result.returncode == 2
    assert "holds a demo with other settings; give a new folder" in result.stderr


def test_the_real_demo_takes_no_endpoint(tmp_path):
    more = ("--real", "--endpoint", "http://127.0.0.1:1/v1", "--llm", "x")
    result = demo(tmp_path / "out", *more)
    assert result.returncode == 2
    assert "leave --endpoint out" in result.stderr
    result = demo(tmp_path / "out", "--llm", "x")
    assert "--endpoint and --llm go together" in result.stderr
