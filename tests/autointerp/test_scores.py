"""Scores whose value is known beforehand."""

import numpy as np
import pytest

from autointerp.agreement import agreement
from autointerp.scores import (
    Score,
    Verdict,
    judge,
    other_labels,
    probability_of_yes,
    read_scores,
    write_scores,
)
from hooks.files import ConfigError


def verdicts(answer, n=100, positives=10, probability=None):
    """What a labeller says of examples that are positive one time in ten."""
    made = []
    for i in range(n):
        truth = i < positives
        p = None if probability is None else probability(truth, i)
        made.append(Verdict(f"p{i}", truth, answer(truth, i), p))
    return made


@pytest.mark.parametrize("said", [True, False])
def test_one_answer_to_everything_is_at_chance_however_rare_the_positives(said):
    score = judge(1, "detection", "report", verdicts(lambda truth, i: said))
    assert (score.value, score.auroc, score.coverage) == (0.5, 0.5, 1.0)


def test_the_right_answer_is_one_and_the_wrong_one_nought():
    assert judge(1, "detection", "report", verdicts(lambda truth, i: truth)).value == 1
    assert judge(1, "detection", "report", verdicts(lambda truth, i: not truth)).value == 0


def test_what_did_not_come_is_missing_and_not_a_no():
    half = verdicts(lambda truth, i: truth if i % 2 else None)
    score = judge(1, "fuzzing", "report", half)
    assert (score.value, score.coverage, score.n) == (1.0, 0.5, 50)
    none = judge(1, "fuzzing", "report", verdicts(lambda truth, i: None))
    assert (none.value, none.auroc, none.coverage, none.n) == (None, None, 0.0, 0)
    assert judge(1, "fuzzing", "report", []).coverage == 0.0
    lost = judge(1, "fuzzing", "report", verdicts(lambda truth, i: None if truth else False))
    assert lost.value is None and lost.coverage == 0.9


def test_probabilities_rank_what_answers_cannot():
    sure = verdicts(lambda truth, i: True, probability=lambda truth, i: 0.9 if truth else 0.6)
    score = judge(1, "detection", "report", sure)
    assert (score.value, score.auroc) == (0.5, 1.0)


def test_copies_of_a_patient_do_not_make_the_error_smaller():
    rng = np.random.default_rng(0)
    one = [Verdict(f"p{i}", i % 2 == 0, bool(rng.random() < 0.5)) for i in range(80)]
    error = judge(1, "detection", "report", one).standard_error
    assert judge(1, "detection", "report", one * 5).standard_error == pytest.approx(error)
    assert error == pytest.approx(0.5 / 80**0.5, rel=0.2)
    alone = [Verdict("p", truth, truth) for truth in (True, False)]
    assert judge(1, "detection", "report", alone).standard_error is None


def test_the_probability_of_yes_is_among_yes_and_no():
    shares = {"Yes": 0.3, " yes": 0.3, "No": 0.2, "Maybe": 0.2}
    top = {token: np.log(share) for token, share in shares.items()}
    assert probability_of_yes([top]) == pytest.approx(0.75)
    assert probability_of_yes([{"**": 0.0}, top, {"No": 0.0}]) == pytest.approx(0.75)
    assert probability_of_yes([{"Maybe": 0.0}]) is probability_of_yes(None) is None


def test_another_label_never_says_the_same():
    labels = {1: "nodule", 2: "Nodule", 3: "tube", 4: None}
    assert other_labels(labels) == {1: "tube", 2: "tube", 3: other_labels(labels)[3]}
    assert other_labels(labels)[3] in ("nodule", "Nodule")
    assert other_labels({1: "nodule"}) == {1: None}


def test_scores_come_back_as_they_were_written(tmp_path):
    scores = [judge(1, "detection", "report", verdicts(lambda truth, i: truth))]
    write_scores(scores, tmp_path / "scores")
    assert read_scores(tmp_path / "scores") == scores
    with pytest.raises(ConfigError, match="unknown"):
        Score(1, "guess", "report", None, None, None, None, 0.0, 0, 0)


def test_agreement_of_a_latent_that_knows_and_of_one_that_does_not():
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.2
    patients = [f"p{i // 2}" for i in range(400)]
    heldout = np.arange(400) // 2 % 2 == 0
    knows = labels + rng.random(400) * 0.5
    found = agreement(3, "report", "Nodule", knows, labels, patients, heldout)
    assert found.score.value == found.f1 == 1.0
    assert 0.35 < found.score.baseline < 0.65
    idle = agreement(3, "report", "Nodule", np.zeros(400), labels, patients, heldout)
    assert idle.score.value == 0.5
    some = np.where(np.arange(400) % 4 == 0, np.nan, knows)
    lost = agreement(3, "report", "Nodule", some, labels, patients, heldout)
    assert (lost.score.value, lost.score.coverage, lost.score.n) == (1.0, 0.5, 100)


def test_the_threshold_is_of_other_patients():
    labels = np.array([True, False] * 20)
    heldout = np.arange(40) < 20
    maxima = np.where(labels, 2.0, 1.0)
    maxima[:20] *= 10  # held-out studies lie above any threshold of the others
    patients = [f"p{i}" for i in range(40)]
    found = agreement(0, "report", "Nodule", maxima, labels, patients, heldout)
    assert found.threshold == 1.5 and found.score.value == 1.0
    assert found.f1 == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match="both sides"):
        agreement(0, "report", "Nodule", maxima, labels, ["p"] * 40, heldout)
    with pytest.raises(ConfigError, match="carry 'Nodule'"):
        agreement(0, "report", "Nodule", maxima, labels & ~heldout, patients, heldout)
