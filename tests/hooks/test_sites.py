import pytest
import torch

from hooks.files import SiteError
from hooks.sites import capture, output_tensor, resolve_site, resolve_sites, rewrite, site_names


@pytest.fixture
def inputs(processor):
    ids = torch.tensor([[1] + [processor.image_token_id] * 9 + [300, 301, 302]])
    pixels = torch.rand(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def test_every_name_resolves_in_execution_order(model):
    names = site_names(model)
    assert len(names) == 2 * 5 + 1 + 3 * 5
    sites = [resolve_site(model, name) for name in names]
    assert sorted(sites, key=lambda site: site.order) == sites


@torch.no_grad()
def test_residual_streams_are_transformers_hidden_states(model, inputs):
    out = model(**inputs, output_hidden_states=True)
    with capture(resolve_sites(model, [f"llm.{i}.resid_post" for i in range(3)])) as run:
        got = run(model, **inputs)
    for i in range(2):  # the last hidden state there is after the final norm
        assert torch.equal(got[f"llm.{i}.resid_post"], out.hidden_states[i + 1])
    normed = model.model.language_model.norm(got["llm.2.resid_post"])
    assert torch.equal(normed, out.hidden_states[3])


@torch.no_grad()
@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_attention_and_mlp_outputs_add_up_to_the_stream(model, inputs, tower):
    names = [f"{tower}.0.resid_post"]
    names += [f"{tower}.1.{place}" for place in ("attn_out", "mlp_out", "resid_post")]
    with capture(resolve_sites(model, names)) as run:
        got = run(model, **inputs)
    total = got[f"{tower}.0.resid_post"] + got[f"{tower}.1.attn_out"] + got[f"{tower}.1.mlp_out"]
    torch.testing.assert_close(total, got[f"{tower}.1.resid_post"])


@torch.no_grad()
def test_projector_site_is_the_image_features(model, inputs):
    with capture(resolve_sites(model, ["projector"])) as run:
        got = run(model, **inputs)["projector"]
    want = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert torch.equal(got[0], want)


@torch.no_grad()
def test_forward_stops_after_the_last_site(model, inputs):
    reached = []
    handle = model.model.language_model.layers[1].register_forward_hook(
        lambda *_: reached.append(1)
    )
    try:
        with capture(resolve_sites(model, ["llm.0.resid_post"])) as run:
            run(model, **inputs)
        assert not reached
        with capture(resolve_sites(model, ["llm.0.resid_post"]), stop=False) as run:
            run(model, **inputs)
        assert reached
    finally:
        handle.remove()


@torch.no_grad()
def test_hooks_are_gone_afterwards_even_after_an_error(model, inputs):
    before = model(**inputs).logits
    hooks = dict(model.model.language_model.layers[1]._forward_hooks)

    def explode(value):
        raise RuntimeError("inside")

    with (
        pytest.raises(RuntimeError, match="inside"),
        rewrite(resolve_site(model, "llm.1.resid_post"), explode),
    ):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)
    assert dict(model.model.language_model.layers[1]._forward_hooks) == hooks


@torch.no_grad()
def test_rewrite_changes_what_flows_on(model, inputs):
    site = resolve_site(model, "llm.0.resid_post")
    with rewrite(site, lambda value: value):
        same = model(**inputs).logits
    with rewrite(site, torch.zeros_like):
        zeroed = model(**inputs).logits
    assert torch.equal(same, model(**inputs).logits)
    assert not torch.allclose(zeroed, same)


@torch.no_grad()
def test_a_rewrite_at_every_site_reaches_the_logits(model, inputs):
    """Also at the last vision layer, whose output transformers collects in a hook of its own."""
    plain = model(**inputs).logits
    for name in site_names(model):
        with rewrite(resolve_site(model, name), lambda value: value + 3 * value.std()):
            assert not torch.allclose(model(**inputs).logits, plain), name
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_the_stream_before_between_and_after(model, inputs, tower):
    places = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    names = [f"{tower}.0.resid_post", *(f"{tower}.1.{place}" for place in places)]
    with capture(resolve_sites(model, names)) as run:
        got = run(model, **inputs)
    before, pre, attn, mid, mlp, post = (got[name] for name in names)
    assert torch.equal(before, pre)
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)


@torch.no_grad()
def test_a_rewrite_between_attention_and_mlp_is_one_of_what_attention_adds(model, inputs):
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))
    with rewrite(resolve_site(model, "llm.1.resid_mid"), lambda value: value + push):
        between = model(**inputs).logits
    with rewrite(resolve_site(model, "llm.1.attn_out"), lambda value: value + push):
        added = model(**inputs).logits
    torch.testing.assert_close(between, added)
    site = resolve_site(model, "llm.1.resid_mid")
    with rewrite(site, lambda value: value):
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_tuple_outputs_are_unwrapped():
    assert output_tensor((torch.ones(1), None)).item() == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["llm.1.resid_pst"], r"did you mean 'llm\.1\.resid_post'"),
        (["llm.3.resid_post"], "asks for layer 3, this model's llm layers are 0–2"),
        (["vision.9.mlp_out"], "vision layers are 0–1"),
        (["llm.0.mlp_out", "vision.0.mlp_out"], "into two folders"),
        (["projector", "projector"], "named twice"),
        ([], "no site was named"),
    ],
)
def test_bad_sites_say_what_to_do(model, names, message):
    with pytest.raises(SiteError, match=message):
        resolve_sites(model, names)
