"""The command line as scripts use it: exit codes, one-line errors, nothing existing touched."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from autointerp.features import Features
from hooks.store import ActivationFolder
from maira_sae.cli import main
from sae import MatryoshkaSAE, measure

SITE = "llm.1.resid_post"
COMMANDS = ("demo", "harvest", "train", "eval", "label", "score", "export", "steer", "convert")
COMMANDS += ("studies", "verify")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def installed(*args):
    """The installed command, in a process of its own."""
    done = subprocess.run(
        [Path(sys.executable).with_name("maira-sae"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run(*args):
    """The same entry point in this process, which spares imports."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["maira-sae", *map(str, args)]
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def refused(result, *parts, code=2):
    """One line on standard error, no traceback, the right status."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def tree(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pipeline(checkpoint, studies_folder, tmp_path_factory):
    """Harvest and train through the command line, with their results."""
    out = tmp_path_factory.mktemp("cli")
    acts, sae = out / "acts", out / "sae"
    harvested = installed(
        *("harvest", "--model", checkpoint, "--studies", studies_folder, "--site", SITE),
        *("--out", acts, "--json"),
    )
    trained = installed(
        *("train", acts, "--out", sae, "--expansion", 4, "--k", 4, "--steps", 30, "--batch", 64),
        *("--lr", 0.003, "--warmup-steps", 2, "--threshold-start", 10, "--json"),
    )
    return out, acts, sae, harvested, trained


def last_json(result):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_help_of_bench_has_a_worked_example():
    result = run("bench", "absorption", "--help")
    assert result.returncode == 0
    assert "Example: maira-sae bench absorption" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_worked_example(command):
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"Example: maira-sae {command}" in " ".join(result.stdout.split())


def test_harvest_train_eval_verify(pipeline, checkpoint, studies_folder):
    _, acts, sae, harvested, trained = pipeline
    assert last_json(harvested)["sites"] == [SITE]
    assert last_json(trained)["heldout"]["fvu"] < 1
    assert last_json(run("verify", acts, "--json")) == {
        "files": 4,
        "rows": last_json(harvested)["n_tokens"],
    }
    assert last_json(run("verify", sae, "--json")) == {"files": 3}
    result = last_json(
        run("eval", sae, acts, "--model", checkpoint, "--studies", studies_folder, "--json")
    )
    assert result["fvu"] == last_json(trained)["heldout"]["fvu"]
    assert result["cross_entropy"]["n_tokens"] > 20


def test_eval_beside_another_dictionary(pipeline, checkpoint, studies_folder, tmp_path):
    _, acts, sae, *_ = pipeline
    other, out = tmp_path / "flat", tmp_path / "eval"
    done = run(
        *("train", acts, "--out", other, "--expansion", 4, "--k", 4, "--steps", 30, "--batch", 64),
        *("--lr", 0.003, "--warmup-steps", 2, "--threshold-start", 10, "--seed", 1),
    )
    assert done.returncode == 0, done.stderr
    result = last_json(
        run(
            *("eval", sae, acts, "--beside", other, "--model", checkpoint),
            *("--studies", studies_folder, "--out", out, "--heldout", 0.4, "--json"),
        )
    )
    names = {"sae", "pca", "random", "flat"}
    assert set(result["dictionaries"]) == set(result["cross_entropy_recovered"]) == names
    figure = result["cross_entropy_recovered"]["sae"]["recovered_zero"]
    assert figure["value"] == pytest.approx(result["ce_recovered"])
    assert figure["n"] == result["cross_entropy"]["n_tokens"]
    l0 = {name: one["l0"]["value"] for name, one in result["dictionaries"].items()}
    assert l0["flat"] == pytest.approx(l0["sae"], abs=2 / result["n_tokens"])
    assert set(result["stability"]) == {"flat", "random"}
    assert json.loads((out / "evaluation.json").read_text()) == result
    assert "<h2>Cross-entropy recovered</h2>" in (out / "evaluation.html").read_text()


def test_bench_absorption(tmp_path):
    args = ("bench", "absorption", "--quick", "--seeds", 2, "--out", tmp_path, "--json")
    result = last_json(run(*args))
    assert set(result) == {"l0", "matryoshka", "batchtopk", "ratio", "seeds"}
    for arm in ("matryoshka", "batchtopk"):
        rates = [row[arm]["rate"] for row in result["seeds"]]
        assert result[arm]["mean"] == pytest.approx(sum(rates) / 2)
        assert result[arm]["sd"] == pytest.approx(abs(rates[0] - rates[1]) / 2**0.5)
        assert result["l0"][arm] == pytest.approx(4, abs=0.01)
    assert last_json(run(*args)) == result, "running again resumes"


def test_steer(pipeline, checkpoint, studies_folder):
    _, acts, sae, *_ = pipeline

    folder = ActivationFolder(acts)
    rates = measure(
        MatryoshkaSAE.from_pretrained(sae), folder, SITE, folder.heldout(0.2) | True
    ).firing_rates
    common = (
        *("steer", sae, acts, "--model", checkpoint, "--studies", studies_folder),
        *("--strength", 3, "--max-new-tokens", 4, "--json"),
    )
    result = last_json(run(*common, "--study", "s0", "--latent", int(rates.argmax())))
    assert result["reference"] > 0 and result["before"] != ""
    off = [one for one in common if one not in ("--strength", 3)]
    off += ["--study", "s0", "--latent", int(rates.argmax()), "--mode"]
    assert last_json(run(*off, "ablate"))["strength"] is None
    assert last_json(run(*off, "minimum", "--strength", 2))["mode"] == "minimum"
    same = last_json(run(*off, "scale", "--strength", 1))
    assert same["before"] == same["after"]
    refused(run(*off, "clamp"), "has strength None", "give a number")
    refused(run(*common, "--study", "s99", "--latent", 0), "no study 's99'", "did you mean")
    refused(run(*common, "--study", "s0", "--latent", 9999), "latent 9999 is outside 0–127")


def test_steer_several_studies(pipeline, checkpoint, studies_folder, tmp_path):
    _, acts, sae, *_ = pipeline
    folder = ActivationFolder(acts)
    rates = measure(
        MatryoshkaSAE.from_pretrained(sae), folder, SITE, folder.heldout(0.2) | True
    ).firing_rates
    common = (
        *("steer", sae, acts, "--model", checkpoint, "--studies", studies_folder),
        *("--latent", int(rates.argmax()), "--max-new-tokens", 4, "--out", tmp_path / "out"),
        *("--studies-n", 2, "--json"),
    )
    result = last_json(run(*common, "--sweep", "1,3", "--target", "heart", "--window", "0,20"))
    assert {dose["arm"] for dose in result["doses"]} == {"steered", "random latent"}
    assert [dose["strength"] for dose in result["doses"]] == [1.0, 3.0] * 2
    record = json.loads((tmp_path / "out" / "effects.json").read_text())
    assert len(record["effects"]) == 8
    page = (tmp_path / "out" / "report.html").read_text()
    assert "plotly" in page and "s0" in page and "<img" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page)
    refused(run(*common), "--target names no word")
    refused(run(*common, "--study", "s0"), "--study or --studies-n")


def test_same_command_again_resumes(pipeline, checkpoint, studies_folder):
    _, acts, *_ = pipeline
    before = tree(acts)
    args = ("harvest", "--model", checkpoint, "--studies", studies_folder, "--out", acts)
    assert run(*args, "--site", SITE).returncode == 0
    refused(run(*args, "--site", "llm.0.resid_post"), "holds another harvest", "new folder")
    refused(run(*args, "--site", "llm.1.resid_pst"), "did you mean 'llm.1.resid_post'")
    refused(run(*args, "--site", "llm.9.resid_post"), "layers are 0–2")
    assert tree(acts) == before


def test_harvest_estimates_samples_and_shares(checkpoint, studies_folder, tmp_path, monkeypatch):
    from hooks import estimate

    args = ("harvest", "--model", checkpoint, "--studies", studies_folder, "--json")
    vision = ("--site", "projector", "--policy", "patches", "--patches", "norm:4")
    with monkeypatch.context() as patch:
        disk = shutil.disk_usage(tmp_path)._replace(free=10)
        patch.setattr(estimate.shutil, "disk_usage", lambda _: disk)
        full = run(*args, *vision, "--out", tmp_path / "one")
        refused(full, "its disk has 10 bytes free", "--force")
        assert "to do: 24 studies" in full.stdout
        forced = last_json(run(*args, *vision, "--out", tmp_path / "one", "--force"))
    assert forced["n_tokens"] == forced["estimate"]["tokens"] == 24 * 4
    assert (forced["n_studies"], forced["n_skipped"], forced["sealed"]) == (24, 0, True)

    cut = (*args, *vision, "--studies-per-part", 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, sealed in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert last_json(run(*cut, "--out", tmp_path / "two"))["sealed"] is sealed
    monkeypatch.delenv("WORLD_SIZE")
    assert last_json(run(*cut, "--out", tmp_path / "alone"))["sealed"]
    names = {p.name: b for p, b in tree(tmp_path / "two").items()}
    assert names == {p.name: b for p, b in tree(tmp_path / "alone").items()}
    refused(run(*args, *vision[:-1], "norms:4", "--out", tmp_path / "x"), "did you mean 'norm'")


def test_bench_store(tmp_path, monkeypatch):
    monkeypatch.setenv("PEERS_PYTHON", str(tmp_path / "none"))
    result = last_json(run("bench", "store", "--quick", "--json"))
    assert result["sequential_ratio"] > 0 and result["shuffled_ratio"] > 0
    assert result["sae_lens_ratio"] is None and "make peers" in result["sae_lens_reason"]
    assert 0.5 < result["batch_entropy"] <= 1 and result["coverage"] > 0.9


def test_collect(pipeline, studies_folder, tmp_path):
    _, acts, sae, _, _ = pipeline
    args = ("collect", sae, acts, "--studies", studies_folder, "--n-top", 3)
    result = run(*args, "--out", tmp_path / "features", "--json")
    assert result.stdout.startswith("to do: ")
    found = last_json(result)
    features = Features.open(tmp_path / "features")
    assert found["n_latents"] == features.n_latents and found["alive"] == len(features.alive()) > 0
    assert found["examples"] == features.table("examples").num_rows > 0
    before = tree(tmp_path / "features")
    assert last_json(run(*args, "--out", tmp_path / "features", "--json")) == found
    assert tree(tmp_path / "features") == before
    refused(run(*args[:-1], 4, "--out", tmp_path / "features"), "other features")


def test_bench_collect(tmp_path, monkeypatch):
    monkeypatch.setenv("PEERS_PYTHON", str(tmp_path / "none"))
    result = last_json(run("bench", "collect", "--quick", "--json"))
    assert result["collect_over_floor"] > 0 and result["pass_over_floor"] > 0
    assert result["delphi_ratio"] is None and "make peers" in result["delphi_reason"]


def test_bench_harvest(checkpoint, studies_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PEERS_PYTHON", str(tmp_path / "none"))
    where = ("--model", checkpoint, "--studies", studies_folder, "--rounds", 1, "--json")
    result = last_json(run("bench", "harvest", *where))
    assert result["bare_tokens_per_s"] > 0 and result["harvest_tokens_per_s"] > 0
    assert result["sae_lens_tokens_per_s"] is None and "make peers" in result["sae_lens_reason"]
    assert (result["model"], result["site"]) == (str(checkpoint), "llm.1.resid_post")


def test_bad_studies(checkpoint, studies_folder, tmp_path):
    args = ("harvest", "--model", checkpoint, "--site", SITE, "--out", tmp_path / "out")
    refused(run(*args, "--studies", tmp_path), "has no studies.jsonl", "write one JSON object")
    (tmp_path / "studies.jsonl").write_text("")
    refused(run(*args, "--studies", tmp_path), "is empty")
    copy = Path(shutil.copytree(studies_folder, tmp_path / "copy"))
    (copy / "film0.png").write_text("not an image")
    strict = run(*args, "--studies", copy, "--strict")
    refused(strict, "study 's0'", "film0.png is not an image", "PNG, JPEG or DICOM")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_checkpoint(checkpoint, studies_folder, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    sorted(copy.glob("model-*.safetensors"))[0].unlink()
    args = ("--studies", studies_folder, "--site", SITE, "--out", tmp_path / "out")
    refused(run("harvest", "--model", copy, *args), "weight files", "model-00001-of")
    refused(run("harvest", "--model", "no/such-model", *args), "no/such-model cannot be loaded")
    assert not (tmp_path / "out").exists()


def test_bad_activations(pipeline, tmp_path):
    _, acts, *_ = pipeline
    args = ("--out", tmp_path / "sae", "--steps", 1)
    refused(run("train", tmp_path / "none", *args), "no folder", "maira-sae harvest")
    copy = Path(shutil.copytree(acts, tmp_path / "version"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 7}))
    refused(run("train", copy, *args), "format version 7, this library reads 1")
    copy = Path(shutil.copytree(acts, tmp_path / "truncated"))
    part = copy / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    refused(run("train", copy, *args), "part-00000.safetensors has 1000 bytes")
    refused(run("verify", copy), "part-00000.safetensors")
    refused(run("train", acts, "--site", "llm.1.resid_pots", *args), "did you mean")
    assert not (tmp_path / "sae").exists()


def test_endpoint_down_or_remote(pipeline, tmp_path):
    _, acts, sae, *_ = pipeline
    features = tmp_path / "features"
    found = last_json(run("collect", sae, acts, "--out", features, "--json"))
    assert found["n_latents"] == 128
    args = ("label", features, "--llm", "x", "--out", tmp_path / "labels")
    refused(run(*args, "--endpoint", "http://127.0.0.1:9/v1"), "cannot be reached", "start it")
    refused(run(*args, "--endpoint", "https://example.org/v1"), "--allow-remote example.org")
    refused(run(*args, "--endpoint", "nonsense"), "is not a URL")
    here = ("--endpoint", "http://127.0.0.1:9/v1")
    refused(run(*args, "--latents", "a,b", *here), "write numbers")
    refused(run(*args, "--latents", "1", "--top", 3, *here), "give one of the two")
    refused(
        run("label", features, "--out", tmp_path / "l", "--max-cost", 1),
        "--max-cost is for --endpoint",
    )
    labels = last_json(run("label", features, "--out", tmp_path / "words", "--json"))
    scores = ("score", features, tmp_path / "words", "--out", tmp_path / "scores", "--json")
    told = [one for one in last_json(run(*scores))["scores"] if one["value"] not in (None, 0.5)]
    assert 0 < len(told) <= labels["named"]  # "no clear concept" predicts nothing: 0.5
    assert last_json(run("verify", tmp_path / "scores", "--json")) == {"files": 2}


def test_convert(pipeline, tmp_path):
    _, acts, sae, *_ = pipeline
    dl, own = tmp_path / "dl", tmp_path / "own"
    result = last_json(run("convert", sae, dl, "--to", "dictionary_learning", "--json"))
    assert (result["n_latents"], result["k"], result["site"]) == (128, 4, SITE)
    assert result["activation"] == "threshold"
    before = tree(dl)
    assert run("convert", sae, dl, "--to", "dictionary_learning").returncode == 0
    assert tree(dl) == before
    last_json(run("convert", dl, own, "--to", "maira_sae", "--json"))
    assert last_json(run("verify", own, "--json")) == {"files": 3}
    evaluated = [last_json(run("eval", one, acts, "--json"))["fvu"] for one in (sae, dl, own)]
    assert evaluated == pytest.approx([evaluated[0]] * 3, rel=1e-6)

    args = ("convert", sae, tmp_path / "x", "--to")
    refused(run(*args, "sparsify"), "selects the k largest", "--activation topk")
    refused(run(*args, "saelens"), "no format 'saelens'", "did you mean 'sae_lens'")
    refused(run(*args, "sae_lens", "--k", 5), "says k itself; leave k out")
    refused(run(*args, "sae_lens", "--group-sizes", "a"), "--group-sizes is 'a'; write numbers")
    refused(run("convert", acts, tmp_path / "x", "--to", "sae_lens"), "expected 'sae'")
    refused(run("convert", sae, own, "--to", "sae_lens"), "exists and holds something else")
    (dl / "ae.pt").write_bytes((dl / "ae.pt").read_bytes()[:999])
    refused(run("convert", dl, tmp_path / "x", "--to", "sae_lens"), "ae.pt is refused")
    assert not (tmp_path / "x").exists()
    last_json(run(*args, "sparsify", "--activation", "topk", "--json"))


def test_unknown_option_is_status_two():
    assert run("train", "--no-such-option").returncode == 2


def test_harvest_along_generated_reports(checkpoint, studies_folder, tmp_path):
    from hooks.generation import read_generations

    args = ("harvest", "--model", checkpoint, "--studies", studies_folder, "--site", SITE)
    result = run(*args, "--out", tmp_path / "own", "--generate", "--max-new-tokens", 3, "--json")
    assert last_json(result)["sites"] == [SITE]
    written = list(read_generations(ActivationFolder(tmp_path / "own")))
    assert len(written) == 24 and max(len(one.token_ids) for one in written) == 3


def test_harvest_takes_towers_alone(tokenizer, studies_folder, tmp_path):
    from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    from hooks.processor import Maira2Processor

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=42)).save_pretrained(tmp_path / "dino")
    Maira2Processor(tokenizer, 42).save_pretrained(tmp_path / "dino")
    llama = LlamaConfig(**sizes, intermediate_size=24, vocab_size=len(tokenizer))
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    args = ("harvest", "--studies", studies_folder, "--json", "--model")
    films = (*args, tmp_path / "dino", "--site", "vision.0.mlp_out", "--policy", "patches")
    seen = run(*films, "--out", tmp_path / "a")
    assert last_json(seen)["n_tokens"] == 9 * (24 + 8 + 6)  # laterals and priors too
    texts = (*args, tmp_path / "llama", "--site", "llm.0.resid_post", "--policy", "report")
    read = run(*texts, "--out", tmp_path / "b")
    assert set(ActivationFolder(tmp_path / "b").column("role")) == {"report"}
    assert last_json(read)["n_tokens"] > 24
    refused(run(*texts, "--out", tmp_path / "c", "--generate"), "needs a model that writes reports")


def images_folder(folder, studies_folder, *rows):
    """A table of films instead of studies.jsonl; each row is id, film, patient, split."""
    folder.mkdir()
    for film in studies_folder.glob("*.png"):
        shutil.copy(film, folder / film.name)
    lines = ["id,frontal,patient,split,report", *(",".join((*row, "Clear.")) for row in rows)]
    (folder / "films.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return folder


def test_studies_says_what_a_folder_holds(studies_folder, tmp_path):
    found = last_json(run("studies", studies_folder, "--open", "--json"))
    assert (found["layout"], found["studies"], found["patients"]) == ("studies.jsonl", 24, 12)
    assert found["have"]["lateral"] == 8 and found["labels"] == {"Effusion": 6}
    assert sum(found["splits"].values()) == 24 and found["gaps"] == {}
    rows = [("a", "film0.png", "p", "train"), ("b", "gone.png", "q", "test")]
    folder = images_folder(tmp_path / "table", studies_folder, *rows)
    result = run("studies", folder)
    assert result.returncode == 0
    assert "layout    images" in result.stdout and "gap       no image file: 1" in result.stdout
    refused(run("studies", tmp_path), "has no studies.jsonl", "grounded_reports*.json")
    refused(run("studies", folder, "--layout", "imges"), "did you mean 'images'?")


def test_a_leak_is_printed_and_is_an_error(studies_folder, tmp_path):
    rows = [("a", "film0.png", "p", "train"), ("b", "film1.png", "p", "test")]
    folder = images_folder(tmp_path / "table", studies_folder, *rows)
    result = run("studies", folder, "--json")
    refused(result, "1 leak between splits", "patient p")
    assert len(json.loads(result.stdout.strip().splitlines()[-1])["leaks"]) == 1
    refused(
        run(
            "harvest", "--model", "m", "--studies", folder, "--site", SITE, "--out", tmp_path / "o"
        ),
        "1 leak between splits",
    )


def test_harvest_of_another_layout_says_what_it_skips(checkpoint, studies_folder, tmp_path):
    rows = [("a", "film0.png", "p", ""), ("b", "gone.png", "q", ""), ("c", "film1.png", "r", "")]
    folder = images_folder(tmp_path / "table", studies_folder, *rows)
    arguments = ("--model", checkpoint, "--studies", folder, "--site", SITE)
    result = run("harvest", *arguments, "--out", tmp_path / "acts", "--policy", "report")
    assert result.returncode == 0, result.stderr
    assert "skipped one study, b (no image file: " in result.stderr
    assert set(ActivationFolder(tmp_path / "acts").column("study")) == {"a", "c"}
