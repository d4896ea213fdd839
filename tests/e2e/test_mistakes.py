"""A user's mistake is one line that says what to do, and exit status 2; nothing is left behind."""

import shlex

import pytest
import torch

from hooks.store import ActivationFolder
from maira_sae import cli
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.1.resid_post"


@pytest.fixture(scope="module")
def place(tmp_path_factory, activations, checkpoint, studies_folder):
    """Folders of every kind: a dictionary, one of another site, something else."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, site in (("sae", SITE), ("other-sae", "llm.0.resid_post")):
        sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=site, policy=activations.policy))
        sae.save(folder / name, {})
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    links = {"acts": activations.folder, "model": checkpoint, "studies": studies_folder}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


MISTAKES = {
    "no studies": (
        f"harvest --model model --studies nowhere --site {SITE} --out out",
        "no folder nowhere; give one that holds studies",
    ),
    "a site that is not": (
        "harvest --model model --studies studies --site llm.1.resid_pst --out out",
        "did you mean 'llm.1.resid_post'?",
    ),
    "a layer that is not": (
        "harvest --model model --studies studies --site llm.99.resid_post --out out",
        "this model's llm layers are 0",
    ),
    "no such dtype": (
        f"harvest --model model --studies studies --site {SITE} --dtype flot16 --out out",
        "unknown dtype 'flot16' (did you mean 'float16'?)",
    ),
    "a folder of another kind to write": (
        f"harvest --model model --studies studies --site {SITE} --out sae",
        "sae holds 'sae', not a harvest; give a new folder",
    ),
    "a folder that is not empty": (
        f"harvest --model model --studies studies --site {SITE} --out full",
        "full is not empty and is no harvest; give a new folder",
    ),
    "studies for activations": ("train sae --out out", "holds 'sae', expected 'activations'"),
    "more active than there are": (
        "train acts --k 100000 --out out",
        "k is 100000; it must lie in",
    ),
    "no GPU": ("train acts --kernels triton --out out", "need a CUDA device"),
    "words for numbers": ("train acts --groups half --out out", "write numbers like 0.5,1"),
    "no dictionary": ("eval nowhere acts", "no folder nowhere; run `maira-sae train`"),
    "another site's dictionary": (
        "collect other-sae acts --out out",
        "has no site 'llm.0.resid_post'",
    ),
    "no features": ("label nowhere --out out", "no folder nowhere; run `maira-sae collect`"),
    "half an endpoint": (
        "demo --out out --endpoint http://127.0.0.1:9/v1",
        "--endpoint and --llm go together",
    ),
    "a host that is not this machine": (
        "demo --out out --endpoint https://example.org/v1 --llm name",
        "pass --allow-remote example.org",
    ),
    "no study of that name": (
        "steer sae acts --model model --studies studies --study s_0 --latent 1 --strength 1",
        "has no study 's_0'",
    ),
    "no latent of that number": (
        "steer sae acts --model model --studies studies --study s0 --latent 999 --strength 1",
        "latent 999 is outside 0–63",
    ),
    "no index": ("search nowhere --latents 1", "no folder nowhere; run `maira-sae index`"),
    "no format": ("convert sae out --to saelens", "did you mean 'sae_lens'?"),
    "not a finished folder": ("verify full", "has no manifest.json"),
    "a repository without an owner": (
        "publish sae --repo mine --data d --license mit --dry-run",
        "owner/name",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the mistakes is to have no GPU")
@pytest.mark.parametrize("line, text", MISTAKES.values(), ids=MISTAKES)
def test_one_line_and_status_2(line, text, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["maira-sae", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert text in error
    assert error.startswith("maira-sae: ") and error.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "line, text",
    [
        ("harvst", "No such command 'harvst'"),
        ("train acts", "Missing option '--out'"),
        ("train acts --out out --steps many", "valid integer"),
        ("collect sae acts --out out --n-tops 3", "No such option: --n-tops"),
    ],
)
def test_a_wrong_word_is_named(line, text, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["maira-sae", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert ended.value.code == 2
    assert text in error


def test_the_folders_are_what_they_seem(place):
    """Else every mistake above would be this one."""
    assert ActivationFolder(place / "acts").sites
    assert MatryoshkaSAE.from_pretrained(place / "sae").config.site == SITE


def test_a_demonstration_writes_into_no_other_folder(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["maira-sae", "demo", "--quick", "--out", "full"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "full is not empty and is no demo" in capsys.readouterr().err
    assert [path.name for path in (place / "full").iterdir()] == ["notes.txt"]
