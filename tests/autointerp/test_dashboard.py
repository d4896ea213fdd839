"""The explorer in a real browser, its size at two thousand latents, and what it leaves out."""

import base64
import gzip
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autointerp.collect import collect
from autointerp.dashboard import grid_of, read_steering
from autointerp.explorer import Explorer, ExplorerConfig
from autointerp.film_budget import LADDER, encode, ranking, store
from autointerp.views import (
    ExplorerData,
    FilmView,
    HeatView,
    LatentLink,
    LatentView,
    ModalityView,
    ScoreView,
    SteeringView,
    TextView,
    histogram,
)
from hooks.files import ConfigError
from hooks.harvest import HarvestConfig, harvest
from hooks.html import changed_words
from maira_sae.cli import app
from sae.model import MatryoshkaSAE, SAEConfig

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror=alert(1)> \"quoted\" 'single' & שלום"
WORDS = [
    "the",
    "lungs",
    "are",
    "clear",
    ".",
    "heart",
    "size",
    "is",
    "normal",
    "left",
    "pleural",
    "effusion",
    "small",
    "right",
    "basal",
    "opacity",
    "no",
    "pneumothorax",
    "or",
    "consolidation",
    "seen",
    "stable",
    "cardiomegaly",
    "tip",
    "of",
    "the",
    "catheter",
    "projects",
    "over",
    "superior",
    "vena",
    "cava",
    "degenerative",
    "changes",
    "spine",
    "unchanged",
    "from",
    "prior",
    "mild",
    "pulmonary",
    "oedema",
]


def grey(side=16, value=90):
    return Image.fromarray(np.full((side, side), value, np.uint8))


def small():
    """Three latents whose every figure is known."""
    heat = np.zeros((2, 2))
    heat[0, 1] = 4.0
    left = LatentView(
        latent=7,
        label=f"left effusion {HOSTILE}",
        finding="effusion",
        scores=(ScoreView("detection", "report", 0.91, 0.02, 0.5, 40),),
        modalities=(
            ModalityView("frontal", 1000, 10, 4.0, {"p50": 2.0}, *histogram(np.arange(1.0, 5.0))),
            ModalityView("report", 1000, 1, 4.0, {"p50": 2.0, "p90": 3.0, "p99": 3.9}),
        ),
        heats=(HeatView("f0", heat), HeatView("f1", heat / 2)),
        texts=(TextView("s1", (" left", f" {HOSTILE}", " seen"), (1.0, 4.0, 0.0)),),
        promoted=((" effusion", 2.5),),
        suppressed=((" clear", -1.5),),
        neighbours=((8, 0.8), (99, 0.1)),
        steering=(SteeringView("added", "no effusion .", "left effusion ."),),
    )
    nodule = LatentView(
        latent=8,
        label="nodule",
        finding="nodule",
        scores=(ScoreView("detection", "report", 0.97, None, 0.6, 40),),
        modalities=(ModalityView("report", 1000, 500, 2.0),),
    )
    unnamed = LatentView(latent=9, dense=True, modalities=(ModalityView("report", 1000, 900, 2.0),))
    films = {
        "f0": FilmView(grey(), f"first {HOSTILE}", (("effusion", (0.5, 0.0, 1.0, 0.5)),)),
        "f1": FilmView(grey(), "second", grid=(0.25, 0.0, 0.75, 1.0)),
    }
    return ExplorerData(
        title=f"A page {HOSTILE}",
        subtitle="of three latents",
        origin="Made up.",
        latents=(left, nodule, unnamed),
        films=films,
        facts={"FVU": "0.1"},
        findings=(
            {"finding": "effusion", "AUROC": 0.91, "latent": LatentLink("7", "7")},
            {"finding": "nodule", "AUROC": 0.97, "latent": LatentLink("8", "8")},
        ),
        steering=(SteeringView("turned on", "no effusion .", "left effusion .", "f0"),),
    )


def many(n=2000, n_films=1200, side=1024, grid=37, per_latent=8):
    """``n`` latents of noise on films of about ``side`` pixels, with MAIRA-2's patch grid."""
    rng = np.random.default_rng(0)

    def film():
        coarse = Image.fromarray(rng.integers(0, 256, (14, 12)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), float)
        grain = rng.normal(0, 6, smooth.shape)
        return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))

    def blobs():
        y, x = np.mgrid[:grid, :grid]
        values = np.zeros((grid, grid))
        for _ in range(3):
            cy, cx, size = *rng.uniform(0, grid, 2), rng.uniform(1, grid / 8)
            values += rng.uniform(1, 8) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2))
        return np.where(values > 0.3, values, 0.0)

    def text(study, kind):
        tokens = tuple(f" {WORDS[i]}" for i in rng.integers(0, len(WORDS), 36))
        values = np.where(rng.random(36) < 0.15, rng.gamma(2, 2, 36), 0)
        return TextView(f"study-{study}", tokens, tuple(values.tolist()), "report", kind)

    # Drawing each film and map anew would take longer than what is tested.
    drawn, maps = [film() for _ in range(8)], [blobs() for _ in range(64)]
    latents = []
    for i in range(n):
        edges, counts = histogram(rng.gamma(2, 1.5, 2000))
        kinds = ["top"] * per_latent + ["random_silent"] * 4
        latents.append(
            LatentView(
                latent=i,
                label=None if i % 10 == 9 else " ".join(rng.choice(WORDS, 4)),
                finding=("effusion", "opacity", None)[i % 3],
                scores=(ScoreView("detection", "report", rng.uniform(0.5, 1), 0.02, 0.5, 40),),
                modalities=tuple(
                    ModalityView(name, 400_000, int(rng.integers(10, 9000)), edges[-1], {}, edges,
                                 counts)
                    for name in ("frontal", "lateral", "report")
                ),
                heats=tuple(
                    HeatView(f"f{f}", maps[rng.integers(64)] * rng.uniform(0.5, 1))
                    for f in rng.choice(n_films, per_latent, replace=False)
                ),
                texts=tuple(text(j, kind) for j, kind in enumerate(kinds)),
                promoted=tuple((f" {word}", 1.0) for word in WORDS[:8]),
                neighbours=tuple((int((i + d) % n), 0.9 - d / 10) for d in range(1, 6)),
            )
        )  # fmt: skip
    films = {f"f{i}": FilmView(drawn[i % 8], f"study-{i} frontal") for i in range(n_films)}
    return ExplorerData("Many latents", "of noise", "Of nobody.", tuple(latents), films)


def index_of(page):
    return json.loads(re.search(r'id="index">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; install the package chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page; at the end nothing was logged and nothing was asked of the network."""
    problems, requests = [], []

    def open_page(path, **options):
        tab = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(Path(path).as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    assert problems == []
    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert outside == []


@pytest.fixture
def tab(opened, tmp_path):
    return opened(Explorer(small()).write(tmp_path / "page.html"))


def keys(tab):
    return tab.locator(".option").evaluate_all("rows => rows.map(row => row.dataset.key)")


def shown(tab, key):
    tab.wait_for_selector(f'#detail[data-key="{key}"]')
    return tab.locator("#detail")


def test_search_sort_and_narrow(tab):
    tab.keyboard.press("2")
    assert keys(tab) == ["8", "7", "9"]  # best score first, unknown last
    tab.locator("#direction").click()
    assert keys(tab) == ["7", "8", "9"]
    tab.locator("#sort").select_option("rate")
    assert keys(tab) == ["9", "8", "7"]
    tab.locator("#sort").select_option("label")
    assert keys(tab) == ["7", "8", "9"]
    tab.locator("#search").fill("NODULE")
    assert keys(tab) == ["8"]
    tab.locator("#search").fill("effusion left")  # words in any order, in label and tokens
    assert keys(tab) == ["7"]
    tab.locator("#search").fill("nothing like it")
    assert keys(tab) == []
    tab.get_by_role("button", name="Clear the search").click()
    assert len(keys(tab)) == 3
    tab.locator("#labelled").check()
    assert keys(tab) == ["7", "8"]
    tab.locator("#labelled").uncheck()
    tab.locator("#sparse").check()
    assert keys(tab) == ["7", "8"]
    tab.locator("#sparse").uncheck()
    tab.locator("#modality").select_option("frontal")
    assert keys(tab) == ["7"]
    tab.locator("#modality").select_option("")
    tab.locator("#finding").select_option("nodule")
    assert keys(tab) == ["8"]


def test_a_latent_shows_its_heat_text_tokens_and_neighbours(tab):
    tab.keyboard.press("2")
    tab.locator('.option[data-key="7"]').click()
    detail = shown(tab, "7")
    assert HOSTILE in detail.locator("h2").inner_text()

    # Only the patch that fires is drawn; of the film it is half as strong on, it is still visible.
    # A copy is read, since the browser remarks on canvases of the page that are read back.
    pixels = """canvas => {
        const copy = new OffscreenCanvas(2, 2).getContext("2d", {willReadFrequently: true});
        copy.drawImage(canvas, 0, 0);
        return [...copy.getImageData(0, 0, 2, 2).data];
    }"""
    first, second = (one.evaluate(pixels) for one in detail.locator("canvas").all())
    assert first[3::4] == [0, 255, 0, 0]
    assert second[3::4] == [0, pytest.approx(90 + 165 / 2, abs=2), 0, 0]
    assert first[4:7] == [253, 231, 37]  # the end of viridis
    canvas = detail.locator("canvas").first

    # The heat lies on the part of the film that the model saw.
    film, grid = detail.locator(".film").nth(1), detail.locator(".film .grid").nth(1)
    whole, part = film.bounding_box(), grid.bounding_box()
    assert part["width"] / whole["width"] == pytest.approx(0.5, abs=0.01)
    assert (part["x"] - whole["x"]) / whole["width"] == pytest.approx(0.25, abs=0.01)
    # Nothing changes the film's greys.
    styles = "node => [getComputedStyle(node).filter, getComputedStyle(node).mixBlendMode]"
    assert detail.locator(".film img").first.evaluate(styles) == ["none", "normal"]

    detail.locator("input.opacity").fill("20")
    assert canvas.evaluate("node => getComputedStyle(node).opacity") == "0.2"
    assert detail.locator(".box").first.is_visible()
    detail.locator("input.boxes").uncheck()
    assert not detail.locator(".box").first.is_visible()
    canvas.hover(position={"x": 100, "y": 10})
    assert "row 1, column 2: 4.00" in detail.locator(".card").first.inner_text()

    marks = detail.locator(".excerpt mark")
    assert marks.all_inner_texts() == ["left", HOSTILE]
    assert [mark.get_attribute("title") for mark in marks.all()] == ["1.00", "4.00"]
    assert detail.locator(".excerpt .report").inner_text().endswith("seen")
    assert "␣effusion" in detail.locator(".tokens").first.inner_text()
    assert detail.locator(".change mark").all_inner_texts() == ["no", "left"]
    assert "0.91" in detail.locator(".scores").inner_text()
    assert "0.50" in detail.locator(".scores").inner_text()
    tab.wait_for_function("document.querySelectorAll('.chart[data-drawn]').length >= 2")
    assert "not in this page" in detail.locator(".neighbours").inner_text()
    detail.locator('.neighbours [data-key="8"]').click()
    shown(tab, "8")


def test_keys(tab):
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.keyboard.type("nod")
    assert keys(tab) == ["8"]
    tab.keyboard.press("Enter")
    shown(tab, "8")
    tab.keyboard.press("Escape")
    assert len(keys(tab)) == 3
    tab.keyboard.press("ArrowDown")
    shown(tab, "7")
    tab.keyboard.press("ArrowLeft")
    shown(tab, "8")
    tab.keyboard.press("ArrowRight")
    shown(tab, "7")
    before = tab.evaluate("document.body.style.getPropertyValue('--heat')")
    tab.keyboard.press("]")
    assert tab.evaluate("document.body.style.getPropertyValue('--heat')") > before
    tab.keyboard.press("b")
    assert tab.evaluate("document.body.classList.contains('no-boxes')")
    tab.keyboard.press("?")
    assert tab.locator("#help").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("#help").is_visible()
    tab.locator(".card button").first.click()
    assert "film 1 of 2" in tab.locator("#film-dialog").inner_text()
    tab.keyboard.press("ArrowRight")
    assert "film 2 of 2" in tab.locator("#film-dialog").inner_text()
    tab.keyboard.press("Escape")
    tab.keyboard.press("1")
    assert tab.locator("#overview").is_visible()


def test_findings_steering_and_themes(tab):
    names = tab.locator("#findings th")
    assert names.all_inner_texts() == ["effusion", "nodule"]
    tab.get_by_role("button", name="AUROC").click()
    assert names.all_inner_texts() == ["nodule", "effusion"]
    tab.locator('#findings [data-key="7"]').click()
    shown(tab, "7")
    tab.keyboard.press("3")
    assert tab.locator("#steering mark").all_inner_texts() == ["no", "left"]
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(back)
    tab.emulate_media(color_scheme="dark")
    dark = tab.evaluate(back)
    assert dark != light
    tab.keyboard.press("t")
    assert tab.evaluate(back) == light
    tab.keyboard.press("t")
    assert tab.evaluate(back) == dark
    assert tab.title() == f"A page {HOSTILE}"
    assert tab.locator("#banner").inner_text() == (
        "This page holds 2 films and text from 1 study. Made up."
    )


def test_every_colour_of_words_can_be_read(tab):
    """WCAG's contrast of 4.5 between words and ground, in both themes."""
    measure = """() => {
        const probe = document.createElement("i");
        document.body.append(probe);
        const light = name => {
            probe.style.color = `var(${name})`;
            const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const worst = Math.min(...["--ink", "--soft", "--accent"].flatMap(word =>
            ["--back", "--card"].map(ground => ratio(light(word), light(ground)))));
        return Math.min(worst, ratio(light("--soft"), light("--sunk")));
    }"""
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(measure) >= 4.5


def test_narrow_windows_show_list_or_latent(opened, tmp_path):
    path = Explorer(small()).write(tmp_path / "page.html")
    tab = opened(path, viewport={"width": 800, "height": 900})
    tab.keyboard.press("2")
    assert tab.locator("#list").is_visible()
    tab.locator('.option[data-key="8"]').click()
    shown(tab, "8")
    assert not tab.locator("#list").is_visible()
    tab.keyboard.press("Escape")
    assert tab.locator("#list").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 800


def test_two_thousand_latents_fit_and_open_in_time(opened, tmp_path):
    path = Explorer(many()).write(tmp_path / "page.html")
    size = path.stat().st_size
    assert 15e6 < size < 20e6  # the room is used, and not exceeded
    tab = opened(path)
    ready = tab.evaluate("performance.getEntriesByName('ready')[0].startTime")
    assert ready < 2000
    tab.keyboard.press("2")
    assert tab.locator(".option").count() < 60  # only rows in sight exist
    tab.locator("#sort").select_option("latent")
    tab.locator("#list").evaluate("list => { list.scrollTop = 1999 * 58; }")
    tab.locator('.option[data-key="1999"]').click()
    assert shown(tab, "1999").locator("canvas").count() > 0


def test_in_a_notebook_the_page_lives_in_a_frame(browser, tmp_path):
    frame = Explorer(small())._repr_html_()
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}", encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(notebook.as_uri())
    inside = tab.frame_locator("iframe")
    inside.locator("#tab-latents").click()
    inside.locator('.option[data-key="7"]').click()
    assert HOSTILE in inside.locator("#detail h2").inner_text()
    inside.locator("#theme").click()
    assert problems == []


def test_films_and_words_can_be_left_out():
    data = small()
    without = Explorer(data, ExplorerConfig(text=False, films=False)).html()
    assert "data:image" not in without
    index = index_of(without)
    assert index["holds"]["banner"] == "This page holds no films and no report text."
    assert [film["caption"] for film in index["films"]] == ["film 1", "film 2"]
    assert index["steering"] == []
    packed = re.findall(r'id="chunk-\d+">(.*?)</script>', without)
    details = "".join(gzip.decompress(base64.b64decode(chunk)).decode() for chunk in packed)
    assert '"s1"' not in details
    assert "no effusion" not in details
    assert HOSTILE.split()[0] not in without.replace("</script>\n", "")
    with_words = Explorer(data, ExplorerConfig(films=False)).html()
    assert "text from 1 study" in index_of(with_words)["holds"]["banner"]


def test_a_page_that_cannot_fit_says_so():
    with pytest.raises(ConfigError, match="choose fewer latents or raise the limit"):
        Explorer(small(), ExplorerConfig(max_bytes=1_000_000)).html()


def test_films_fill_the_room_in_the_best_way():
    rng = np.random.default_rng(0)
    noise = {
        f"f{i}": FilmView(Image.fromarray(rng.integers(0, 256, (64, 64)).astype(np.uint8)), "")
        for i in range(6)
    }
    wanted = [["f0", "f1"], ["f0", "f2"], ["f3"], ["f4", "f5"]]
    everything = store(noise, wanted, 10_000_000)
    assert everything.rung == LADDER[0]
    assert everything.left_out == 0
    one = len(encode(noise["f0"].image, LADDER[-1]).url)
    few = store(noise, wanted, int(2.5 * one))
    assert list(few.films) == ["f0", "f3"]  # they show three of four latents
    assert few.left_out == 4
    assert ranking(wanted)[:3] == ["f0", "f3", "f4"]


def test_a_film_at_the_best_rung_keeps_every_grey():
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (40, 30)).astype(np.uint8)
    url = encode(Image.fromarray(pixels), LADDER[0]).url
    again = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert np.array_equal(np.asarray(again.convert("L")), pixels)


def test_the_grid_of_a_cropped_film():
    assert grid_of(100, 100, 50) == (0, 0, 1, 1)
    assert grid_of(100, 200, 50) == (0, 0.25, 1, 0.75)


def test_changed_words_and_histograms():
    before, after = changed_words("the heart is normal .", "the heart is enlarged .")
    assert [word for word, new in before if new] == ["normal"]
    assert [word for word, new in after if new] == ["enlarged"]
    assert histogram(np.zeros(3)) == ((), ())


def test_records_are_checked():
    data = small()
    with pytest.raises(ConfigError, match="latent '7' is there twice"):
        replace(data, latents=(data.latents[0], data.latents[0]))
    with pytest.raises(ConfigError, match="on film 'f0', which is not among"):
        replace(data, films={})
    with pytest.raises(ConfigError, match="give one activation a token"):
        TextView("s", ("a",), ())


def test_steering_lines(tmp_path):
    path = tmp_path / "steering.jsonl"
    line = {"latent": 7, "before": "a", "after": "b", "mode": "add", "strength": 2.0}
    path.write_text(json.dumps(line) + "\n")
    assert read_steering(path)[7][0].title == "add · 2.0"
    path.write_text('{"latent": 7}\n')
    with pytest.raises(ConfigError, match=r"line 1 of .* is no record of steering"):
        read_steering(path)


def test_the_command_makes_a_page_of_a_features_folder(
    model, processor, checkpoint, studies, studies_folder, tmp_path
):
    """Heat, films, text, neighbours and logits are those of the folder, the SAE and the model."""
    site = "llm.1.resid_post"
    acts = harvest(model, processor, studies, HarvestConfig((site,), policy="all"), tmp_path / "a")
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=site, policy="all"))
    with torch.no_grad():
        sae.threshold.fill_(0.3)  # at 0 an untrained dictionary is dense
    sae.save(tmp_path / "sae", {})
    features = collect(sae, acts, None, tmp_path / "features", studies)
    latent = next(i for i in features.alive() if features.examples(i, "frontal", "top"))
    line = {"latent": latent, "before": "a b", "after": "a c", "study": "s0"}
    (tmp_path / "steering.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "page.html"
    main_of(
        *("dashboard", tmp_path / "features", "--studies", studies_folder, "--model", checkpoint),
        *("--sae", tmp_path / "sae", "--logits", "--steering", tmp_path / "steering.jsonl"),
        *("--latents", latent, "--out", out),
    )
    page = out.read_text()
    index = index_of(page)
    assert index["latents"]["key"] == [str(latent)]
    assert "They may be of patients" in index["origin"]
    packed = re.search(r'id="chunk-0">(.*?)</script>', page)[1]
    shown = json.loads(gzip.decompress(base64.b64decode(packed)))[0]

    strongest = max(
        (one for one in features.examples(latent, kind="top") if one.patch_shape),
        key=lambda one: one.peak,
    )
    heat = shown["heats"][0]
    assert heat["peak"] == pytest.approx(strongest.peak)
    values = np.nan_to_num(np.array(strongest.values))
    steps = np.frombuffer(base64.b64decode(heat["bytes"]), np.uint8)
    assert np.abs(steps / 255 * shown["heat_top"] - values).max() <= shown["heat_top"] / 255
    assert index["films"][heat["film"]]["caption"] == strongest.study
    assert index["films"][heat["film"]]["stored"] is not None

    text = shown["texts"][0]
    known = next(s for s in studies if s.id == text["study"])
    if text["modality"] == "report":
        assert "".join(text["tokens"]).strip() in " ".join(known.report.split())
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    key, cosine = shown["neighbours"][0]
    assert float(directions[latent] @ directions[int(key)]) == pytest.approx(cosine, abs=1e-3)
    assert len(shown["promoted"]) == 10
    assert shown["steering"][0]["after"] == [["a", False], ["c", True]]
    for name, stats in features.stats(latent).items():
        own = next(one for one in shown["modalities"] if one["modality"] == name)
        assert (own["n_rows"], own["n_fired"]) == (stats.n_rows, stats.n_fired)

    main_of("dashboard", tmp_path / "features", "--no-text", "--no-films", "--out", out)
    bare = out.read_text()
    assert "no films and no report text" in bare
    packed = "".join(
        gzip.decompress(base64.b64decode(chunk)).decode()
        for chunk in re.findall(r'id="chunk-\d+">(.*?)</script>', bare)
    )
    assert not [study.id for study in studies if f'"{study.id}"' in packed + bare]


def main_of(*arguments):
    app([str(one) for one in arguments], standalone_mode=False)
