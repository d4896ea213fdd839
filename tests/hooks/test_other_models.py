"""Sites on models that are not MAIRA-2: found by their parts, equal to transformers' outputs."""

import pytest
import torch
from transformers import (
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from hooks.files import CheckpointError, SiteError
from hooks.harvest import HarvestConfig, harvest
from hooks.loading import load_any
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.sites import capture, resolve_site, resolve_sites, rewrite, site_names
from sae.model import MatryoshkaSAE, SAEConfig
from steering import Edit
from steering.generate import steered

PLACES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
IDS = torch.tensor([[1, 5, 6, 7, 8]])
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT, num_attention_heads=4))


def neox(parallel):
    settings = {**TEXT, "num_attention_heads": 4, "use_parallel_residual": parallel}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))


def dinov2(cls):
    return cls(Dinov2Config(**VISION, num_attention_heads=2))


def llava(tower, vocab_size=64, image_token=63):
    vision = {**VISION, "model_type": tower, "intermediate_size": 48, "num_attention_heads": 2}
    strategy = "default" if tower == "clip_vision_model" else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config={
            **TEXT,
            "model_type": "llama",
            "num_attention_heads": 4,
            "vocab_size": vocab_size,
        },
        image_token_index=image_token,
        image_seq_length=4,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(config)


def inputs_of(model):
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels}
    if isinstance(model, LlavaForConditionalGeneration):
        return {"input_ids": torch.tensor([[1] + [63] * 4 + [5, 6]]), "pixel_values": pixels}
    return {"input_ids": IDS}


MODELS = {
    "llama": llama,
    "neox": lambda: neox(False),
    "gpt2": gpt2,
    "dinov2": lambda: dinov2(Dinov2Model),
    "dinov2 backbone": lambda: dinov2(Dinov2Backbone),
    "llava clip": lambda: llava("clip_vision_model"),
    "llava siglip": lambda: llava("siglip_vision_model"),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@torch.no_grad()
def test_every_tower_adds_up(model):
    """before + attention = between, + MLP = after; each layer begins where the last one ended."""
    inputs = inputs_of(model)
    names = site_names(model)
    for tower in {name.split(".")[0] for name in names} - {"projector"}:
        own = [name for name in names if name.startswith(tower)]
        with capture(resolve_sites(model, own)) as run:
            got = run(model, **inputs)
        assert list(got) == own
        for layer in range(len(own) // len(PLACES)):
            pre, attn, mid, mlp, post = (got[f"{tower}.{layer}.{place}"] for place in PLACES)
            torch.testing.assert_close(pre + attn, mid)
            torch.testing.assert_close(mid + mlp, post)
            if layer:
                assert torch.equal(pre, got[f"{tower}.{layer - 1}.resid_post"])


@torch.no_grad()
def test_streams_are_transformers_hidden_states(model):
    inputs = inputs_of(model)
    out = model(**inputs, output_hidden_states=True)
    tower = "vision" if model.main_input_name == "pixel_values" else "llm"
    n = len(out.hidden_states) - 1
    names = [f"{tower}.{i}.resid_post" for i in range(n)]
    with capture(resolve_sites(model, names)) as run:
        got = run(model, **inputs)
    for i in range(n - 1):  # the last may be after the final norm
        assert torch.equal(got[names[i]], out.hidden_states[i + 1])


@torch.no_grad()
def test_a_rewrite_reaches_the_output(model):
    inputs = inputs_of(model)
    first = next(name for name in site_names(model) if name.endswith("resid_mid"))
    plain = model(**inputs)[0]
    plain = plain[0] if isinstance(plain, tuple) else plain
    with rewrite(resolve_site(model, first), lambda value: value + torch.randn_like(value)):
        changed = model(**inputs)[0]
    changed = changed[0] if isinstance(changed, tuple) else changed
    assert not torch.allclose(changed, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "llava clip"])
@pytest.mark.parametrize("place", ["resid_mid", "resid_post"])
def test_steering_is_the_same_with_and_without_the_cache(name, place):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # from the initial 0.02, so that something is said
        parameter.mul_(4)
    sae = MatryoshkaSAE(SAEConfig(32, 16, 4, (16,), site=f"llm.1.{place}"), seed=1).eval()
    inputs, edits = inputs_of(model), [Edit(3, 30.0, 1.0)]
    length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**inputs, **settings)
    for where in ("all", "generated"):
        with steered(model, sae, edits, where, length):
            cached = model.generate(**inputs, **settings)
            whole = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)


def test_only_what_writes_text_is_steered():
    sae = MatryoshkaSAE(SAEConfig(24, 16, 4, (16,), site="vision.1.resid_post"))
    with pytest.raises(SiteError, match="writes no text"), steered(dinov2(Dinov2Model), sae, []):
        pass


def test_llava_has_a_projector_and_llama_has_none():
    assert "projector" in site_names(llava("clip_vision_model"))
    with pytest.raises(SiteError, match="LlamaForCausalLM has no projector"):
        resolve_site(llama(), "projector")


def test_towers_alone():
    for vision in (CLIPVisionModel, SiglipVisionModel):
        settings = {**VISION, "intermediate_size": 48, "num_attention_heads": 2}
        tower = vision(vision.config_class(**settings))
        assert site_names(tower)[-1] == "vision.2.resid_post"
    with pytest.raises(SiteError, match="has only vision layers"):
        resolve_site(dinov2(Dinov2Model), "llm.0.resid_post")


def test_parallel_layers_have_no_place_between():
    names = site_names(neox(True))
    assert "llm.1.resid_post" in names and "llm.1.resid_mid" not in names
    with pytest.raises(SiteError, match="read the same stream"):
        resolve_site(neox(True), "llm.1.resid_mid")


def test_what_is_no_transformer_is_named():
    with pytest.raises(SiteError, match=r"in a Sequential, whose parts are \['0'\]"):
        site_names(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@torch.no_grad()
def test_a_llava_is_harvested_over_studies(tokenizer, studies, tmp_path):
    words = Maira2Processor(tokenizer, image_size=28, patch_size=14)
    torch.manual_seed(0)
    model = llava("clip_vision_model", len(tokenizer), words.image_token_id).eval()
    config = HarvestConfig(("llm.1.resid_post",), "all", "float32")
    folder = harvest(model, words, studies[:4], config, tmp_path / "text")
    patches = HarvestConfig(("vision.1.mlp_out", "projector"), "patches", "float32")
    seen = harvest(model, words, studies[:4], patches, tmp_path / "films")
    for study in studies[:4]:
        inputs = words.model_inputs(encode_study(words, study))
        with capture(resolve_sites(model, config.sites), stop=False) as run:
            want = run(model, **inputs)["llm.1.resid_post"][0]
        rows = torch.from_numpy(folder.column("study") == study.id)
        got = folder.rows("llm.1.resid_post", 0, folder.n_tokens)[rows]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        with capture(resolve_sites(model, patches.sites), stop=False) as run:
            want = run(model, **inputs)
        rows = torch.from_numpy(seen.column("study") == study.id)
        for name in patches.sites:
            got = seen.rows(name, 0, seen.n_tokens)[rows]
            torch.testing.assert_close(got, want[name][:, -4:].flatten(0, 1))


def test_each_kind_of_checkpoint_is_loaded(tmp_path, checkpoint):
    saved = {
        "films": dinov2(Dinov2Model),
        "texts": llama(),
        "studies": llava("siglip_vision_model"),
    }
    for sees, model in saved.items():
        model.save_pretrained(tmp_path / sees)
        loaded = load_any(tmp_path / sees)
        assert loaded.sees == sees and type(loaded.model) is type(model)
    assert load_any(checkpoint).sees == "studies"
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_any(tmp_path / "none")
