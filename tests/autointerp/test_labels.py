"""Labels and their scores over real HTTP, of latents whose concept is known."""

import json

import pytest
import torch

from autointerp import (
    Client,
    CollectConfig,
    EndpointConfig,
    LabelConfig,
    Ledger,
    Limits,
    Llm,
    Words,
    collect,
    detection_scores,
    label_latents,
    latent_activations,
    read_labels,
    read_scores,
    write_scores,
)
from autointerp.label_config import Sources
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


@pytest.fixture(scope="module")
def features(many, word_sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "features"
    config = CollectConfig(n_top=12, n_quantile=8, n_contrast=12, score=0.4, steer=0.0)
    return collect(word_sae, many, config, out)


def answer(body):
    """A model that knows the concept from the marks alone."""
    text = body["messages"][-1]["content"]
    if "Concept: " not in text:
        label = "pleural effusion" if "<<effusion" in text else "heart size"
        return json.dumps({"label": label, "confidence": 0.9, "evidence": "marks"})
    concept, excerpt = text.split("\n")[:2]
    return "Yes" if "effusion" in concept and "effusion" in excerpt else "No"


def labeller(server, processor, folder, say=None, **limits):
    prices = {"price_in": 1.0, "price_out": 1.0}
    endpoint = EndpointConfig(server.url, "scripted", limits=Limits(**prices, **limits))
    folder.mkdir(parents=True, exist_ok=True)
    return Llm(Client(endpoint, Ledger(folder / "ledger.sqlite")), processor.tokenizer, say)


CONFIG = LabelConfig((0, 1, 2))


def test_labels_with_score_and_baseline(features, processor, tmp_path):
    out = tmp_path / "labels"
    with serving(Script(), answer) as server:
        who = labeller(server, processor, out)
        labels = label_latents(features, who, CONFIG, out)
        right, dense, silent = labels
        assert (right.label, right.confidence, right.model) == ("pleural effusion", 0.9, "scripted")
        assert right.reference == features.reference(0)
        assert features.dense(1) and dense.label is None  # reported as dense, never asked about
        assert silent.label is None and silent.confidence is None
        assert read_labels(out) == labels
        named = [*labels, dense._replace(label="heart size")]
        (score, third, other) = detection_scores(features, named, who, processor.tokenizer)
        before = server.asked.total()
        assert label_latents(features, who, CONFIG, out) == labels
        assert server.asked.total() == before
    assert (score.value, score.baseline, score.coverage) == (1.0, 0.5, 1.0)
    assert score.n >= 8 and score.n_patients >= 4
    assert other.latent == 1 and other.value is None  # it is silent nowhere
    assert third.latent == 2 and third.value is None  # it fires nowhere
    write_scores([score, other], tmp_path / "scores")
    assert read_scores(tmp_path / "scores") == [score, other]
    with pytest.raises(FolderError, match="holds other labels"):
        label_latents(features, who, LabelConfig((0,)), out)


def test_an_explainer_that_always_says_none_names_nothing(features, processor, tmp_path):
    none = json.dumps({"label": None, "confidence": 0.0, "evidence": ""})
    with serving(Script(), lambda body: none) as server:
        who = labeller(server, processor, tmp_path)
        labels = label_latents(features, who, CONFIG, tmp_path / "labels")
        assert [one.label for one in labels] == [None] * 3
        before = server.asked.total()
        scores = detection_scores(features, labels, who, processor.tokenizer)
        assert server.asked.total() == before
    # Latent 1 is dense and was never asked about; latent 2 never fires, so nothing is known of it.
    assert [(one.latent, one.value, one.auroc) for one in scores] == [
        (0, 0.5, 0.5),
        (2, None, None),
    ]


def test_a_label_that_is_wrong_on_purpose_scores_at_chance(features, processor, tmp_path):
    who = Words(processor.tokenizer)
    right = label_latents(features, who, CONFIG, tmp_path / "labels")[0]
    wrong = right._replace(label="pacemaker lead")
    (score,) = detection_scores(features, [wrong], who, processor.tokenizer)
    assert score.value == 0.5 and score.baseline is None


def test_word_statistics_need_no_endpoint(features, processor, tmp_path):
    who = Words(processor.tokenizer)
    labels = label_latents(features, who, CONFIG, tmp_path / "labels")
    assert "effusion" in labels[0].label and labels[0].model == "statistics"
    (score, _) = detection_scores(features, labels, who, processor.tokenizer)
    assert score.value == 1.0


def test_the_explainer_never_sees_a_scored_patient(features, processor, tmp_path):
    explained = {e.patient for e in features.examples(0, set="explain")}
    scored = {e.patient for e in features.examples(0, set="score")}
    assert explained and scored and not explained & scored
    with serving(Script(), answer) as server:
        who = labeller(server, processor, tmp_path)
        request = who.requests(features, CONFIG, Sources())[0]
        assert request.messages[-1]["content"].count("<<effusion") >= 5
        labels = label_latents(features, who, CONFIG, tmp_path / "labels")
        detection_scores(features, labels, who, processor.tokenizer)


def test_labels_are_paid_once_and_stop_at_a_budget(features, processor, tmp_path):
    out, said = tmp_path / "labels", []
    with serving(Script(faults=0.1, retry_after_ms=10), answer) as server:
        who = labeller(server, processor, out)
        labels = label_latents(features, who, CONFIG, out)
        few = labeller(server, processor, out, max_requests=5)
        with pytest.raises(EndpointError, match="max_requests") as caught:
            detection_scores(features, labels, few, processor.tokenizer)
        assert caught.value.resumable
        scores = detection_scores(features, labels, who, processor.tokenizer)
        assert scores[0].value == 1.0 and server.counts["repeated"] == 0
        labeller(server, processor, out, said.append).explain(features, CONFIG, Sources())
        assert len(said) == 1 and said[0].startswith("explain: 0 requests (1 more are kept)")
        before = server.asked.total()
        assert detection_scores(features, labels, who, processor.tokenizer) == scores
        assert server.asked.total() == before


def test_a_stopped_job_leaves_an_unfinished_folder(features, processor, tmp_path):
    out = tmp_path / "labels"
    with serving(Script(), lambda body: "down") as server:
        who = labeller(server, processor, out, max_requests=0)
        with pytest.raises(EndpointError):
            label_latents(features, who, CONFIG, out)
    with pytest.raises(FolderError, match="unfinished"):
        read_labels(out)


def test_what_cannot_be_labelled_is_refused():
    with pytest.raises(ConfigError, match="name at least one"):
        LabelConfig(())
    with pytest.raises(ConfigError, match="did you mean 'report"):
        LabelConfig((0,), "text", "reprot")
    with pytest.raises(ConfigError, match="do not go together"):
        LabelConfig((0,), "reports", "report")


def test_activations_of_a_latent_that_does_not_exist(many, word_sae):
    with pytest.raises(ConfigError, match="latent 32 is outside 0–31"):
        latent_activations(word_sae, many, [32])
