"""Right and wrong marks, and log-probabilities, over real HTTP with labels whose merit is known."""

import math
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from autointerp import Llm
from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import questions as detection_questions
from autointerp.features import Example
from autointerp.fuzzing import FIT, questions
from autointerp.scoring import score_labels
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, Sure, serving

ON, OFF = "the small left effusion is seen again .", "the heart size is quite normal today ."
STRONG = ("left", "effusion")


class Words:
    known = tuple(dict.fromkeys(f"{ON} {OFF}".split()))

    def decode(self, ids, **_):
        return " ".join(self.known[i] for i in ids)


def example(i, text, strong=STRONG, side="score"):
    words = text.split()
    values = [2.0 if word in strong else 0.0 for word in words]
    peak = max(values)
    return Example(
        *(0, "report", "top" if peak else "random_silent", side, f"s{i}", f"{side}{i}", i, None, 0),
        *([Words.known.index(word) for word in words], values, peak, 0, (0, len(words) - 1), None),
    )


class Known:
    def __init__(self, examples=None):
        every = [example(i, ON if i % 2 else OFF) for i in range(40)]
        self.all = every if examples is None else examples

    def examples(self, latent, modality=None, kind=None, set=None):
        return [e for e in self.all if set in (None, e.set) and kind in (None, e.kind)]


def client_of(server, folder):
    return Client(EndpointConfig(server.url, "scripted"), Ledger(folder / "ledger.sqlite"))


def score(folder, labels, answer=reply, ask=questions, **script):
    with serving(Script(**script), answer) as server:
        scores = score_labels(
            Llm(client_of(server, folder), Words()).detect,
            "detection" if ask is detection_questions else "fuzzing",
            labels,
            lambda latent, label: ask(Known(), latent, label, Words()),
        )
        return {one.latent: one for one in scores}, server


def marks(text):
    return [part.partition(">>")[0] for part in text.split("<<")[1:]]


def test_marks_are_as_many_and_elsewhere_and_classes_are_equal():
    asked = questions(Known(), 0, "left effusion", Words())
    assert len(asked) == 40 and sum(one.truth for one in asked) == 20
    hosts = set()
    for one in asked:
        (run,) = marks(one.text)
        assert len(run.split()) == 2
        assert (run == "left effusion") == one.truth
        if not one.truth:
            assert not set(run.split()) & {*STRONG, "."}
            hosts.add("effusion" in one.text)
    assert hosts == {True, False}
    again = questions(Known(), 0, "something else", Words())
    assert [one.text for one in again] == [one.text for one in asked]


def test_without_room_elsewhere_the_excerpt_is_left_out():
    full = [example(i, "small left effusion .", ("small", "left", "effusion")) for i in range(4)]
    assert questions(Known(full), 0, "effusion", Words()) == []


def test_the_right_label_is_one_and_another_latents_at_chance(tmp_path):
    scores, _ = score(tmp_path, {0: "left effusion", 1: "normal heart", 2: None})
    assert scores[0].value == scores[0].auroc == 1.0
    assert scores[0].baseline is not None and scores[0].baseline <= 0.5
    assert scores[2].value == scores[2].auroc == 0.5 and scores[2].baseline is None
    wrong, _ = score(tmp_path / "w", {0: "pacemaker"})
    assert (wrong[0].value, wrong[0].baseline, wrong[0].n) == (0.5, None, 40)


def test_a_label_of_the_sentence_passes_detection_and_not_fuzzing(tmp_path):
    """Its words stand beside the firing ones: only fuzzing sees that."""
    label = {0: "small seen again"}
    seen, _ = score(tmp_path / "d", label, ask=detection_questions)
    fuzzed, _ = score(tmp_path / "f", label)
    assert seen[0].value == 1.0 and fuzzed[0].value < 0.5


@pytest.mark.parametrize("word", ["no", "yes"])
def test_one_answer_to_everything_is_at_chance(tmp_path, word):
    assert score(tmp_path, {0: "effusion"}, lambda body: word)[0][0].value == 0.5


def test_unreadable_answers_are_missing(tmp_path):
    lost = score(tmp_path, {0: "effusion"}, lambda body: "perhaps")[0][0]
    assert (lost.value, lost.coverage, lost.n) == (None, 0.0, 0)


def shy(body):
    """Says yes to all, yet is surer where it is right."""
    text = body["messages"][-1]["content"]
    right = "<<left effusion>>" in text if text.endswith(FIT) else "effusion is" in text
    return Sure("yes", 0.9 if right else 0.6)


@pytest.mark.parametrize("ask", [questions, detection_questions])
def test_log_probabilities_rank_and_survive_the_ledger(tmp_path, ask):
    scores, server = score(tmp_path, {0: "effusion"}, shy, ask, logprobs="told")
    assert (scores[0].value, scores[0].auroc) == (0.5, 1.0)
    assert all(body["logprobs"] and body["top_logprobs"] == 5 for body in server.bodies)
    again, server = score(tmp_path, {0: "effusion"}, lambda body: "no", ask, logprobs="told")
    assert again == scores and server.asked.total() == 0


def test_an_endpoint_that_refuses_them_is_asked_without_and_not_again(tmp_path):
    with serving(Script(logprobs="refused", latency=0.02), reply) as server:
        client = client_of(server, tmp_path)
        asked = [one.request() for one in questions(Known(), 0, "left effusion", Words())]
        one = client.ask_all(asked[:1])[0]
        assert one.text in ("yes", "no") and one.logprobs is None and client.no_logprobs
        assert server.asked.total() == 2
        n = len({client.key(client.body(r.messages, r.max_tokens)) for r in asked})
        client.ask_all(asked)
        assert server.asked.total() == 1 + n
        fresh = client_of(server, tmp_path)
        assert fresh.estimate(asked).requests == 0
        fresh.ask_all(asked)
        assert server.asked.total() == 1 + n and server.counts["repeated"] == 0


def test_after_a_refusal_what_waits_is_not_sent_to_be_refused(tmp_path):
    with serving(Script(logprobs="refused", latency=0.02), reply) as server:
        many = [replace(one, label=f"label {i}") for i in range(5) for one in
                questions(Known(), 0, "", Words())]  # fmt: skip
        client_of(server, tmp_path).ask_all([one.request() for one in many])
        refused = sum("logprobs" in body for body in server.bodies)
        assert 1 <= refused <= 16


def test_an_endpoint_that_takes_no_notice_gives_none(tmp_path):
    scores, _ = score(tmp_path, {0: "left effusion"}, logprobs="ignored")
    assert scores[0].auroc == 1.0


def test_a_ledger_of_an_earlier_version_is_read_and_paid_for_once(tmp_path):
    asked = [one.request() for one in questions(Known(), 0, "left effusion", Words())]
    with serving(Script(logprobs="told"), reply) as server:
        plain = [one._replace(top_logprobs=0) for one in asked]
        before = client_of(server, tmp_path).ask_all(plain)
        n = server.asked.total()
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
            db.execute("DROP TABLE logprobs")
            db.commit()
        after = client_of(server, tmp_path).ask_all(asked)
        assert server.asked.total() == n and after == before


def test_the_ledger_keeps_each_tokens_alternatives(tmp_path):
    ask = questions(Known(), 0, "left effusion", Words())[0].request()
    with serving(Script(logprobs="told"), lambda body: Sure("yes", 0.75)) as server:
        client = client_of(server, tmp_path)
        told = client.ask_all([ask])[0].logprobs
        assert told == [{"yes": math.log(0.75), "no": math.log(0.25)}]
        assert client.ask_all([ask])[0].logprobs == told and server.asked.total() == 1
