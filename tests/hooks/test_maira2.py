"""MAIRA-2 on transformers 5 against the released modelling code's outputs, and its loader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from hooks.files import CheckpointError, ConfigError
from hooks.maira2 import Maira2Config, Maira2ForConditionalGeneration, load_model
from hooks.sites import capture, resolve_sites

ORACLE = Path(__file__).parents[1] / "fixtures" / "maira2-oracle"


@pytest.fixture(scope="module")
def expected():
    return load_file(ORACLE / "expected.safetensors")


@pytest.fixture(scope="module")
def oracle():
    return load_model(ORACLE)


@torch.no_grad()
def test_oracle_logits_and_image_features(oracle, expected):
    out = oracle(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"])
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-4, rtol=0)
    features = out.image_hidden_states.reshape_as(expected["image_hidden_states"])
    torch.testing.assert_close(features, expected["image_hidden_states"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_oracle_decoder_layers_through_our_hooks(oracle, expected):
    names = [f"llm.{i}.resid_post" for i in range(4)]
    with capture(resolve_sites(oracle, names)) as run:
        got = run(oracle, input_ids=expected["input_ids"], pixel_values=expected["pixel_values"])
    for i, name in enumerate(names):
        torch.testing.assert_close(got[name], expected[f"resid_post.{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_oracle_greedy_tokens(oracle, expected, use_cache):
    ids = oracle.generate(
        input_ids=expected["input_ids"],
        attention_mask=torch.ones_like(expected["input_ids"]),
        pixel_values=expected["pixel_values"],
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
    )
    assert ids.tolist() == expected["generated"].tolist()


def test_stock_llava_features_would_differ(oracle, expected):
    """The layernormed map is not the last hidden state: taking the latter would be wrong."""
    with torch.no_grad():
        tower = oracle.model.vision_tower
        out = tower(expected["pixel_values"], output_hidden_states=True)
    assert (out.feature_maps[-1] - out.hidden_states[-1]).abs().max() > 0.1


def test_save_writes_the_released_layout_and_auto_class_reads_it(oracle, tmp_path):
    oracle.save_pretrained(tmp_path)
    released = json.loads((ORACLE / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(released)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is Maira2ForConditionalGeneration
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Maira2Config)
    for name, value in oracle.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@torch.no_grad()
def test_another_checkpoint_with_shards_and_three_images(checkpoint, model, processor):
    """Sizes, shard count and number of films all differ from the oracle's."""
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 2
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 42, 42, generator=rng)
    image = processor.image_token_id
    ids = torch.tensor([[1] + [image] * 9 + [400] + [image] * 18 + [401, 402]])
    out = model(input_ids=ids, pixel_values=pixels)
    features = model.get_image_features(pixels).pooler_output
    assert [tuple(f.shape) for f in features] == [(9, 32)] * 3
    embeddings = model.get_input_embeddings()(ids)
    embeddings[0, 1:10], embeddings[0, 11:20] = features[0], features[1]
    embeddings[0, 20:29] = features[2]
    direct = model(inputs_embeds=embeddings)
    torch.testing.assert_close(out.logits, direct.logits)


@torch.no_grad()
def test_bfloat16_and_device_map(checkpoint, model):
    half = Maira2ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map="cpu"
    )
    assert half.dtype is torch.bfloat16
    ids = torch.tensor([[1, 300, 301, 302]])
    exact, rough = model(input_ids=ids).logits, half(input_ids=ids).logits.float()
    assert (exact - rough).norm() / exact.norm() < 0.05


def test_auto_classes_use_this_class_though_the_config_names_remote_code():
    assert "auto_map" in json.loads((ORACLE / "config.json").read_text())
    assert type(AutoConfig.from_pretrained(ORACLE)) is Maira2Config
    loaded = AutoModelForImageTextToText.from_pretrained(ORACLE)
    assert type(loaded) is Maira2ForConditionalGeneration


def test_number_of_image_tokens_must_match(model):
    ids = torch.tensor([[1, model.config.image_token_id, 5]])
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 42, 42))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_missing_shard_is_named(copy):
    next(iter(sorted(copy.glob("model-*")))).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ weight files.*00001-of"):
        load_model(copy)


def test_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path)


def _rewrite_shard_with(copy: Path, key: str, change) -> None:
    index_path = copy / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = copy / index["weight_map"][key]
    tensors = load_file(shard)
    change(tensors, index["weight_map"])
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))


NORM = "language_model.model.norm.weight"


def test_missing_weight_is_an_error(copy):
    _rewrite_shard_with(copy, NORM, lambda t, w: (t.pop(NORM), w.pop(NORM)))
    with pytest.raises(CheckpointError, match=r"1 missing keys.*norm"):
        load_model(copy)


def test_unexpected_weight_is_an_error(copy):
    def add(tensors, weights):
        tensors["language_model.model.extra"] = torch.zeros(2)
        weights["language_model.model.extra"] = weights[NORM]

    _rewrite_shard_with(copy, NORM, add)
    with pytest.raises(CheckpointError, match=r"1 unexpected keys.*extra"):
        load_model(copy)


def test_wrong_shape_is_an_error(copy):
    _rewrite_shard_with(copy, NORM, lambda t, w: t.update({NORM: torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r"1 mismatched keys.*norm"):
        load_model(copy)


def test_config_defaults_are_the_released_models():
    config = Maira2Config()
    assert config.vision_config.hidden_size == 768
    assert config.vision_config.image_size == 518
    assert config.patch_grid**2 == config.image_seq_length == 1369
    assert config.text_config.vocab_size == 32207
    assert config.text_config.rope_parameters["factor"] == 1.5
    assert config.projector_n_layers == 4


def test_config_refuses_another_vision_tower():
    with pytest.raises(ConfigError, match="dinov2"):
        Maira2Config(vision_config={"model_type": "clip_vision_model"})
