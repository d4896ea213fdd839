"""Publishing to, and reading from, a Hub on this machine; and what is refused before that."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp.labels import Label, write_labels
from autointerp.scores import Score, write_scores
from hooks.files import MANIFEST, DisclosureError, HubError, file_record, seal, write_json
from sae import MatryoshkaSAE, SAEConfig
from sae.hub import Publication, stage, verify_published

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))
DATA = "Drawn films of nobody."


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sae"
    config = SAEConfig(
        48, 768, 6, (256, 512), "llm.3.resid_post", "report", model={"id": "me/base"}
    )
    sae = MatryoshkaSAE(config, seed=3)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(768, generator=torch.Generator().manual_seed(1)))
        sae.threshold.fill_(0.4)
    sae.save(folder, {"heldout": {"fvu": 0.25, "l0": 6.0}})
    return folder


def labels_in(folder, line='{"latent": 3, "label": "pleural effusion", "reference": 2.5}'):
    folder.mkdir()
    (folder / "labels.jsonl").write_text(line + "\n")
    (folder / "ledger.sqlite").write_bytes(b"SQLite format 3\0\xff quoted reports")
    names = ("labels.jsonl",)
    seal(folder, "labels", 1, {name: file_record(folder / name) for name in names})
    return folder


@contextmanager
def hub(folder, *options):
    command = [sys.executable, str(ROOT / "tests/hub_server.py"), str(folder), *options]
    server = subprocess.Popen(command)
    address = folder / "address"
    address.unlink(missing_ok=True)
    try:
        wait(lambda: address.is_file() and address.read_text())
        yield {
            **os.environ,
            "HF_ENDPOINT": address.read_text(),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
    finally:
        server.kill()
        server.wait()


def wait(ready, seconds=60.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def command(sae_folder, *options):
    fixed = ("--repo", "me/dictionary", "--data", DATA, "--license", "mit", "--json")
    return [sys.executable, "-m", "maira_sae", "publish", str(sae_folder), *fixed, *options]


def run(arguments, environment, status=0):
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done


def requests_of(folder, method, part):
    path = folder / "requests.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [one["path"] for one in lines if one["method"] == method and part in one["path"]]


READ = """
import sys
from safetensors.torch import load_file, save_file
from sae import MatryoshkaSAE
sae = MatryoshkaSAE.from_pretrained("me/dictionary")
x = load_file(sys.argv[1])["x"]
save_file({"z": sae.encode(x).detach(), "y": sae(x).detach()}, sys.argv[2])
"""
PEER = """
import sys
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from dictionary_learning.utils import load_dictionary
x = load_file(sys.argv[1])["x"]
lens = SAE.from_pretrained("me/dictionary", "sae_lens")
folder = snapshot_download("me/dictionary", allow_patterns="dictionary_learning/*")
other, _ = load_dictionary(f"{folder}/dictionary_learning", "cpu")
found = {}
for name, one in {"lens": lens, "other": other}.items():
    z = one.encode(x)
    values = {f"{name}.z": z, f"{name}.y": one.decode(z)}
    found |= {key: value.detach().contiguous().clone() for key, value in values.items()}
save_file(found, sys.argv[2])
"""


def test_published_read_online_and_offline_and_by_other_libraries(sae_folder, tmp_path):
    labels = labels_in(tmp_path / "labels")
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    save_file({"x": x}, tmp_path / "x.safetensors")
    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    want = {"z": sae.encode(x), "y": sae(x)}
    assert 0.02 < (want["z"] > 0).float().mean() < 0.98
    with hub(tmp_path) as environment:
        extra = ("--labels", str(labels), "--with", "dictionary_learning")
        done = run(command(sae_folder, *extra), environment)
        assert json.loads(done.stdout.splitlines()[-1])["private"] is True
        repo = json.loads((tmp_path / "repos.json").read_text())["me/dictionary"]
        assert repo["private"] is True
        first, last = repo["commits"][-2:]
        assert MANIFEST not in first["files"]
        assert set(last["files"]) - set(first["files"]) == {MANIFEST}
        assert "labels.jsonl" in last["files"] and "ledger.sqlite" not in last["files"]
        blobs = b"".join(p.read_bytes() for p in (tmp_path / "blobs").iterdir())
        assert b"quoted reports" not in blobs

        script = [sys.executable, "-c", READ, str(tmp_path / "x.safetensors")]
        run([*script, str(tmp_path / "online.safetensors")], environment)
        sent = len(requests_of(tmp_path, "GET", ""))
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        run([*script, str(tmp_path / "offline.safetensors")], offline)
        assert len(requests_of(tmp_path, "GET", "")) == sent
        for name in ("online", "offline"):
            found = load_file(tmp_path / f"{name}.safetensors")
            assert torch.equal(found["z"], want["z"]) and torch.equal(found["y"], want["y"])

        pulled = tmp_path / "pulled"
        code = "import sys, pathlib, sae.hub; sae.hub.pull(sys.argv[1], pathlib.Path(sys.argv[2]))"
        run([sys.executable, "-c", code, "me/dictionary", str(pulled)], environment)
        assert verify_published(pulled) == len(last["files"]) - 1

        # The same again: nothing is committed.
        run(command(sae_folder, *extra), environment)
        again = json.loads((tmp_path / "repos.json").read_text())["me/dictionary"]
        assert len(again["commits"]) == len(repo["commits"])

        if PEERS.is_file():
            peer = [str(PEERS), "-W", "ignore", "-c", PEER, str(tmp_path / "x.safetensors")]
            run([*peer, str(tmp_path / "peer.safetensors")], environment)
            found = load_file(tmp_path / "peer.safetensors")
            for name in ("lens", "other"):
                for key in ("z", "y"):
                    torch.testing.assert_close(
                        found[f"{name}.{key}"], want[key], atol=1e-5, rtol=1e-5
                    )
        else:
            assert "PEERS_PYTHON" not in os.environ, f"{PEERS} is missing"


PUSH = """
import sys
from pathlib import Path
import torch
from sae import MatryoshkaSAE
from sae.hub import pull
sae = MatryoshkaSAE.from_pretrained(sys.argv[1])
print(sae.push_to_hub("me/pushed", data="Drawn films of nobody.", license="mit"))
again = MatryoshkaSAE.from_pretrained("me/pushed")
x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
assert again.config == sae.config, (again.config, sae.config)
here = pull("me/pushed", Path(sys.argv[2]))
assert "Drawn films of nobody." in (here / "README.md").read_text()
assert torch.equal(MatryoshkaSAE.load(here).W_dec, sae.W_dec)
"""


def test_pushed_from_python_and_read_again(sae_folder, tmp_path):
    with hub(tmp_path) as online:
        arguments = [sys.executable, "-c", PUSH, str(sae_folder), str(tmp_path / "pulled")]
        assert run(arguments, online).stdout.strip().endswith("/me/pushed")
        assert len(requests_of(tmp_path, "POST", "/api/repos/create")) == 1
    repos = json.loads((tmp_path / "repos.json").read_text())
    assert repos["me/pushed"]["private"]  # nothing else was asked


def test_killed_while_uploading_then_resumed(sae_folder, tmp_path):
    """The Hub takes blobs slowly; the client is killed between the first and the second."""
    with hub(tmp_path, "--slow", "1.0") as environment:
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        uploads = tmp_path / "blobs"
        process = subprocess.Popen(command(sae_folder), env=environment, cwd=ROOT)
        wait(lambda: requests_of(tmp_path, "PUT", "/lfs/"))
        wait(lambda: any(uploads.iterdir()))
        process.send_signal(signal.SIGKILL)
        process.wait()
        repo = json.loads((tmp_path / "repos.json").read_text())["me/dictionary"]
        assert all(MANIFEST not in commit["files"] for commit in repo["commits"])
        kept = {path.name for path in uploads.iterdir()}
        before = len(requests_of(tmp_path, "PUT", "/lfs/"))
        run(command(sae_folder), environment)
        after = requests_of(tmp_path, "PUT", "/lfs/")[before:]
        assert not {path.rsplit("/", 1)[-1] for path in after} & kept
        repo = json.loads((tmp_path / "repos.json").read_text())["me/dictionary"]
        assert MANIFEST in repo["commits"][-1]["files"]


def test_without_its_manifest_a_repository_is_unfinished(sae_folder, tmp_path):
    """The second commit fails: exit 3, and a reader is told; then the same command completes it."""
    save_file({"x": torch.zeros(2, 48)}, tmp_path / "x.safetensors")
    script = [sys.executable, "-c", READ, str(tmp_path / "x.safetensors")]
    script.append(str(tmp_path / "z.safetensors"))
    with hub(tmp_path, "--fail-commit", "2") as environment:
        done = run(command(sae_folder), environment, status=3)
        assert "run the same command again" in done.stderr
        broken = run(script, environment, status=1)
        assert "FolderError" in broken.stderr and "unfinished" in broken.stderr
        run(command(sae_folder), environment)
        run(script, environment)


def test_a_public_repository_is_not_written_as_private(sae_folder, tmp_path):
    with hub(tmp_path) as environment:
        run(command(sae_folder, "--public"), environment)
        done = run(command(sae_folder), environment, status=2)
        assert "is public" in done.stderr


def test_a_new_repository_needs_a_login(sae_folder, tmp_path):
    with hub(tmp_path) as environment:
        refused = run(command(sae_folder), environment | {"HF_TOKEN": "hf_other"}, status=2)
        assert "log in" in refused.stderr
        assert not (tmp_path / "repos.json").is_file()


def test_dry_run_says_what_would_be_sent_and_sends_nothing(sae_folder, tmp_path):
    with hub(tmp_path) as environment:
        done = run(command(sae_folder, "--dry-run"), environment)
        assert not (tmp_path / "requests.jsonl").is_file()
        said = json.loads(done.stdout.splitlines()[-1])
        run(command(sae_folder), environment)
        repo = json.loads((tmp_path / "repos.json").read_text())["me/dictionary"]
        files = repo["commits"][-1]["files"]
        assert {n: one["sha256"] for n, one in said["files"].items()} == {
            n: one["oid"] for n, one in files.items()
        }
        assert said["card"] == (tmp_path / "blobs" / files["README.md"]["oid"]).read_text()


def publication(sae_folder, **more):
    return Publication(sae_folder, DATA, "mit", **more)


@pytest.mark.parametrize(
    "line",
    [
        '{"latent": 3, "label": "effusion", "study": "a"}',
        '{"latent": 3, "label": "effusion", "examples": ["The heart is large."]}',
        '{"latent": 3, "label": "seen in s50414267"}',
        '{"latent": 3, "label": "seen in Alpha-7"}',
        json.dumps({"latent": 3, "label": "word " * 60}),
        '{"latent": 3, "label": "x", "token_ids": [1, 2]}',
        "no JSON",
    ],
)
def test_labels_with_patient_text_are_refused(sae_folder, tmp_path, line):
    labels = labels_in(tmp_path / "labels", line)
    given = publication(sae_folder, labels=labels, forbidden=("alpha-7",))
    with pytest.raises(DisclosureError, match=r"labels\.jsonl .*--include-text labels\.jsonl"):
        stage(given, "me/x", tmp_path / "out")
    named = publication(sae_folder, labels=labels, include_text=("labels.jsonl",))
    staged = stage(named, "me/x", tmp_path / "named")
    if "Alpha" not in line:  # without the name to look for, it is a label
        assert "labels.jsonl" in staged.found and "- `labels.jsonl`" in staged.card


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ('<img src="data:image/png;base64,iVBORw0KGgoAAAA">', "images"),
        ('<script>const d = {"sentence": "The heart is large."}</script>', "text"),
        (f"<script>const d = '{'QUJD' * 2000}'</script>", "text"),
    ],
)
def test_pages_with_films_or_reports_are_refused(sae_folder, tmp_path, page, kind):
    path = tmp_path / "x.html"
    path.write_text(page)
    with pytest.raises(DisclosureError, match=rf"explorer\.html holds .*--include-{kind}"):
        stage(publication(sae_folder, explorer=path), "me/x", tmp_path / "out")
    names = ("explorer.html",)
    forced = publication(sae_folder, explorer=path, include_text=names, include_images=names)
    assert "explorer.html" in stage(forced, "me/x", tmp_path / "forced").files


def test_a_ledger_goes_only_by_name(sae_folder, tmp_path):
    labels = labels_in(tmp_path / "labels")
    staged = stage(publication(sae_folder, labels=labels), "me/x", tmp_path / "out")
    assert staged.withheld == ["ledger.sqlite"] and "ledger.sqlite" not in staged.files
    text_only = publication(sae_folder, labels=labels, include_text=("ledger.sqlite",))
    with pytest.raises(
        DisclosureError, match="--include-images ledger"
    ):  # it cannot be looked into
        stage(text_only, "me/x", tmp_path / "text")
    with pytest.raises(HubError, match="none of the given folders"):
        stage(publication(sae_folder, include_text=("other.txt",)), "me/x", tmp_path / "other")


def test_a_path_of_this_machine_is_refused(tmp_path):
    config = SAEConfig(8, 32, 2, (32,), model={"id": "/home/someone/maira-2"})
    MatryoshkaSAE(config).save(tmp_path / "sae", {})
    with pytest.raises(DisclosureError, match="--base-model"):
        stage(publication(tmp_path / "sae"), "me/x", tmp_path / "out")
    named = publication(tmp_path / "sae", base_model="microsoft/maira-2")
    staged = stage(named, "me/x", tmp_path / "named")
    for name in staged.files:
        if not name.endswith((".safetensors", ".pt")):
            assert "/home/someone" not in (staged.folder / name).read_text()
    write_json(tmp_path / "eval" / "evaluation.json", {"folder": "/home/someone/acts"})
    with pytest.raises(DisclosureError, match="a path of this machine"):
        stage(
            publication(tmp_path / "sae", base_model="a/b", evaluation=tmp_path / "eval"),
            "me/x",
            tmp_path / "paths",
        )


def test_the_card_states_what_no_file_says(sae_folder, tmp_path):
    card = stage(publication(sae_folder), "me/x", tmp_path / "out").card
    for said in (
        "license: ",
        "never for clinical use",
        "fabricate",
        "site shift",
        "`report`",
        DATA,
    ):
        assert said in card
    assert "No intervals were measured" in card and "0.25" in card
    with pytest.raises(HubError, match="data is empty"):
        Publication(sae_folder, " ", "mit")
    with pytest.raises(HubError, match="no format 'sae_lense'"):
        publication(sae_folder, formats=("sae_lense",))


def test_labels_and_scores_as_they_are_written(sae_folder, tmp_path):
    """What `label` and `score` write passes the check, and the card says what lies there."""
    labels, scores = tmp_path / "labels", tmp_path / "scores"
    write_json(labels / "config.json", {})
    rest = ("text", "statistics", 0.9, "report", 2.5)
    write_labels([Label(3, "pleural effusion", *rest), Label(4, None, *rest)], labels)
    write_scores([Score(3, "detection", "report", 0.9, 0.05, 0.5, 0.9, 1.0, 40, 20)], scores)
    untested = stage(publication(sae_folder, labels=labels), "me/x", tmp_path / "one").card
    assert "names 1 latents" in untested and "were not tested" in untested
    both = stage(publication(sae_folder, labels=labels, scores=scores), "me/x", tmp_path / "two")
    assert {"labels.jsonl", "scores.jsonl"} <= set(both.files)
    assert "in `scores.jsonl`" in both.card
