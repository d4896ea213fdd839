"""The commands of steering end to end, and their pages in a real browser.

The model's projector is recorded as untrained, so every page has to say so.
"""

import base64
import csv
import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from PIL import Image

from autointerp.labels import Label, write_labels
from hooks.harvest import HarvestConfig, harvest
from hooks.maira2 import load_model
from hooks.pages import Page
from hooks.provenance import untrained_parts
from hooks.store import ActivationFolder
from maira_sae.cli import main
from maira_sae.scripted_server import serving
from sae import MatryoshkaSAE, SAEConfig
from steering.effects import effect
from steering.entailment import Entailment
from steering.measures import UNSTEERED, Measures, measured_doses
from steering.patches import StoredPatches, sees_patches, study_heat
from steering.search import Index, latents_named

SITE = "vision.1.resid_post"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WARNING = "The projector of this model is untrained"
RESEARCH = "For research, not for diagnosis."


def run(*arguments, code=0):
    """What the command line prints; its last line is the record."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["maira-sae", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    assert status == code, err.getvalue()
    return err.getvalue() if code else json.loads(out.getvalue().strip().splitlines()[-1])


@pytest.fixture(scope="module")
def room(tmp_path_factory, checkpoint, processor, studies, studies_folder):
    """A model whose record says untrained, with its dictionary, patches, labels and index."""
    out = tmp_path_factory.mktemp("pages")
    shutil.copytree(checkpoint, out / "model")
    config = json.loads((out / "model" / "config.json").read_text())
    config["parts"] = {"vision": "random", "projector": "untrained"}
    (out / "model" / "config.json").write_text(json.dumps(config))
    sae = MatryoshkaSAE(SAEConfig(24, 40, 8, site=SITE, policy="patches"), seed=3)
    sae.save(out / "sae", {})
    acts = harvest(
        load_model(out / "model"),
        processor,
        studies,
        HarvestConfig((SITE,), "patches"),
        out / "acts",
    )
    z = sae.encode(acts.rows(SITE, 0, acts.n_tokens).float()).detach()
    often = (z > 0).sum(0).argsort(descending=True).tolist()
    (out / "labels").mkdir()
    (out / "labels" / "config.json").write_text(json.dumps({"site": SITE}))
    names = ["small left pleural effusion", "no pleural effusion", "<b>nodule</b>"]
    write_labels(
        [
            Label(n, name, "reports", "x", None, "frontal", 1.0)
            for n, name in zip(often, names, strict=False)
        ],
        out / "labels",
    )
    made = run("index", out / "sae", out / "acts", "--out", out / "index", "--json")
    assert made["warnings"][0].startswith(WARNING)
    return {"out": out, "often": often, "studies": studies_folder}


@pytest.fixture(scope="module")
def records(room):
    """What each command printed, its page written."""
    out, often = room["out"], room["often"]
    films = ("--studies", room["studies"])
    heat = (*films, "--sae", out / "sae", "--acts", out / "acts", "--labels", out / "labels")
    model = ("--model", out / "model", *films, "--labels", out / "labels")
    study = ("--study", "s1", "--json")
    found = {
        "search": run(
            *("search", out / "index", "--label", "pleural effusion", *heat, "--top", 4),
            *("--out", out / "search", "--json"),
        ),
        "film": run(
            *("search", out / "index", "--film", room["studies"] / "film0.png", "--top", 3),
            *("--model", out / "model", *heat, "--out", out / "film", "--json"),
        ),
        "history": run("history", out / "index", *heat, "--out", out / "history", *study),
        "review": run("review", out / "sae", *model, "--out", out / "review", *study),
        "draft": run(
            *("draft", out / "sae", out / "acts", *model, "--add", f"{often[0]}=3"),
            *("--ablate", often[1], "--max-new-tokens", 12, "--out", out / "draft", *study),
        ),
    }
    target = "effusion"

    def judge(body):
        text = body["messages"][-1]["content"]
        return '{"verdict": "entailed"}' if "e" in text[-9:] else "I cannot say"

    with serving(reply=judge) as server:
        found["steer"] = run(
            *("steer", out / "sae", out / "acts", *model, "--latent", often[0], "--target", target),
            *("--studies-n", 2, "--sweep", "1,4", "--max-new-tokens", 8, "--out", out / "steer"),
            *("--endpoint", server.url, "--llm", "judge", "--radfact", out / "radfact.csv"),
            "--json",
        )
    return found


PAGES = ("search/search", "film/search", "history/history", "review/review", "draft/draft")


def test_every_record_and_page_says_what_it_is_not(room, records):
    for name in (*PAGES, "steer/report"):
        page = (room["out"] / f"{name}.html").read_text()
        assert f'role="alert">{WARNING}' in page and "mean nothing clinically" in page
        assert RESEARCH in page
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page)
        assert "<b>nodule</b>" not in page
    for record in records.values():
        assert record["warnings"][0].startswith(WARNING)


def test_a_trained_model_has_no_warning(room, checkpoint, processor, studies, tmp_path):
    assert untrained_parts(checkpoint) == ()
    assert untrained_parts("microsoft/maira-2") == ()
    assert untrained_parts(room["out"] / "model") == ("projector",)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"parts": {"projector": "untrained"}}))
    assert untrained_parts(tmp_path / "checkpoint") == ("projector",)


def test_search_by_label_takes_the_label_and_not_its_denial(room, records):
    often, found = room["often"], records["search"]
    assert f"small left pleural effusion ({often[0]})" in found["asked"]
    index = Index(room["out"] / "index")
    want = index.by_latents([often[0]], 4)
    assert [hit["study"] for hit in found["hits"]] == [hit.study for hit in want]
    first = found["hits"][0]["latents"][0]
    assert (first["latent"], first["name"]) == (often[0], "small left pleural effusion")
    assert latents_named({1: "no effusion", 2: "effusion"}, "no effusion") == [1]
    error = run(
        *("search", room["out"] / "index", "--label", "effusoin", "--labels"),
        *(room["out"] / "labels", "--json"),
        code=2,
    )
    assert "no label of 3 says 'effusoin'" in error
    error = run("search", room["out"] / "index", "--like", "s0", "--latents", "3", code=2)
    assert "one of them" in error


def test_search_by_film_finds_the_study_of_that_film(room, records, studies):
    hits = records["film"]["hits"]
    films = {study.id: study.frontal.name for study in studies}
    assert {films[hit["study"]] for hit in hits} == {"film0.png"}
    assert hits[0]["score"] == pytest.approx(1, abs=0.02)
    shares = [one["share"] for one in hits[0]["latents"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-5


def test_heat_of_a_folder_is_that_of_the_model(room, processor, studies):
    sae = MatryoshkaSAE.from_pretrained(room["out"] / "sae")
    assert sees_patches(sae)
    model = load_model(room["out"] / "model")
    own = study_heat(model, processor, sae, studies[1], room["often"][:2])
    stored = StoredPatches(sae, ActivationFolder(room["out"] / "acts"))
    kept = stored.heat("s1", room["often"][:2])
    for latent in room["often"][:2]:
        assert set(own[latent]) == set(kept[latent]) == {"frontal", "lateral", "prior"}
        for view, grid in own[latent].items():
            assert grid.shape == (3, 3)
            np.testing.assert_allclose(kept[latent][view], grid, rtol=0.05, atol=0.05)
    assert stored.heat("nobody", [1]) == {1: {}}


def test_history_can_keep_to_latents_with_a_label(room, records):
    highlights = records["history"]["highlights"]
    named = [one for one in highlights if one["name"]]
    kept = run(
        *("history", room["out"] / "index", "--study", "s1", "--named", "--json"),
        *("--labels", room["out"] / "labels"),
    )["highlights"]
    assert {one["latent"] for one in kept} <= set(room["often"][:3])
    assert [one for one in kept if one in highlights] == named
    assert highlights and all(abs(one["share"]) <= 1 + 1e-6 for one in highlights)


def test_a_draft_is_marked_wherever_it_goes(room, records):
    draft, often = records["draft"], room["often"]
    assert draft["heading"].startswith("draft with edits: ")
    assert f"latent {often[1]} (no pleural effusion): ablate" in draft["heading"]
    assert f"latent {often[0]} (small left pleural effusion): add 3.0 ×" in draft["heading"]
    assert draft["marked"] == f"[{draft['heading']}]\n{draft['text']}"
    assert [edit["latent"] for edit in draft["edits"]] == [often[1], often[0]]
    saved = json.loads((room["out"] / "draft" / "draft.json").read_text())
    assert saved["marked"] == draft["marked"]


def test_a_review_flags_what_no_latent_supports(room, records):
    sentences = records["review"]["sentences"]
    flagged = [one["text"] for one in sentences if one["support"] < 4]
    assert records["review"]["unsupported"] == flagged and len(sentences) == 3
    page = (room["out"] / "review" / "review.html").read_text()
    assert page.count('class="item sentence unsupported"') == len(flagged)
    names = {one["latent"]: one["name"] for s in sentences for one in s["image"]}
    assert set(names.values()) & {"small left pleural effusion", "no pleural effusion", None}


def test_steering_stands_beside_its_control_and_the_unsteered_model(room, records):
    found = records["steer"]
    rows = {(row["arm"], row["strength"]): row for row in found["measured"]}
    arms = {("steered", 1.0), ("steered", 4.0), ("random latent", 1.0), ("random latent", 4.0)}
    assert set(rows) == arms | {(UNSTEERED, 0.0)}
    assert rows["steered", 4.0]["kl"]["value"] > 0 == rows[UNSTEERED, 0.0]["kl"]["value"]
    assert rows["steered", 1.0]["perplexity"]["n"] == 2
    saved = json.loads((room["out"] / "steer" / "effects.json").read_text())
    assert saved["effects"][0]["measures"]["kl"] > 0
    judged = [one["measures"]["entailment"] for one in saved["effects"]]
    assert sum(one["missing"] for one in judged) == sum(
        row["missing"] for row in rows.values() if row["arm"] != UNSTEERED
    )
    lines = list(csv.DictReader((room["out"] / "radfact.csv").read_text().splitlines()))
    assert len(lines) == len(saved["effects"]) == 8
    assert lines[0]["prediction"] == saved["effects"][0]["after"]
    page = (room["out"] / "steer" / "report.html").read_text()
    assert 'data-figure="2"' in page and "entailed by the plain report" in page


def test_measures_by_hand():
    def one(study, after, kl, perplexity, judged):
        made = effect(study, study, "steered", 1.0, "A b. C d.", after, lambda _: False)
        told = None if judged is None else Entailment(judged, judged)
        return made, Measures(kl, 4.0, perplexity, told, ())

    pairs = [
        one("s1", "A b.", 0.2, 2.0, [True, None]),
        one("s2", "C d.", 0.4, 8.0, [True, False]),
        one("s3", "", None, None, None),
    ]
    plain, dose = measured_doses([e for e, _ in pairs], [m for _, m in pairs])
    assert (dose.kl.value, dose.kl.n) == (pytest.approx(0.3), 2)
    assert dose.perplexity.value == pytest.approx(4.0) and plain.perplexity.value == 4.0
    assert dose.entailed_after.value == pytest.approx(2 / 3) and dose.entailed_after.n == 3
    assert dose.missing == 2 and plain.arm == UNSTEERED and dose.box_iou is None


def test_films_on_a_page_keep_their_greys():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8)
    page = Page("One")
    key = page.film(Image.fromarray(pixels), "a film")
    page.layer("x", {key: np.array([[0.0, np.nan], [-1.0, 2.0]])})
    html = page.html("history.html", "steering", highlights=[], kinds=(), keys=[key], changes=(),
                     report=None, prior_report=None)  # fmt: skip
    stored = re.search(r"data:image/webp;base64,([^\"]+)", html)[1]
    shown = Image.open(io.BytesIO(base64.b64decode(stored))).convert("L")
    assert np.array_equal(np.asarray(shown), pixels)
    (layer,) = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])["layers"]
    assert base64.b64decode(layer["films"][key]["bytes"]) == bytes([0, 0, 0, 255])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; install the package chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def test_the_pages_in_a_browser(room, records, browser):
    """Nothing is logged, nothing leaves, and films, heat, keys and themes work."""
    problems, requests = [], []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))

    def opened(name):
        tab.goto((room["out"] / f"{name}.html").as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        assert WARNING in tab.locator("[role=alert]").inner_text()
        return tab

    for name in PAGES:
        opened(name)
        assert tab.locator(".film img").count() >= 1
        assert tab.locator(".film canvas").count() >= 1
        assert tab.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
    opened("review/review")
    pressed = tab.locator("button[aria-pressed=true]")
    assert pressed.count() == 1
    before = pressed.inner_text()
    tab.keyboard.press("n")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.layer") == "1"
    assert pressed.count() == 1 and pressed.inner_text() != before
    tab.locator(".enlarge").first.click()
    assert tab.locator("#film-dialog canvas").is_visible()
    tab.keyboard.press("Escape")
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(back)
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(back) != light
    tab.keyboard.press("t")
    assert tab.evaluate(back) == light
    tab.set_viewport_size({"width": 500, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 500
    tab.set_viewport_size({"width": 1280, "height": 900})

    opened("search/search")
    assert tab.locator(".hit").count() == len(records["search"]["hits"])
    assert tab.locator(".hit .film canvas").count() == tab.locator(".hit").count()
    opened("history/history")
    assert tab.locator(".films.two .film").count() == 2
    assert tab.locator(".highlight").count() == len(records["history"]["highlights"])
    opened("draft/draft")
    assert "draft with edits: " in tab.locator("#draft").inner_text()
    assert tab.locator("#edits li").count() == 2
    opened("steer/report")
    tab.wait_for_function("document.querySelectorAll('[data-figure][data-drawn]').length === 3")
    assert tab.locator(".study").count() == 2
    assert tab.locator("table.measures tbody tr").count() == 5
    assert tab.locator(".study mark").count() > 0
    assert problems == []
    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []


def test_a_text_dictionary_shows_no_heat():
    assert not sees_patches(
        MatryoshkaSAE(SAEConfig(32, 64, 4, site="llm.1.resid_post", policy="published"))
    )
