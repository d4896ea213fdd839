"""Operating points of latents whose concept holds above a known activation, over real HTTP."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from autointerp import LabelConfig, Words, detection_scores, label_latents
from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import questions
from autointerp.features import Example
from autointerp.labellers import Llm
from autointerp.labelling import fuzzing_scores
from autointerp.operating import Offer, calibrate, operating_point
from autointerp.scores import Verdict
from hooks.files import ConfigError
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, serving

UPPER, LOWER, OFF = "left upper nodule .", "left lower nodule .", "heart size is normal ."


class Vocabulary:
    known = tuple(dict.fromkeys(f"{UPPER} {LOWER} {OFF}".split()))

    def decode(self, ids, **_):
        return " ".join(self.known[i] for i in ids)


def example(side, i, text, peak, patient=None):
    ids = [Vocabulary.known.index(word) for word in text.split()]
    values = [float(peak)] * len(ids)
    return Example(
        *(0, "report", "top" if peak else "random_silent", side, f"s{i}", patient or f"{side}{i}"),
        *(i, None, 0, ids, values, float(peak), 0, (0, len(ids) - 1), None),
    )


class Graded:
    """A latent about lower nodules, weakly on for upper ones and barely for the heart."""

    site, manifest = "llm.1.resid_post", {"files": {}}

    def __init__(self, swapped=()):
        kinds = ((LOWER, 10), (LOWER, 9), (LOWER, 8), (UPPER, 4), (UPPER, 5), (OFF, 1), (OFF, 0))
        self.all = [
            example(side, i, text, (0.0 if side in swapped and peak > 7 else peak))
            for side in ("explain", "score")
            for i, (text, peak) in enumerate(kinds * 8)
        ]

    def dense(self, latent):
        return False

    def stats(self, latent):
        return {}

    def reference(self, latent):
        return 10.0

    def examples(self, latent, modality=None, kind=None, set=None):
        return [e for e in self.all if set in (None, e.set) and kind in (None, e.kind)]


CONFIG = LabelConfig((0,), calibrate=True)


def test_the_threshold_is_where_peaks_and_answers_agree_and_no_higher_than_allowed():
    peaks = [10.0, 9.0, 8.0, 5.0, 4.0, 1.0, 0.0, 0.0]
    answers = [True, True, True, False, False, False, False, False]
    found = operating_point(peaks, answers, most=9.0)
    assert found is not None and found.threshold == 6.5
    assert found.value == pytest.approx((4 / 5 + 6 / 7) / 2)
    held = operating_point(peaks, answers, most=4.9)
    assert held is not None and held.threshold == 4.5  # the best of those allowed
    # Of equally good thresholds the lowest; what could not be read counts for neither.
    unread = operating_point(peaks, [True, True, True, None, None, False, False, False], most=9.0)
    assert unread is not None and unread.threshold == 4.5
    assert operating_point([1.0, 2.0], [True, True], most=0.0) is None  # it is silent nowhere
    assert operating_point([0.0, 0.0], [True, False], most=1.0) is None
    assert operating_point(peaks, [None] * 8, most=9.0) is None


def test_a_threshold_that_leaves_one_lucky_excerpt_is_not_taken():
    peaks = [10.0] + [8.0] * 20 + [0.0] * 20
    answers = [True] + [True] * 19 + [False] + [False] * 20
    found = operating_point(peaks, answers, most=9.5)
    assert found is not None and found.threshold == 0.0


def test_the_label_above_its_threshold_is_kept_and_scored_there(tmp_path):
    """At half the maximum the latent is about left nodules; from three quarters on, lower ones."""
    features = Graded()
    with serving(Script(), reply) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(tmp_path / "l.sqlite"))
        said: list[str] = []
        who = Llm(client, Vocabulary(), said.append)
        (label,) = label_latents(features, who, CONFIG, tmp_path / "labels")
        assert said[0].startswith("explain: ") and "2 requests" in said[0]
        assert said[1] == "calibrate: at most 112 short questions"
        assert [line.split(":")[0] for line in said[2:]] == ["calibrate"]
        assert label.label is not None
        assert {"lower", "nodule"} <= set(label.label.split())
        assert 5 < label.threshold < 8 and label.fit is not None and label.fit > 0.9
        (score,) = detection_scores(features, [label], who, Vocabulary())
        assert (score.value, score.n) == (1.0, 56)  # no excerpt is left out
        (whole,) = detection_scores(
            features,
            [label._replace(threshold=0.0)],
            who,
            Vocabulary(),
        )
        assert whole.value is not None and whole.value < 0.8
        asked = server.asked.total()
        assert label_latents(features, who, CONFIG, tmp_path / "labels") == [label]
        assert server.asked.total() == asked
    assert [
        one.label
        for one in label_latents(features, Words(Vocabulary()), CONFIG, tmp_path / "words")
    ] == [label.label]


def test_scored_patients_decide_nothing(tmp_path):
    """Silencing the latent on all lower nodules of scored patients moves no label or threshold."""
    found = [
        label_latents(one, Words(Vocabulary()), CONFIG, tmp_path / name)[0]
        for name, one in (("a", Graded()), ("b", Graded(swapped=("score",))))
    ]
    assert found[0] == found[1]
    (score,) = detection_scores(Graded(("score",)), found[1:], Words(Vocabulary()), Vocabulary())
    assert score.value is None  # nothing exceeds the threshold there


def test_weak_firings_count_as_off_and_are_not_dropped():
    features = Graded()
    every = questions(features, 0, "nodule", Vocabulary())
    strong = questions(features, 0, "nodule", Vocabulary(), threshold=6.0)
    assert [q.text for q in every] == [q.text for q in strong]
    assert sum(q.truth for q in every) == 48 and sum(q.truth for q in strong) == 24
    assert all(q.truth == (q.text == LOWER) for q in strong)


def test_fuzzing_marks_nothing_below_the_threshold(tmp_path):
    features, who = Graded(), Words(Vocabulary())
    label = label_latents(features, who, CONFIG, tmp_path / "labels")[0]
    (low,) = fuzzing_scores(features, [label._replace(threshold=0.0)], who, Vocabulary())
    (high,) = fuzzing_scores(features, [label], who, Vocabulary())
    assert 0 < high.n < low.n


def test_the_best_of_several_labels_wins_and_one_that_cannot_be_read_is_left_out():
    features = Graded()
    offers = {0: [Offer("left nodule", 0.5), Offer("left lower nodule", 0.75)]}
    words = Words(Vocabulary())
    label, point = calibrate(features, offers, words.detect, Vocabulary())[0]
    # "left nodule" is as right above 1 as the other above 5, but 16 excerpts are off there, not 32.
    assert label == "left lower nodule" and 5 < point.threshold < 8
    assert point.value == pytest.approx((25 / 26 + 33 / 34) / 2)

    def lost(asked):
        return {key: [Verdict(q.patient, q.truth, None) for q in qs] for key, qs in asked.items()}

    assert calibrate(features, offers, lost, Vocabulary()) == {}


def test_an_explainer_that_always_says_none_scores_a_half(tmp_path):
    none = json.dumps({"label": None, "confidence": 0.0, "evidence": ""})
    with serving(Script(), lambda body: none) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(tmp_path / "l.sqlite"))
        who = Llm(client, Vocabulary())
        labels = label_latents(Graded(), who, CONFIG, tmp_path / "labels")
        before = server.asked.total()
        (score,) = detection_scores(Graded(), labels, who, Vocabulary())
        assert server.asked.total() == before == 2
    assert (labels[0].label, labels[0].threshold, labels[0].fit) == (None, 0.0, None)
    assert (score.value, score.auroc, score.baseline, score.n) == (0.5, 0.5, None, 56)


def test_films_have_no_excerpts_to_calibrate_on():
    with pytest.raises(ConfigError, match="leave it out"):
        replace(LabelConfig((0,), "reports", "frontal"), calibrate=True)
    assert all(a < b for a, b in pairwise(CONFIG.strengths))
    assert LabelConfig((0,)).strengths == (0.5,)
