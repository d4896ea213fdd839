"""The mini model's shape and language, and the shipped checkpoint."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hooks.grounding import TOKENS, parse_grounded
from hooks.maira2 import Maira2ForConditionalGeneration
from hooks.roles import Role
from phantom import LABELS, sample_study, vocabulary
from phantom.model import WEIGHTS, build, load, processor
from phantom.score import score
from phantom.train import LOSSES


@pytest.fixture(scope="module")
def words():
    return processor()


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.mark.parametrize("views", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("grounded", [False, True])
def test_every_prompt_and_report_is_in_the_vocabulary(words, views, grounded):
    lateral, prior = views
    for seed in range(20):
        study = sample_study(seed, lateral=lateral, prior=prior)
        report = study.report.grounded if grounded else study.report.findings
        tokens = words.tokenize_reporting(
            has_lateral=lateral,
            has_prior=prior,
            indication=study.report.indication,
            technique=study.report.technique,
            comparison=study.report.comparison,
            grounded=grounded,
            assistant_text=report,
        )
        assert words.tokenizer.unk_token_id not in tokens.ids
        assert tokens.ids[-1] == words.tokenizer.eos_token_id
        assert (
            words.tokenizer.decode(tokens.ids[tokens.of_role(Role.REPORT, Role.GROUNDING)])
            == report
        )
        assert (tokens.role == Role.IMAGE).sum() == 64 * len(study.films())
        if grounded:
            assert all(phrase.text for phrase in parse_grounded(report))


def test_the_vocabulary_is_the_reports_and_prompts(words):
    size = len(words.tokenizer)
    assert set(TOKENS) | set(vocabulary()) <= set(words.tokenizer.get_vocab())
    assert size < 450


def test_the_same_seed_builds_the_same_model():
    one, two, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_shipped_weights_are_small_and_in_the_released_layout():
    files = list(WEIGHTS.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 12_000_000
    with safe_open(files[0], "pt") as weights:
        tops = {name.split(".")[0] for name in weights.keys()}  # noqa: SIM118
    assert tops == {"language_model", "multi_modal_projector", "vision_tower"}


def test_shipped_weights_load_through_the_ordinary_loader(shipped):
    model, words = shipped
    assert isinstance(model, Maira2ForConditionalGeneration)
    assert not model.training
    assert len(words.tokenizer) == model.config.text_config.vocab_size
    fresh = processor().tokenizer
    assert fresh.get_vocab() == words.tokenizer.get_vocab()


def test_the_record_beside_the_weights_says_which_losses_ran():
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert record["losses"] == LOSSES
    for loss in record["losses"]["language"]:
        assert "label" not in loss and "finding" not in loss
    for loss in record["losses"]["encoder"]:
        assert loss.endswith("(vision_tower)")
    assert {point["stage"] for point in record["curve"]} == {"encoder", "language"}


def test_shipped_model_reads_its_films(shipped):
    """A small sample of what RESULTS.md measures on a thousand studies."""
    result = score(*shipped, n=96, seed=7)
    f1 = np.array([result.f1[label] for label in LABELS])
    blind = np.array([result.shuffled_f1[label] for label in LABELS])
    assert f1.mean() > 0.93
    assert blind.mean() < 0.5
    assert result.box_iou > 0.5
    assert result.change_accuracy > 0.8
    assert result.unread < 0.2
