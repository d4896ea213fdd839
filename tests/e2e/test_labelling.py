"""Explainers, scorers and exports by the command line, against the scripted server."""

import gzip
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from autointerp import CollectConfig, collect
from autointerp.embedding import PACKAGE
from hooks.harvest import HarvestConfig, harvest
from hooks.studies import read_folder
from maira_sae.cli import main
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, serving
from sae.model import MatryoshkaSAE, SAEConfig
from tests.conftest import write_studies

SITE = "llm.1.resid_post"
MINILM = find_spec(PACKAGE) is not None
WORD, DENSE, SILENT, PATCH, CLEAR = range(5)
"""Latents: on at "effusion"; everywhere; nowhere; at the upper left patch; at "clear"."""


def run(*args):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maira-sae", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def told(*args):
    """What the command prints, and its JSON line."""
    code, out, err = run(*args, "--json")
    assert code == 0, err
    return out, json.loads(out.splitlines()[-1])


def refused(said, *args, code=2):
    found, _, err = run(*args)
    assert found == code and len(err.strip().splitlines()) == 1, err
    assert said in err, err
    return err


def answer(body):
    """A model that knows words from words, and that sees pictures without looking."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        label = {"label": "upper left corner", "confidence": 0.8, "evidence": "colour"}
        return json.dumps(label)
    return reply(body)


@pytest.fixture(scope="module")
def place(checkpoint, model, processor, tmp_path_factory):
    """Studies with boxes and masks, activations of films and text, a dictionary, features."""
    root = tmp_path_factory.mktemp("labelling")
    folder = write_studies(root / "studies", 72)
    lines = []
    for i, line in enumerate((folder / "studies.jsonl").read_text().splitlines()):
        study = json.loads(line) | {"patient": f"p{i}"}
        if i % 2:
            box = [0.0, 0.0, 0.35, 0.35]
            study["sentences"] = [{"text": "A mass.", "boxes": [box], "labels": ["Mass"]}]
        lines.append(json.dumps(study))
        mask = np.zeros((48 + 2 * (i % 3), 60), dtype=np.uint8)
        mask[-16:, -16:] = 255
        (root / "masks" / "Corner").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / "Corner" / f"{study['id']}.png")
    (folder / "studies.jsonl").write_text("\n".join(lines) + "\n")
    studies = read_folder(folder)
    acts = harvest(model, processor, studies, HarvestConfig((SITE,), policy="all"), root / "acts")
    sae = made_dictionary(acts, processor)
    sae.save(root / "sae", {})
    config = CollectConfig(n_top=12, n_quantile=8, n_contrast=12, score=0.4, steer=0.0)
    collect(sae, acts, config, root / "features", studies)
    return root


def made_dictionary(acts, processor):
    """Latents that fire where they are meant to, by separating directions."""
    x = acts.rows(SITE, 0, acts.n_tokens).double()
    ids = torch.from_numpy(acts.column("token_id").copy())
    role, view = acts.column("role"), acts.column("view")
    row, column = acts.column("patch_row"), acts.column("patch_column")
    sae = MatryoshkaSAE(SAEConfig(32, 16, 2, (16,), site=SITE, policy="all"))
    report = torch.from_numpy(role == "report")
    frontal = torch.from_numpy((role == "image") & (view == "frontal"))
    corner = frontal & torch.from_numpy((row == 0) & (column == 0))

    def word(text):
        last = processor.tokenizer(text, add_special_tokens=False)["input_ids"][-1]
        return report & (ids == last)

    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1.0)
        sae.b_enc[DENSE] = 1.0
    for latent, on in ((WORD, word(" effusion")), (CLEAR, word(" clear")), (PATCH, corner)):
        direction, bias = separating(x, on)
        with torch.no_grad():
            sae.W_enc[:, latent], sae.b_enc[latent] = direction.float(), float(bias)
    return sae.eval()


def separating(x, on):
    """A direction and a bias that are above zero on some rows and below on all others."""
    spread = x.std(0)
    weight = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    few = on | (torch.arange(len(x)) % 7 == 0)
    for _ in range(8):
        some, signs = x[few] / spread, torch.where(on[few], 1.0, -1.0)
        share = torch.where(on[few], 0.5 / on.sum(), 0.5 / (few & ~on).sum())
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss(some=some, signs=signs, share=share, optimizer=optimizer):
            optimizer.zero_grad()
            value = some @ weight[:-1] + weight[-1]
            total = (share * torch.nn.functional.softplus(-signs * value)).sum()
            total.backward()
            return total

        optimizer.step(loss)
        direction = weight.detach()[:-1] / spread
        value = x @ direction
        low, high = value[~on].max(), value[on].min()
        if low < high:
            return direction, -(low + high) / 2
        few = few | (~on & (value >= high))  # those on the wrong side count from now on
    raise AssertionError("the rows cannot be told apart")


def test_features_are_as_meant(place):
    from autointerp import Features

    features = Features.open(place / "features")
    assert features.dense(DENSE) and not features.dense(WORD)
    assert features.alive() and {WORD, PATCH, CLEAR} == set(features.alive())
    assert set(features.modalities) >= {"frontal", "report"}


@pytest.mark.parametrize(
    ("explainer", "latent", "label"),
    [
        ("text", WORD, "effusion"),
        ("vision", PATCH, "upper left corner"),
        ("reports", PATCH, None),
        ("causal", CLEAR, None),
    ],
)
def test_every_explainer(place, tmp_path, explainer, latent, label):
    more = {
        "vision": ("--studies", place / "studies"),
        "reports": ("--studies", place / "studies"),
        "causal": ("--sae", place / "sae", "--max-new-tokens", 12, "--strength", 1),
    }.get(explainer, ())
    out = tmp_path / "labels"
    with serving(Script(), answer) as server:
        args = ("label", place / "features", "--explainer", explainer, *more, "--out", out)
        args += ("--latents", f"{latent},{DENSE}", "--endpoint", server.url, "--llm", "scripted")
        args += ("--price-in", 1, "--price-out", 2)
        shown, result = told(*args)
        n, n_bytes = server.asked.total(), server.n_bytes
        again, _ = told(*args)
        assert server.asked.total() == n
    assert shown.startswith(f"to do: explain: {n} requests (0 more are kept)")
    assert "at the given prices" in shown.splitlines()[0]
    named, dense = result["labels"]
    assert named["explainer"] == explainer and named["latent"] == latent
    if label is not None:
        assert label in named["label"] and named["confidence"] > 0.5
    assert dense["label"] is None and result["dense"] == [DENSE]
    assert f"{DENSE}\tdense: " in shown and f"{DENSE}\tdense: " in again
    left = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [one["host"] for one in left] == ["127.0.0.1"] * n
    assert sum(one["bytes"] for one in left) == n_bytes > 0


def test_word_statistics_ask_nobody(place, tmp_path):
    text = ("label", place / "features", "--explainer", "statistics")
    shown, result = told(*text, "--out", tmp_path / "text")
    assert {one["model"] for one in result["labels"]} == {"statistics"}
    assert "effusion" in result["labels"][WORD]["label"]
    assert f"dense, not labelled: {DENSE}" in shown and result["dense"] == [DENSE]
    films = (*text, "--modality", "frontal", "--studies", place / "studies")
    _, result = told(*films, "--out", tmp_path / "films")
    assert {one["explainer"] for one in result["labels"]} == {"reports"}
    causal = (*text[:2], "--explainer", "causal", "--latents", str(WORD), "--sae", place / "sae")
    _, result = told(*causal, "--max-new-tokens", 8, "--out", tmp_path / "causal")
    assert [one["model"] for one in result["labels"]] == ["statistics"]
    (kept,) = (tmp_path / "causal").glob("steered-*.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["latent"] for row in rows] == [None, WORD]


def test_what_an_explainer_lacks_is_said(place, tmp_path):
    args = ("label", place / "features", "--out", tmp_path / "x", "--explainer")
    there = ("--endpoint", "http://127.0.0.1:9/v1", "--llm", "x")
    refused("did you mean 'vision'", *args, "vison")
    refused("needs --studies, whose films it shows", *args, "vision")
    refused("needs --studies, whose reports it reads", *args, "reports")
    refused("needs --sae", *args, "causal")
    refused("give --endpoint", *args, "vision", "--studies", place / "studies")
    refused("asks nobody", *args, "statistics", *there)
    refused("--batch is for --endpoint", *args, "text", "--batch")
    assert not (tmp_path / "x").exists()


def test_films_leave_for_a_named_host_only(place, tmp_path):
    args = ("label", place / "features", "--explainer", "vision", "--studies", place / "studies")
    args += ("--latents", PATCH, "--llm", "x", "--out", tmp_path / "labels")
    args += ("--endpoint", "https://llm.example.org/v1")
    refused("pass --allow-remote llm.example.org", *args)
    refused(
        "pass --allow-remote-images llm.example.org", *args, "--allow-remote", "llm.example.org"
    )
    assert not (tmp_path / "labels" / "requests.jsonl").exists()


def test_a_budget_stops_and_the_same_command_goes_on(place, tmp_path):
    with serving(Script(), answer) as server:
        args = ("label", place / "features", "--latents", f"{WORD},{CLEAR}", "--llm", "scripted")
        args += ("--endpoint", server.url, "--out", tmp_path / "labels", "--concurrency", 1)
        refused("as many as max_requests allows", *args, "--max-requests", 1, code=3)
        prices = ("--price-in", 1000, "--price-out", 1000)
        refused("might pass max_cost", *args, *prices, "--max-cost", 0.001, code=3)
        assert server.asked.total() == 1
        shown, result = told(*args)
        assert shown.startswith("to do: explain: 1 requests (1 more are kept)")
        assert result["named"] == 2 and server.counts["repeated"] == 0


def test_batches_are_left_and_collected(place, tmp_path):
    with serving(Script(batch_seconds=0.4), answer) as server:
        args = ("label", place / "features", "--latents", f"{WORD},{CLEAR}", "--llm", "scripted")
        args += ("--endpoint", server.url, "--out", tmp_path / "labels", "--batch")
        args += ("--poll", 0.05)
        refused("run again to collect them", *args, "--no-wait", code=3)
        _, result = told(*args)
        assert result["named"] == 2
        counts = server.counts
        assert (counts["uploads"], counts["batches"], counts["repeated"]) == (1, 1, 0)
        scores = ("score", place / "features", tmp_path / "labels", "--out", tmp_path / "scores")
        scores += ("--endpoint", server.url, "--llm", "scripted", "--batch", "--poll", 0.05)
        shown, result = told(*scores)
        assert shown.startswith("to do: score: ") and server.counts["repeated"] == 0
        assert [one["value"] for one in result["scores"]] == [1.0, 1.0]


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """Labels of text with their thresholds, and scores of every scorer."""
    out = tmp_path_factory.mktemp("scored")
    with serving(Script(), answer) as server:
        there = ("--endpoint", server.url, "--llm", "scripted")
        args = ("label", place / "features", "--latents", f"{WORD},{CLEAR},{DENSE}", *there)
        shown, result = told(*args, "--calibrate", "--out", out / "labels")
        assert "to do: calibrate: at most " in shown and "\tabove " in shown
        assert [one["fit"] is not None for one in result["labels"]] == [True, True, False]
        names = "detection,fuzzing,agreement" + ",embedding" * MINILM
        args = ("score", place / "features", out / "labels", "--scorers", names, *there)
        args += ("--sae", place / "sae", "--acts", place / "acts", "--studies", place / "studies")
        shown, result = told(*args, "--out", out / "scores")
    return out, shown, result


def test_every_scorer_of_text(scored):
    _, shown, result = scored
    found = {(one["latent"], one["scorer"]): one for one in result["scores"]}
    names = {"detection", "fuzzing", "agreement"} | ({"embedding"} if MINILM else set())
    assert {scorer for _, scorer in found} == names
    assert {latent for latent, _ in found} == {WORD, CLEAR}  # the dense one has no label
    assert found[WORD, "detection"]["value"] == 1.0
    assert found[WORD, "detection"]["baseline"] <= 0.6
    # Of a word in several tokens the latent is on at the last, which the judge does not know.
    assert found[WORD, "fuzzing"]["value"] >= 0.75 > found[WORD, "fuzzing"]["baseline"]
    if MINILM:
        assert found[WORD, "embedding"]["value"] >= 0.8
    agreed = found[WORD, "agreement"]
    assert (agreed["about"], agreed["value"]) == ("Effusion", 1.0) and agreed["n"] > 10
    assert "Effusion\tagreement 1.000 (shuffled" in shown


def test_scorers_of_films(place, tmp_path):
    args = ("label", place / "features", "--explainer", "statistics", "--modality", "frontal")
    args += ("--latents", str(PATCH), "--studies", place / "studies")
    told(*args, "--out", tmp_path / "labels")
    args = ("score", place / "features", tmp_path / "labels", "--out", tmp_path / "scores")
    refused("localisation needs --sae", *args, "--scorer", "localisation")
    refused("did you mean 'fuzzing'", *args, "--scorer", "fuzing")
    args += ("--sae", place / "sae", "--acts", place / "acts", "--studies", place / "studies")
    args += ("--scorer", "detection,localisation", "--masks", place / "masks")
    _, result = told(*args)
    located = next(one for one in result["scores"] if one["scorer"] == "localisation")
    # The boxes are where it fires; the masks, in the other corner, are not.
    assert located["about"] == "Mass" and located["value"] > 0.9 and located["n"] > 5
    detail = result["localisation"][str(PATCH)]
    assert detail["pointing"][0] == 1.0 and detail["iou"][0] > 0.5
    assert detail["pixel_auroc"][0] == located["value"]


COLUMNS = {
    "features": {
        *("modelId", "layer", "index", "creatorId", "sourceSetName", "maxActApprox", "hasVector"),
        *("vector", "vectorDefaultSteerStrength", "hookName", "frac_nonzero", "pos_str"),
        *("pos_values", "neg_str", "neg_values"),
    },
    "activations": {
        *("id", "tokens", "dataIndex", "index", "layer", "modelId", "dataSource", "maxValue"),
        *("maxValueTokenIndex", "minValue", "values", "creatorId"),
    },
    "explanations": {
        *("id", "modelId", "layer", "index", "description", "authorId", "typeName"),
        "explanationModelName",
    },
    "explanation_scores": {
        *("id", "initiatedByUserId", "value", "explanationId", "explanationScoreTypeName"),
        *("explanationScoreModelName", "jsonDetails"),
    },
}
"""Of the tables Neuron, Activation, Explanation and ExplanationScore of its database."""


def read_batches(folder):
    found = []
    for path in sorted(folder.glob("batch-*.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        found += [json.loads(line) for line in lines]
    return found


def test_neuronpedia_gets_no_words_unless_asked(place, scored, tmp_path):
    out, *_ = scored
    args = ("export", place / "features", "--labels", out / "labels", "--scores", out / "scores")
    args += ("--sae", place / "sae", "--creator", "a lab")
    shown, counts = told(*args, "--out", tmp_path / "plain")
    assert "of patients: nothing" in shown
    assert {p.name for p in (tmp_path / "plain" / "maira-2").iterdir()} == {
        "1-maira-sae-llm-resid-post"
    }
    plain = tmp_path / "plain/maira-2/1-maira-sae-llm-resid-post"
    for folder, columns in COLUMNS.items():
        rows = read_batches(plain / folder)
        assert len(rows) == counts[folder] > 0
        assert {frozenset(row) for row in rows} == {frozenset(rows[0])}  # its importer needs that
        assert set(rows[0]) <= columns
        assert len({row.get("id", row.get("index")) for row in rows}) == len(rows)
    kinds = (tmp_path / "plain/config/explanation_type.jsonl").read_text()
    assert json.loads(kinds)["name"] == read_batches(plain / "explanations")[0]["typeName"]
    rows = read_batches(plain / "activations")
    assert len(rows) == counts["activations"] > 0
    assert {token for row in rows for token in row["tokens"]} == {"▇"}
    assert {row["dataSource"] for row in rows} <= {"report", "prompt"}
    assert {row["dataIndex"] for row in rows} == {None}
    shown, _ = told(*args, "--with-text", "--with-films", "--out", tmp_path / "full")
    assert "of patients: words and films" in shown
    rows = read_batches(tmp_path / "full/maira-2/1-maira-sae-llm-resid-post/activations")
    words = [row for row in rows if row["index"] == str(WORD)]
    assert all("effusion" in row["tokens"][row["maxValueTokenIndex"]] for row in words)
    films = [row for row in rows if row["dataSource"] == "frontal"]
    assert {row["tokens"][row["maxValueTokenIndex"]] for row in films} == {"image_patch_0_0"}
    for folder in ("plain", "full"):
        everything = b"".join(
            gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
            for p in (tmp_path / folder).rglob("*")
            if p.is_file()
        )
        for study in read_folder(place / "studies"):
            assert f'"{study.id}"'.encode() not in everything
    args += ("--out", tmp_path / "none", "--format", "parket")
    refused("no format 'parket' (did you mean 'parquet'?)", *args)


def test_the_api_takes_the_payloads(place, scored, tmp_path):
    out, *_ = scored
    args = ("export", place / "features", "--labels", out / "labels", "--out", tmp_path / "api")
    _, counts = told(*args, "--format", "neuronpedia-api")
    (path,) = (tmp_path / "api").glob("*.json")
    payload = json.loads(path.read_text())
    assert set(payload) == {"modelId", "source", "features"}
    by_index = {one["index"]: one for one in payload["features"]}
    assert set(by_index) == {WORD, PATCH, CLEAR} and counts["features"] == 3
    assert "effusion" in by_index[WORD]["explanations"][0]["text"]
    assert all(len(a["tokens"]) == len(a["values"]) for a in by_index[WORD]["activations"])


def test_delphi_and_tables_come_back(place, scored, tmp_path):
    from autointerp import read_labels, read_scores
    from autointerp.tables import read_parquet

    out, *_ = scored
    labels, scores = read_labels(out / "labels"), read_scores(out / "scores")
    args = ("export", place / "features", "--labels", out / "labels", "--scores", out / "scores")
    told(*args, "--format", "parquet", "--out", tmp_path / "tables")
    assert read_parquet(tmp_path / "tables") == (labels, scores)
    told(*args, "--format", "delphi", "--out", tmp_path / "delphi")
    files = [p for p in (tmp_path / "delphi").rglob("*.txt")]
    assert len(files) == 2 + 4 and not any('"str_tokens": ["' in p.read_text() for p in files)
    back = ("label", place / "features", "--from", tmp_path / "delphi/explanations")
    _, result = told(*back, "--out", tmp_path / "labels")
    named = {one.latent: one.label for one in labels if one.label}
    assert {one["latent"]: one["label"] for one in result["labels"]} == named
    back = ("score", place / "features", tmp_path / "labels", "--out", tmp_path / "scores")
    _, result = told(*back, "--from", tmp_path / "delphi/scores")
    ours = {(one.latent, one.scorer): (one.value, one.auroc, one.n) for one in scores}
    assert len(result["scores"]) == 4
    for one in result["scores"]:
        assert ours[one["latent"], one["scorer"]] == (one["value"], one["auroc"], one["n"])
    told(*args, "--format", "delphi", "--with-text", "--out", tmp_path / "words")
    path = tmp_path / f"words/scores/detection/layers.1_latent{WORD}.txt"
    examples = json.loads(path.read_text())
    for one in examples:
        assert one["activating"] == ("effusion" in "".join(one["str_tokens"]))
    published = tmp_path / "interpretations.csv"
    rows = ["feature_id,interpretation,f1", f"{WORD},An effusion,0.5", f"{CLEAR},None,0.1"]
    published.write_text("\n".join(rows))
    _, result = told("label", place / "features", "--from", published, "--out", tmp_path / "csv")
    assert [one["label"] for one in result["labels"]] == ["An effusion", None]
    assert result["scores"] == {str(WORD): {"f1": 0.5}, str(CLEAR): {"f1": 0.1}}
    refused(
        "has nothing of the hookpoint 'layers.7'",
        *("label", place / "features", "--from", tmp_path / "delphi/explanations"),
        *("--hookpoint", "layers.7", "--out", tmp_path / "none"),
    )
