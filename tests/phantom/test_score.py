"""Scores of reports whose errors are known."""

import numpy as np
import pytest

from phantom import LABELS, Box, PhantomError, sample_study
from phantom import score as scoring
from phantom.score import overlap, score, shuffled


def with_reports(monkeypatch, write):
    """Score a model that writes ``write(study, films_of, grounded)``."""

    def reports(model, words, studies, *, grounded=False, films_of=None):
        shown = studies if films_of is None else films_of
        return [write(study, grounded) for study in shown]

    monkeypatch.setattr(scoring, "write_reports", reports)
    return score(None, None, n=240, seed=3)


def truth(study, grounded):
    return study.report.grounded if grounded else study.report.findings


def test_a_perfect_reader_scores_one_and_by_chance_without_its_films(monkeypatch):
    result = with_reports(monkeypatch, truth)
    assert set(result.f1.values()) == {1.0}
    assert result.change_accuracy == result.state_accuracy == 1.0
    assert result.box_iou > 0.85  # bins of a hundredth
    assert result.unread == 0
    gaps = [result.shuffled_f1[label] - result.chance_f1[label] for label in LABELS]
    assert abs(np.mean(gaps)) < 0.03
    assert max(result.shuffled_f1.values()) < 0.6


def test_saying_nothing_scores_zero(monkeypatch):
    result = with_reports(monkeypatch, lambda study, grounded: "no acute abnormality .")
    assert set(result.f1.values()) == {0.0}
    assert result.change_accuracy == 0.0
    assert np.isnan(result.box_iou)


def test_nonsense_is_counted(monkeypatch):
    result = with_reports(monkeypatch, lambda study, grounded: "the moon is full . left left")
    assert result.unread == 2.0


def test_the_wrong_side_is_wrong(monkeypatch):
    def mirrored(study, grounded):
        swap = {"left": "right", "right": "left"}
        return " ".join(swap.get(word, word) for word in truth(study, grounded).split())

    result = with_reports(monkeypatch, mirrored)
    assert result.f1["cardiomegaly"] == 1.0
    assert result.f1["effusion_left"] < 0.6


def test_shuffling_keeps_the_views_and_moves_every_study():
    studies = [sample_study(seed) for seed in range(40)]
    others = shuffled(studies)
    assert sorted(study.seed for study in others) == list(range(40))
    for study, other in zip(studies, others, strict=True):
        assert len(study.films()) == len(other.films())
        assert (study.prior is None) == (other.prior is None)
        assert study.seed != other.seed


def test_overlap_of_boxes():
    assert overlap(Box(0, 0, 0.5, 0.5), Box(0, 0, 0.5, 0.5)) == 1
    assert overlap(Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)) == 0
    assert overlap(Box(0, 0, 0.4, 0.4), Box(0.2, 0, 0.6, 0.4)) == pytest.approx(1 / 3)


def test_too_few_studies():
    with pytest.raises(PhantomError, match="3 studies asked for; give 30"):
        score(None, None, n=3)
