"""TransformerLens and our hooks see the same model, and change it alike."""

import subprocess

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hooks.files import SiteError
from hooks.lens import boot, lens_name, wrap
from hooks.maira2 import Maira2ForConditionalGeneration
from hooks.sites import capture, resolve_site, rewrite, site_names
from phantom.model import WEIGHTS


def inputs_of(model, films=2):
    """A prompt with two films, and one of another length and one film, right-padded."""
    config = model.config
    patches = [config.image_token_index] * config.image_seq_length
    rows = [[1, *patches * films, 20, 21, 22, 23], [1, *patches, 24, 25]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    size = config.vision_config.image_size
    pixels = torch.randn(films + 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def eager(source):
    model = Maira2ForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def pair(checkpoint):
    return eager(checkpoint), boot(checkpoint)


def ours(model, inputs):
    sites = [resolve_site(model, name) for name in site_names(model)]
    with capture(sites, stop=False) as run:
        return run(model, **inputs)


@torch.no_grad()
@pytest.mark.parametrize("source", ["tiny", "phantom"])
def test_every_site_is_in_the_cache_and_equal(pair, source):
    model, bridge = pair if source == "tiny" else (eager(WEIGHTS), boot(WEIGHTS))
    inputs = inputs_of(model)
    logits, cache = bridge.run_with_cache(**bridge_inputs(inputs))
    assert torch.equal(logits, model(**inputs).logits)
    for name, value in ours(model, inputs).items():
        assert torch.equal(cache[lens_name(name)], value), name


def bridge_inputs(inputs):
    return {"input": inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}}


@torch.no_grad()
def test_every_change_has_the_same_effect(pair):
    """Also at the last vision layer, whose output transformers collects in a hook of its own."""
    model, bridge = pair
    inputs = inputs_of(model)
    plain = model(**inputs).logits
    last = len(model.model.vision_tower.encoder.layer) - 1
    places = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    # Not resid_mid: there TransformerLens changes only what the MLP reads.
    for name in ["projector", *(f"{t}.{p}" for t in (f"vision.{last}", "llm.1") for p in places)]:
        with rewrite(resolve_site(model, name), lambda value: value * 1.5):
            want = model(**inputs).logits
        assert not torch.allclose(want, plain), name
        got = bridge.run_with_hooks(
            **bridge_inputs(inputs), fwd_hooks=[(lens_name(name), lambda value, hook: value * 1.5)]
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)


@torch.no_grad()
def test_generation_is_the_same(pair):
    model, bridge = pair
    inputs = {k: v[:1] for k, v in inputs_of(model).items()}
    inputs["pixel_values"] = inputs_of(model)["pixel_values"][:2]
    want = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    got = bridge.original_model.generate(
        **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(got, want)


def test_booting_starts_no_subprocess(checkpoint, monkeypatch):
    """TransformerLens installs torchvision with pip while it boots a multimodal model."""

    def started(*args, **kwargs):
        raise AssertionError(f"a subprocess was started: {args}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    assert boot(checkpoint).cfg.is_multimodal
    bridge = TransformerBridge.boot_transformers(str(checkpoint), device="cpu")
    assert not bridge.cfg.is_multimodal


@torch.no_grad()
def test_a_llava_is_wrapped_by_transformer_lens_own_adapter():
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
        },
        image_token_index=63,
        image_seq_length=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = inputs_of(model)
    want = ours(model, inputs)
    _, cache = wrap(model).run_with_cache(**bridge_inputs(inputs))
    for name, value in want.items():
        if name.endswith("resid_post"):
            torch.testing.assert_close(cache[lens_name(name)], value, atol=1e-6, rtol=1e-6)


def test_what_is_no_site_is_refused():
    with pytest.raises(SiteError, match="write one like"):
        lens_name("blocks.3")
