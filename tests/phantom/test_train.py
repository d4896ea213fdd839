"""Training: what each stage touches, that a seed decides it, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from phantom import PhantomError, encoder
from phantom import train as training
from phantom.corpus import EASY, easy, make_corpus, mixed, normalised
from phantom.encoder import EncoderConfig, Reader
from phantom.model import build, load, processor
from phantom.reports import read_report
from phantom.score import _f1, _seen, write_reports
from phantom.train import QUICK, Pass, PhantomTrainConfig, train, train_language


def ignore(_):
    pass


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(range(60), mixed)


def test_a_corpus_does_not_depend_on_its_workers(corpus):
    alone = make_corpus(range(60), mixed, workers=1)
    for name in ("pixels", "coverage", "boxes", "states"):
        assert np.array_equal(getattr(alone, name), getattr(corpus, name))
    for one, two in zip(alone.examples, corpus.examples, strict=True):
        assert np.array_equal(one.ids, two.ids)
        assert (one.prompt, one.films) == (two.prompt, two.films)
    assert sum(len(example.films) for example in corpus.examples) == len(corpus.pixels)


def test_the_encoder_stage_touches_the_encoder_only(corpus):
    model, words = build(0), processor()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tower = model.model.vision_tower
    encoder.initialise(tower, normalised(corpus.pixels[:40], words))
    config = EncoderConfig(steps=2, batch=4)
    encoder.train_encoder(tower, Reader(128), corpus, words, config, ignore)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all(name.startswith("model.vision_tower.") for name in changed)


def test_the_language_stage_leaves_the_encoder_alone(corpus):
    model, words = build(0), processor()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = encoder.encode(model.model.vision_tower, corpus.pixels, words)
    config = PhantomTrainConfig(batch=4)
    train_language(model, corpus.examples, features, Pass(2, 1e-3), config, ignore)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert "lm_head.weight" in changed


def test_training_by_features_is_the_model_itself(corpus):
    """The language stage's logits are those of the whole model on films."""
    model, words = build(0).eval(), processor()
    example = corpus.examples[0]
    films = list(example.films)
    ids = torch.from_numpy(example.ids)[None]
    with torch.no_grad():
        pixels = normalised(corpus.pixels[films], words)
        whole = model(input_ids=ids, pixel_values=pixels).logits
        features = encoder.encode(model.model.vision_tower, corpus.pixels[films], words).float()
        core = model.model
        embedded = core.language_model.embed_tokens(ids)
        where = (ids == model.config.image_token_index)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(where, core.multi_modal_projector(features))
        parts = model.lm_head(core.language_model(inputs_embeds=embedded).last_hidden_state)
    assert torch.allclose(whole, parts, atol=2e-3)  # features are kept in half precision


def test_a_bad_encoder_stops_the_run(tmp_path):
    config = replace(QUICK, n_studies=40, encoder=EncoderConfig(steps=1, batch=4), gate=0.99)
    with pytest.raises(PhantomError, match=r"the encoder reads .* below F1 0.99; train it longer"):
        train(config, tmp_path / "w", easy)
    assert not (tmp_path / "w").exists()


def test_quick_training_reads_three_easy_findings(tmp_path, monkeypatch):
    """Two minutes from nothing; the floor that `--quick` promises."""
    training.main(["--quick", "--out", str(tmp_path)])
    model, words = load(tmp_path)
    studies = [easy(seed) for seed in range(100)]
    said = [read_report(text) for text in write_reports(model, words, studies)]
    f1 = _f1(_seen(studies), _seen(said))
    assert min(f1[label] for label in EASY) >= training.QUICK_FLOOR, f1
