"""Examples, labels and scores, with a scripted model in place of the endpoint's."""

from typing import ClassVar

import pytest
import torch

from autointerp import EndpointConfig, Limits, explain
from autointerp.collect import collect_examples, latent_activations
from autointerp.explain import LabelConfig, label_latents, read_label, read_labels
from autointerp.prompts import detect_messages, explain_messages, marked, plain
from autointerp.score import summarize
from hooks.files import ConfigError, EndpointError, FolderError
from hooks.harvest import HarvestConfig, harvest
from maira_sae.scripted_server import Script, serving
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.1.resid_post"


@pytest.fixture(scope="module")
def many(tmp_path_factory, model, processor, studies):
    """Activations of more patients than the shared folder has."""
    out = tmp_path_factory.mktemp("many") / "acts"
    copies = [
        study.model_copy(update={"id": f"{study.id}-{i}", "patient": f"{study.patient}-{i}"})
        for i in range(4)
        for study in studies
    ]
    return harvest(model, processor, copies, HarvestConfig((SITE,)), out)


@pytest.fixture(scope="module")
def word_sae(many, processor):
    """Latent 0 fires on the word "effusion" alone, latent 1 on everything, latent 2 on nothing."""
    ids = torch.from_numpy(many.column("token_id").copy())
    target = processor.tokenizer(" effusion", add_special_tokens=False)["input_ids"]
    x = many.rows(SITE, 0, many.n_tokens).float()
    positive = torch.isin(ids, torch.tensor(target[-1:]))
    spread = torch.cov(x.T) + 1e-3 * torch.eye(32)
    direction = torch.linalg.solve(spread, x[positive].mean(0) - x[~positive].mean(0))
    scores = x @ direction
    assert scores[positive].min() > scores[~positive].max()
    cut = float((scores[positive].min() + scores[~positive].max()) / 2)
    sae = MatryoshkaSAE(SAEConfig(32, 32, 3, (32,), site=SITE, policy="published"))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1.0)
        sae.W_enc[:, 0] = direction
        sae.b_enc[0] = -cut
        sae.b_enc[1] = 1.0
    return sae


def test_examples_are_split_by_patient_and_labelled_rightly(many, word_sae, processor):
    one = collect_examples(word_sae, many, [0], n_explain=5, n_score=8, heldout=0.4)[0]
    assert len(one.explain) == 5 and len(one.positives) == 4 and len(one.negatives) == 4
    seen = {example.patient for example in one.explain}
    assert not seen & {example.patient for example in one.positives + one.negatives}
    for example in one.explain + one.positives:
        assert "effusion" in plain(example, processor.tokenizer)
        assert example.peak > 0
    for example in one.negatives:
        assert "effusion" not in plain(example, processor.tokenizer)
        assert example.peak == 0
    peaks = [example.peak for example in one.explain]
    assert peaks == sorted(peaks, reverse=True)
    values = latent_activations(word_sae, many, [0])[:, 0]
    assert one.reference == pytest.approx(float(values[values > 0].quantile(0.99)), rel=1e-4)


def test_marks_whole_words(many, word_sae, processor):
    one = collect_examples(word_sae, many, [0], n_explain=1, heldout=0.4)[0]
    text = marked(one.explain[0], processor.tokenizer)
    assert text.count("<<") == 1 and "<<effusion.>>" in text.replace(
        "<<effusion>>.", "<<effusion.>>"
    )


def test_dense_and_silent_latents(many, word_sae):
    dense, silent = collect_examples(word_sae, many, [1, 2], n_score=6, heldout=0.4)
    assert len(dense.positives) == 3 and dense.negatives == []
    assert silent.explain == [] and silent.positives == [] and silent.reference == 0


def test_an_example_is_one_whole_sentence(many, word_sae, processor):
    one = collect_examples(word_sae, many, [0], n_explain=3, heldout=0.4)[0]
    for example in one.explain:
        assert plain(example, processor.tokenizer) == "There is a small left pleural effusion."
    cut = collect_examples(word_sae, many, [0], n_explain=1, heldout=0.4, max_tokens=4)[0]
    assert len(cut.explain[0].token_ids) == 4 and cut.explain[0].peak == one.explain[0].peak


def test_latent_out_of_range(many, word_sae):
    with pytest.raises(ConfigError, match="latent 32 is outside 0–31"):
        collect_examples(word_sae, many, [32])


def test_summaries_are_balanced_and_failures_are_missing():
    assert summarize([False] * 4, [False] * 12).balanced_accuracy == 0.5
    assert summarize([True] * 4, [False] * 12).balanced_accuracy == 1
    half = summarize([True, None, None], [None, False, True])
    assert half.balanced_accuracy == 0.75 and half.n == 3 and half.coverage == 0.5
    assert summarize([None], [False]).balanced_accuracy is None
    assert summarize([], []).coverage == 0


def test_replies_are_read_as_labels():
    assert read_label("Concept: pleural effusion\nmore") == "pleural effusion"
    assert read_label("No clear concept.") is None
    assert len(read_label("word " * 40).split()) == 12


class Scripted:
    """Answers like a model that knows the concept, without a network."""

    asked: ClassVar[list] = []
    fail_after = 10**9

    def __init__(self, config, ledger):
        self.ledger = ledger

    def ask_all(self, requests, name):
        """A real client would send all at once here, and answer from its ledger below."""

    def ask(self, messages, max_tokens):
        Scripted.asked.append(messages)
        if len(Scripted.asked) > Scripted.fail_after:
            raise EndpointError("down")
        text = messages[-1]["content"]
        if "Concept:\n" in text or text.endswith("Concept:"):
            return "pleural effusion" if "<<effusion" in text else "anything"
        concept = text.split("\n")[0].removeprefix("Concept: ")
        return "Yes" if "effusion" in concept and "effusion" in text.split("\n")[1] else "No"


@pytest.fixture
def scripted(monkeypatch):
    Scripted.asked, Scripted.fail_after = [], 10**9
    monkeypatch.setattr(explain, "Client", Scripted)
    return Scripted


class Endpoint:
    model = "scripted"


def run(many, word_sae, processor, out, **kwargs):
    config = LabelConfig((0, 1, 2), n_explain=4, n_score=8, heldout=0.4, **kwargs)
    return label_latents(word_sae, many, processor.tokenizer, Endpoint(), config, out)


def test_labels_with_score_and_baseline(many, word_sae, processor, scripted, tmp_path):
    labels = run(many, word_sae, processor, tmp_path / "labels")
    right, dense, silent = labels
    assert right.label == "pleural effusion"
    assert right.balanced_accuracy == 1 and right.coverage == 1 and right.n_scored == 8
    assert right.baseline == 0.5  # the other label never says yes
    assert dense.label == "anything" and dense.balanced_accuracy is None
    assert silent.label is None and silent.coverage == 0
    assert read_labels(tmp_path / "labels") == labels
    before = len(scripted.asked)
    assert run(many, word_sae, processor, tmp_path / "labels") == labels
    assert len(scripted.asked) == before
    with pytest.raises(FolderError, match="holds other labels"):
        run(many, word_sae, processor, tmp_path / "labels", seed=5)


def test_explainer_never_sees_a_scored_sentence(many, word_sae, processor, scripted, tmp_path):
    run(many, word_sae, processor, tmp_path / "labels")
    examples = collect_examples(word_sae, many, [0], n_explain=4, n_score=8, heldout=0.4)[0]
    shown = [e.study for e in examples.explain]
    scored = [e.study for e in examples.positives + examples.negatives]
    assert not set(shown) & set(scored)
    assert list(explain_messages(examples.explain, processor.tokenizer)) in scripted.asked
    question = detect_messages("pleural effusion", examples.positives[0], processor.tokenizer)
    assert list(question) in scripted.asked
    assert "<<" not in question[-1]["content"]


def test_endpoint_failure_leaves_an_unfinished_folder(
    many, word_sae, processor, scripted, tmp_path
):
    scripted.fail_after = 5
    with pytest.raises(EndpointError):
        run(many, word_sae, processor, tmp_path / "labels")
    with pytest.raises(FolderError, match="unfinished"):
        read_labels(tmp_path / "labels")
    scripted.fail_after = 10**9
    assert run(many, word_sae, processor, tmp_path / "labels")[0].balanced_accuracy == 1


def test_labels_over_http_are_paid_once_and_stop_at_a_budget(many, word_sae, processor, tmp_path):
    def reply(body):
        text = body["messages"][-1]["content"]
        if text.endswith("Concept:"):
            return "pleural effusion" if "<<effusion" in text else "anything"
        concept, sentence = text.split("\n")[:2]
        return "yes" if "effusion" in concept and "effusion" in sentence else "no"

    def label(server, out, **limits):
        prices = {"price_in": 1.0, "price_out": 1.0}
        endpoint = EndpointConfig(server.url, "scripted", limits=Limits(**prices, **limits))
        config = LabelConfig((0, 1, 2), n_explain=4, n_score=8, heldout=0.4)
        return label_latents(
            word_sae, many, processor.tokenizer, endpoint, config, out, announced.append
        )

    announced = []
    with serving(Script(faults=0.1, retry_after_ms=10), reply) as server:
        with pytest.raises(EndpointError, match="max_requests") as caught:
            label(server, tmp_path / "labels", max_requests=5)
        assert caught.value.resumable and server.asked.total() == 5
        labels = label(server, tmp_path / "labels")
        assert labels[0].label == "pleural effusion" and labels[0].balanced_accuracy == 1
        assert labels[0].baseline == 0.5 and labels[2].label is None
        assert server.counts["repeated"] == 0
        assert announced[0].startswith("explain: 2 requests (0 more are kept)")
        assert "score, at most: " in announced[1] and "(2 more are kept)" in announced[1]
        before = server.asked.total()
        assert label(server, tmp_path / "labels") == labels
        assert server.asked.total() == before
