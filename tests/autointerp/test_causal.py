"""Concepts from reports with and without a latent, of which the steering is known."""

import json

from autointerp.causal import (
    causal_request,
    new_sentences,
    steered_reports,
    steering_words,
)
from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.explaining import explain
from autointerp.statistics import words_of
from maira_sae.scripted_server import Script, serving

PLAIN = "The lungs are clear. Heart size is normal."
BROUGHT = {3: "Small left effusion.", 5: "There is a nodule in the right lung.", 7: ""}


def write_report(latent):
    return f"{BROUGHT[latent]} Heart size is normal." if BROUGHT[latent] else PLAIN


def difference(body):
    """A labeller that reads the two reports of its prompt."""
    text = body["messages"][-1]["content"]
    on, off = text.partition("\nOn:\n")[2].split("\nOff:\n")
    words = [word for word in words_of(on) if word not in words_of(off)]
    return json.dumps({"label": " ".join(words), "confidence": 1.0, "evidence": "new"})


def ask(folder, answer):
    with serving(Script(), answer) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(folder / "ledger.sqlite"))
        steered = steered_reports(write_report, [3, 5, 7])
        told = explain(client, {n: causal_request(one, PLAIN) for n, one in steered.items()})
        return told, server.asked.total()


def test_what_steering_brought_is_the_concept(tmp_path):
    told, n = ask(tmp_path, difference)
    assert told.found[3].label == "small left effusion" and "nodule" in told.found[5].label
    assert told.unasked == (7,) and n == 2


def test_none_is_an_answer_and_an_unreadable_reply_is_missing(tmp_path):
    none = json.dumps({"label": None, "confidence": 0.0, "evidence": ""})
    told, _ = ask(tmp_path / "none", lambda body: none)
    assert [told.found[n].label for n in (3, 5)] == [None, None] and told.missing == ()
    told, _ = ask(tmp_path / "lost", lambda body: "an effusion, I think")
    assert told.found == {} and told.missing == (3, 5)


def test_words_without_a_language_model():
    labels = steering_words(steered_reports(write_report, [3, 5, 7]), PLAIN)
    assert labels[3] == "small left effusion" and labels[7] is None
    assert "nodule" in labels[5] and len(labels[5].split()) <= 4


def test_words_that_every_latent_brings_give_way():
    garbled = {n: f"Again and again there was a {word}." for n, word in enumerate(["tube", "wire"])}
    labels = steering_words(garbled, PLAIN)
    assert "tube" in labels[0] and "wire" in labels[1] and "wire" not in labels[0]


def test_other_order_or_blanks_are_no_change():
    turned = "Heart size is normal.\n  the lungs are clear."
    assert new_sentences(turned, PLAIN) == [] and causal_request(turned, PLAIN) is None
