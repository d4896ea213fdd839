"""A harvest that is killed at every write, on a full disk, or loses a rank goes on exactly."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import write_studies
from tests.e2e.test_cli import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def broken_studies(tmp_path_factory):
    """Twelve studies of which the third has a broken film."""
    folder = write_studies(tmp_path_factory.mktemp("broken"), 12, films=6)
    data = (folder / "film2.png").read_bytes()
    (folder / "torn.png").write_bytes(data[: len(data) // 2])
    lines = [json.loads(line) for line in (folder / "studies.jsonl").read_text().splitlines()]
    lines[2]["frontal"] = "torn.png"
    (folder / "studies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drive(checkpoint, studies, folder, *arguments):
    ran = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.crash.harvest_driver"),
            *(str(checkpoint), str(studies), str(folder), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_killed_at_every_write_boundary(checkpoint, broken_studies, tmp_path):
    outcomes = drive(checkpoint, broken_studies, tmp_path, "boundaries")
    assert len(outcomes) > 50
    assert set(outcomes.values()) == {"ok"}, outcomes


def test_the_suite_notices_writes_in_place(checkpoint, broken_studies, tmp_path):
    """The mutation: files written where they stand, not renamed over. It has to go red."""
    found = drive(checkpoint, broken_studies, tmp_path, "boundaries", "--mutate")
    outcomes = Counter(found.values())
    assert outcomes["could not go on"] + outcomes["went on to another result"] > 0, outcomes


def test_a_full_disk(checkpoint, broken_studies, tmp_path):
    outcomes = drive(checkpoint, broken_studies, tmp_path, "full")
    assert len(outcomes) >= 5
    assert set(outcomes.values()) == {"ok"}, outcomes


def test_ranks_give_the_same_bytes_and_a_lost_one_is_made_up(checkpoint, broken_studies, tmp_path):
    outcomes = drive(checkpoint, broken_studies, tmp_path, "ranks")
    assert set(outcomes) == {"1", "6", "11", "together"}
    assert set(outcomes.values()) == {"ok"}, outcomes


def test_a_rank_of_torchrun_that_dies_is_made_up_by_one_process(
    checkpoint, broken_studies, tmp_path
):
    def command(out):
        return (
            *("harvest", "--model", str(checkpoint), "--studies", str(broken_studies)),
            *("--site", "llm.1.resid_post", "--studies-per-part", "4", "--out", str(out)),
        )

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    died = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "tests.crash.ranked", *command(tmp_path / "a")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert died.returncode != 0 and "SIGKILL" in died.stderr, died.stderr
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert not (tmp_path / "a" / "part-00001.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it
    try:
        for out in (tmp_path / "a", tmp_path / "whole"):
            assert run(*command(out)).returncode == 0
    finally:
        torch.set_num_threads(threads)
    one, whole = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name[0] != "."}
        for name in ("a", "whole")
    )
    assert one == whole


def test_a_full_disk_ends_the_command_with_3(checkpoint, broken_studies, tmp_path):
    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    command = [
        *(sys.executable, "-m", "maira_sae", "harvest", "--model", str(checkpoint)),
        *("--studies", str(broken_studies), "--site", "llm.1.resid_post"),
        *("--out", str(tmp_path / "acts"), "--studies-per-part", "4"),
    ]
    ran = subprocess.run(command, cwd=ROOT, preexec_fn=small, capture_output=True, text=True)
    assert ran.returncode == 3, ran.stderr
    assert "could not be written" in ran.stderr and "run the same command again" in ran.stderr
    assert not (tmp_path / "acts" / "manifest.json").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    shutil.rmtree(tmp_path / "acts")
