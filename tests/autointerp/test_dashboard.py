"""The page, in a real browser: it sorts, searches and draws, and asks nothing of the network."""

import shutil

import numpy as np
import pytest
from PIL import Image

from autointerp.dashboard import (
    ConceptView,
    FilmView,
    Page,
    SteeringView,
    TextView,
    changed_words,
    data_url,
    heat,
    strongest,
    write_page,
)

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def example_page():
    film = data_url(Image.fromarray(np.full((16, 16), 90, np.uint8)))
    activations = np.zeros((2, 2))
    activations[0, 1] = 4.0
    left = ConceptView(
        "left effusion",
        {"auroc": 0.91, "label": "left </script><b>effusion"},
        [FilmView(film, heat(activations, 4.0), "first", (0.5, 0.0, 1.0, 0.5))],
        [TextView("s1", ["left", "effusion"], [0.2, 1.0])],
    )
    nodule = ConceptView("nodule", {"auroc": 0.97, "label": None})
    steering = SteeringView("effusion turned on", film, "no effusion .", "left effusion .")
    return Page("A page", "of two concepts", {"FVU": "0.1"}, [left, nodule], [steering])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; install the package chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def test_the_page_in_a_browser(browser, tmp_path):
    path = write_page(example_page(), tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 1200, "height": 1400})
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())

    def names():
        return tab.locator("#rows a").all_inner_texts()

    assert tab.title() == "A page"
    assert names() == ["left effusion", "nodule"]
    assert tab.locator("#rows tr").first.locator("td").all_inner_texts() == [
        "left effusion",
        "0.910",
        "left </script><b>effusion",
    ]
    auroc = tab.get_by_role("button", name="auroc")
    auroc.click()
    assert names() == ["nodule", "left effusion"]
    auroc.click()
    assert names() == ["left effusion", "nodule"]
    tab.locator("#search").fill("NODULE")
    assert names() == ["nodule"]
    tab.locator("#search").fill("")

    # Only the patch that fires is drawn, at full strength.
    pixels = """canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, 2, 2).data;
        return [0, 1, 2, 3].map(i => data[4 * i + 3]);
    }"""
    canvas = tab.locator("canvas").first
    assert canvas.evaluate(pixels) == [0, 255, 0, 0]
    tab.locator("#opacity").fill("20")
    assert canvas.evaluate("node => getComputedStyle(node).opacity") == "0.2"
    assert tab.locator(".box").first.is_visible()
    tab.locator("#boxes").uncheck()
    assert not tab.locator(".box").first.is_visible()
    marked = tab.locator("#steering mark").all_inner_texts()
    assert marked == ["no", "left"]

    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_heat_is_a_share_of_the_reference():
    assert heat(np.array([[0.0, 1.0], [2.0, 3.0]]), 2.0) == [[0.0, 0.5], [1.0, 1.5]]
    assert heat(np.ones((1, 2)), 0.0) == [[0.0, 0.0]]


def test_changed_words_and_strongest():
    before, after = changed_words("the heart is normal .", "the heart is enlarged .")
    assert [word for word, new in before if new] == ["normal"]
    assert [word for word, new in after if new] == ["enlarged"]
    assert strongest([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]
