"""What objects show of themselves in a notebook."""

from html.parser import HTMLParser

import pytest
from PIL import Image

from hooks import HarvestConfig, Study, harvest
from hooks.html import facts, marked, picture
from phantom import write_studies
from phantom.model import load
from sae import MatryoshkaSAE, SAEConfig, measure
from steering import Comparison, References


class Balanced(HTMLParser):
    """Fails on an element that is closed in the wrong place, and keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images = [], "", 0

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images += 1
            assert dict(attrs)["src"].startswith("data:image/png")
            assert dict(attrs)["alt"]
        elif tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    studies = write_studies(folder / "studies", range(3))
    model, processor = load()
    config = HarvestConfig(("llm.3.resid_post",))
    return studies, harvest(model, processor, studies, config, folder / "acts")


def test_a_study_shows_its_films_and_its_report(harvested):
    study = harvested[0][0]
    shown = read(study._repr_html_())
    assert shown.images == len(study.films())
    assert study.report in shown.text
    assert all(label in shown.text for label in study.labels)


def test_a_film_that_is_missing_is_said_not_raised(tmp_path):
    shown = read(Study(id="s", frontal=tmp_path / "none.png", report="Clear.")._repr_html_())
    assert shown.images == 0
    assert "none.png" in shown.text
    assert "Clear." in shown.text


def test_a_folder_shows_its_roles(harvested):
    acts = harvested[1]
    shown = read(acts._repr_html_())
    assert f"{acts.n_tokens:,}" in shown.text
    assert "llm.3.resid_post (128 wide)" in shown.text
    for role in ("clinical", "report"):
        n = int((acts.column("role") == role).sum())
        assert f"{role}{n}" in shown.text.replace("\n", "")


def test_dictionary_quality_and_references(harvested):
    acts = harvested[1]
    sae = MatryoshkaSAE(SAEConfig(128, 64, 4, (64,), site="llm.3.resid_post"), seed=0)
    assert "llm.3.resid_post" in read(sae._repr_html_()).text
    quality = measure(sae, acts, "llm.3.resid_post", acts.heldout(1.0))
    assert f"{quality.l0:.4g}" in read(quality._repr_html_()).text
    references = References("llm.3.resid_post", 0.99, {5: {"all": 2.5}}, {"all": 10})
    assert "all 2.5" in read(references._repr_html_()).text


def test_a_comparison_marks_what_changed():
    html = Comparison("no effusion .", "left effusion .")._repr_html_()
    read(html)
    assert html.count("<mark>") == 2
    assert "<mark>left</mark> effusion ." in html


def test_every_public_object_says_what_it_is(tmp_path):
    """Short enough to read, and with the fact a person looks for."""
    from autointerp.collect import collect
    from phantom import tour
    from steering import Edit, Positions

    features = collect(tour.dictionary(), tour.activations(), None, tmp_path / "f", tour.studies())
    latent = features.alive()[0]
    example = features.examples(latent)[0]
    shown = {
        repr(tour.activations()): "llm.3.resid_post",
        repr(tour.dictionary()): "n_latents=256",
        repr(features): "256 latents",
        repr(example): f"latent {latent}, ",
        repr(features.stats(latent)): "n_fired",
        repr(Edit(3, mode="ablate")): "ablate",
        repr(Positions(generated=True)): "generated=True",
        repr(Comparison("no effusion .", "left effusion .")): "before='no effusion .'",
        repr(Study(id="s", frontal=tmp_path / "f.png")): "id='s'",
    }
    for text, fact in shown.items():
        assert fact in text
        assert len(text) < 1500
    for one in (features, example):
        assert "256" in read(one._repr_html_()).text or str(latent) in one._repr_html_()
    film = example._replace(patch_shape=(2, 2), values=[0.0, 1.0, float("nan"), 2.0], peak=2.0)
    assert read(film._repr_html_()).images == 1


def test_text_is_never_markup():
    hostile = "</td><script>alert(1)</script>"
    for html in (
        facts(hostile, {hostile: hostile, "list": [hostile]}),
        marked([(hostile, True)]),
        picture(Image.new("L", (4, 4)), hostile),
    ):
        assert "<script" not in html
        read(html)
