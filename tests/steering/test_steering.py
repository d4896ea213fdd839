"""An empty edit is bitwise nothing; the cache changes nothing; the error term is kept."""

import pytest
import torch

from hooks.files import ConfigError
from hooks.prompts import study_text
from sae.model import MatryoshkaSAE, SAEConfig
from steering.edits import Edit, apply_edits
from steering.generate import compare, prompt_inputs, steered

SITE = "llm.1.resid_post"


@pytest.fixture(scope="module")
def sae():
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE, policy="published"), seed=3)
    sae.threshold.fill_(0.2)
    return sae.eval()


@pytest.fixture(scope="module")
def inputs(model, processor, studies):
    return prompt_inputs(model, processor, studies[1], opening="The")


@torch.no_grad()
def test_edit_is_the_difference_of_two_decodings(sae):
    h = torch.randn(3, 5, 32)
    edits = [Edit(4, 1.5, 2.0), Edit(9, 0.0, 2.0, "clamp"), Edit(11, -9.0, 1.0)]
    z = sae.encode(h)
    changed = z.clone()
    changed[..., 4] += 3.0
    changed[..., 9] = 0.0
    changed[..., 11] = (z[..., 11] - 9).clamp_min(0)
    want = h + sae.decode(changed) - sae.decode(z)
    torch.testing.assert_close(apply_edits(sae, edits, h), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        apply_edits(sae, edits, h) - h - (changed - z) @ sae.W_dec,
        torch.zeros_like(h),
        atol=1e-5,
        rtol=0,
    )


def test_empty_edit_returns_its_argument(sae):
    h = torch.randn(2, 32)
    assert apply_edits(sae, [], h) is h


@torch.no_grad()
@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_empty_edit_is_bitwise_nothing(model, sae, inputs, where):
    plain = model(**inputs).logits
    with steered(model, sae, [], where, inputs["input_ids"].shape[1]):
        empty = model(**inputs).logits
    assert torch.equal(plain, empty)


@torch.no_grad()
def test_clamping_to_the_present_value_changes_nothing(model, sae, inputs):
    plain = model(**inputs).logits
    with steered(model, sae, [Edit(4, 0.0, 1.0)]):
        same = model(**inputs).logits
    torch.testing.assert_close(plain, same, atol=1e-5, rtol=0)


def scores(model, inputs, use_cache):
    out = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


@torch.no_grad()
@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_cache_on_equals_cache_off(model, sae, inputs, where):
    """In float32, the dtype of the model: logits of up to a few units, to 1e-5."""
    length = inputs["input_ids"].shape[1]
    with steered(model, sae, [Edit(4, 20.0, 1.0)], where, length):
        with_cache, logits_with = scores(model, inputs, True)
        without, logits_without = scores(model, inputs, False)
    assert logits_with.dtype == torch.float32 and torch.equal(with_cache, without)
    torch.testing.assert_close(logits_with, logits_without, atol=1e-5, rtol=0)
    assert not torch.allclose(logits_with, scores(model, inputs, True)[1], atol=1e-2)


@torch.no_grad()
def test_where_decides_which_positions_change(model, sae, inputs):
    length = inputs["input_ids"].shape[1]
    edit = [Edit(4, 20.0, 1.0)]
    plain = model(**inputs).logits
    with steered(model, sae, edit, "generated", length):
        assert torch.equal(model(**inputs).logits, plain)
    with steered(model, sae, edit, "generated", length - 3):
        late = model(**inputs).logits
    assert torch.equal(late[:, : length - 3], plain[:, : length - 3])
    assert (late[:, length - 3 :] - plain[:, length - 3 :]).abs().max() > 1e-3
    with steered(model, sae, edit, "prompt", 5):
        early = model(**inputs).logits
    assert (early[:, :5] - plain[:, :5]).abs().max() > 1e-3


@torch.no_grad()
def test_exception_in_generation_leaves_no_hook_behind(model, sae, inputs):
    plain = model(**inputs).logits
    with pytest.raises(KeyError), steered(model, sae, [Edit(4, 5.0, 1.0)]):
        raise KeyError
    assert torch.equal(model(**inputs).logits, plain)
    assert not model.model.language_model._forward_pre_hooks


def test_reports_before_and_after(model, processor, studies, sae):
    same = compare(model, processor, studies[0], sae, [], opening="The heart", max_new_tokens=6)
    assert same.before == same.after and same.before.startswith("The heart")
    other = compare(
        model,
        processor,
        studies[0],
        sae,
        [Edit(4, 200.0, 1.0)],
        opening="The heart",
        max_new_tokens=6,
    )
    assert other.before == same.before != other.after


def test_prompt_inputs_never_hold_the_studys_report(model, processor, studies):
    ids = prompt_inputs(model, processor, studies[0])["input_ids"][0]
    text = processor.tokenizer.decode(ids.tolist())
    assert text.endswith("ASSISTANT: ") and studies[0].report not in text
    assert study_text(studies[0])["assistant_text"] == studies[0].report


def test_bad_edits(sae, model):
    with pytest.raises(ConfigError, match="did you mean 'clamp'"):
        Edit(1, 1.0, 1.0, "clmp")
    with pytest.raises(ConfigError, match="it never fires"):
        Edit(1, 1.0, 0.0)
    with (
        pytest.raises(ConfigError, match="has latents 0–63"),
        steered(model, sae, [Edit(64, 1, 1)]),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="edited twice"),
        steered(model, sae, [Edit(1, 1, 1), Edit(1, 2, 1)]),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="did you mean 'prompt'"),
        steered(model, sae, [], "promt"),
    ):
        pass
