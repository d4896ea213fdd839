"""Explaining and detecting over real HTTP, of latents whose concept is known."""

import json

import pytest

from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import ask, questions
from autointerp.explainers import Explanation, text_request
from autointerp.features import Example
from autointerp.scores import judge
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, serving

ON, OFF = "small left effusion .", "heart size is normal ."


class Words:
    """A tokenizer of words, each its own token."""

    known = tuple(dict.fromkeys(f"{ON} {OFF}".split()))

    def decode(self, ids, **_):
        return " ".join(self.known[i] for i in ids)


def example(side, i, text, fires, patient=None):
    ids = [Words.known.index(word) for word in text.split()]
    values = [float(fires)] * len(ids)
    return Example(
        *(0, "report", "top" if fires else "random_silent", side, f"s{i}", patient or f"{side}{i}"),
        *(i, None, 0, ids, values, float(fires), 0, (0, len(ids) - 1), None),
    )


class Known:
    """The part of a features folder that explainers and scorers read."""

    def __init__(self, dense=False):
        self.is_dense = dense
        self.all = [
            example(side, i, ON if i % 2 else OFF, i % 2)
            for side in ("explain", "score")
            for i in range(40)
        ]

    def dense(self, latent):
        return self.is_dense

    def examples(self, latent, modality=None, kind=None, set=None):
        return [e for e in self.all if set in (None, e.set) and kind in (None, e.kind)]


def run(tmp_path, label, answer=reply):
    with serving(Script(), answer) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(tmp_path / "ledger.sqlite"))
        said = ask(client, {0: questions(Known(), 0, label, Words())})[0]
    return judge(0, "detection", "report", said)


def test_the_label_comes_from_the_prompt_and_predicts_other_patients(tmp_path):
    with serving(Script(), reply) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(tmp_path / "ledger.sqlite"))
        request = text_request(Known(), 0, Words(), "report")
        found = client.ask_all([request])[0].value
    assert isinstance(found, Explanation) and found.label == "small left effusion"
    assert not any(e.patient in str(request.messages) for e in Known().examples(0, set="score"))
    assert run(tmp_path / "own", found.label).value == 1.0


@pytest.mark.parametrize("label", ["pacemaker", "seen ."])
def test_a_label_that_is_wrong_on_purpose_is_at_chance(tmp_path, label):
    assert run(tmp_path, label).value == 0.5


def test_a_labeller_that_always_says_no_is_at_chance_and_one_that_babbles_is_missing(tmp_path):
    assert run(tmp_path / "no", "small left effusion", lambda body: "no").value == 0.5
    lost = run(tmp_path / "lost", "small left effusion", lambda body: "perhaps")
    assert (lost.value, lost.coverage, lost.n) == (None, 0.0, 0)


def test_no_clear_concept_is_a_label_of_none(tmp_path):
    def none(body):
        return json.dumps({"label": None, "confidence": 0.0, "evidence": ""})

    with serving(Script(), none) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(tmp_path / "ledger.sqlite"))
        found = client.ask_all([text_request(Known(), 0, Words(), "report")])[0]
    assert found.value is not None and found.value.label is None


def test_a_latent_that_fires_everywhere_is_not_asked_about():
    assert text_request(Known(dense=True), 0, Words(), "report") is None
