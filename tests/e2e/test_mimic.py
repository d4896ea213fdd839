"""From a folder as MIMIC-CXR-JPG is downloaded to verified activations, in one command."""

import gzip
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from hooks.store import ActivationFolder
from tests.e2e.test_cli import SITE, last_json, refused, run, tree
from tests.hooks.conftest import write_mimic

METADATA = "mimic-cxr-2.0.0-metadata.csv.gz"
SKIPPED = {
    f"{METADATA} row 4": "malformed row: row 4 has 2 fields, the header 8",
    "s50000006": "two reports: ",
    "s50000007": "no frontal film: its views are LATERAL",
    "s50000008": "no image file: ",
    "s50000009": "unreadable: ",
    "s59999999": "labels without a study: ",
}


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    """Nine studies of four patients; of the studies above something is amiss."""
    folder = write_mimic(tmp_path_factory.mktemp("mimic") / "mimic")
    report = folder / "reports" / "files" / "p10" / "p10000764" / "s50000006.txt"
    report.parent.mkdir(parents=True)
    report.write_text("FINDINGS: Another reader's.")
    film = next(folder.rglob("50000009-PA.jpg"))
    film.write_bytes(film.read_bytes()[:400])
    lines = gzip.decompress((folder / METADATA).read_bytes()).decode().splitlines()
    lines.insert(4, "cut,off")
    (folder / METADATA).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def command(checkpoint, mimic, out, *more):
    return (
        *("harvest", "--model", checkpoint, "--studies", mimic, "--site", SITE, "--out", out),
        *("--policy", "all", "--studies-per-part", 2, *more),
    )


class Harvested(NamedTuple):
    folder: Path
    said: str
    shown: str
    """On standard error, which was a terminal."""


@pytest.fixture(scope="module")
def harvested(checkpoint, mimic, tmp_path_factory):
    """The command in a process of its own, as in a terminal."""
    out = tmp_path_factory.mktemp("acts") / "acts"
    ours, theirs = pty.openpty()
    asked = [str(part) for part in command(checkpoint, mimic, out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "maira_sae", *asked],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        text=True,
    )
    os.close(theirs)
    shown = b""
    while piece := _read(ours):
        shown += piece
    os.close(ours)
    said, _ = process.communicate(timeout=100)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0, text
    return Harvested(out, said, text)


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""


def test_one_command_from_the_data_set_to_activations(harvested):
    estimate, done = harvested.said.strip().splitlines()
    found = re.fullmatch(
        r"to do: 6 studies, about ([\d,]+) kept tokens: (.+ kB) on disk \(.+ free\), \d+ s",
        estimate,
    )
    assert found, estimate
    folder = ActivationFolder(harvested.folder)
    assert (
        abs(int(found[1].replace(",", "")) / folder.n_tokens - 6 / 5) < 0.2
    )  # the film of one is not opened yet
    assert done == f"{folder!r}; 6 left out, {harvested.folder}/skipped.jsonl says why"
    assert re.search(r"harvest .*100%", harvested.shown), harvested.shown
    assert "skipped 5 studies, the first" in harvested.shown
    assert set(folder.column("study")) == {f"s5000000{i}" for i in range(1, 6)}
    assert folder.manifest["n_studies"] == 5 and folder.manifest["n_skipped"] == 6


def test_what_is_amiss_is_named_with_its_reason(harvested, mimic):
    lines = (harvested.folder / "skipped.jsonl").read_text().splitlines()
    found = {one["study_id"]: one["reason"] for one in map(json.loads, lines)}
    assert len(lines) == 6 and set(found) == set(SKIPPED)
    for study, reason in SKIPPED.items():
        assert found[study].startswith(reason), found[study]
    gaps = last_json(run("studies", mimic, "--open", "--json"))["gaps"]
    assert {gap["first"].split(":")[0] for gap in gaps.values()} == set(SKIPPED)
    assert sum(gap["n"] for gap in gaps.values()) == 6


def test_it_verifies_and_is_not_made_again(harvested, checkpoint, mimic):
    before = {path: path.stat().st_mtime_ns for path in harvested.folder.iterdir()}
    found = last_json(run("verify", harvested.folder, "--json"))
    assert found["rows"] == ActivationFolder(harvested.folder).n_tokens
    again = run(*command(checkpoint, mimic, harvested.folder))
    assert again.returncode == 0 and "to do" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in harvested.folder.iterdir()} == before


def test_strict_stops_at_the_first_gap(checkpoint, mimic, tmp_path):
    out = tmp_path / "acts"
    refused(run(*command(checkpoint, mimic, out, "--strict")), "row 4: malformed row", "--strict")
    assert not out.exists()


def test_a_data_set_that_changed_is_another_harvest(harvested, checkpoint, mimic, tmp_path):
    other = tmp_path / "mimic"
    other.mkdir()
    for path in mimic.iterdir():
        (other / path.name).symlink_to(path)
    asked = command(checkpoint, other, harvested.folder)
    found = run(*asked)
    assert found.returncode == 2
    refused(
        found._replace(stderr=found.stderr.splitlines()[-1]),
        "begun with other studies, or they have changed or moved",
        "new folder",
    )


def test_a_disk_that_is_too_small(checkpoint, mimic, tmp_path):
    """A real one: first refused, then full in the middle of it, then made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        asked = command(checkpoint, mimic, disk / "acts")
        assert run(*asked).stderr.count("\n") == 2  # what was skipped, and the refusal
        assert "its disk has 20.5 kB free; give another disk" in run(*asked).stderr
        full = run(*asked, "--force")
        assert full.returncode == 3 and "No space left on device" in full.stderr
        assert "run the same command again" in full.stderr
        assert not (disk / "acts" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert run(*asked).returncode == 0
        names = {path.name: content for path, content in tree(disk / "acts").items()}
        assert run(*command(checkpoint, mimic, tmp_path / "whole")).returncode == 0
        want = {path.name: content for path, content in tree(tmp_path / "whole").items()}
        assert names == want
    finally:
        subprocess.run(["umount", str(disk)], check=True)
