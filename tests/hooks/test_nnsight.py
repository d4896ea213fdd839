"""The recipe of hooks/lens.py: nnsight reads, edits and generates as our hooks do."""

import pytest
import torch
from nnsight import NNsight

from hooks.sites import capture, resolve_site, site_names
from sae.model import MatryoshkaSAE, SAEConfig
from steering import Edit
from steering.generate import prompt_inputs, steered

SITE, LATENT, STRENGTH = "llm.1.resid_post", 5, 40.0


@pytest.fixture(scope="module")
def sae():
    return MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE), seed=3).eval()


@pytest.fixture(scope="module")
def inputs(model, processor, studies):
    return prompt_inputs(model, processor, studies[1])


@torch.no_grad()
def test_reads_are_equal(model, inputs):
    nn = NNsight(model)
    text = nn.model.language_model.layers[1]
    film = nn.model.vision_tower.encoder.layer[1]
    with nn.trace(**inputs):
        seen = film.output.save()
        projected = nn.model.multi_modal_projector.output.save()
        residual = text.output.save()
    sites = [resolve_site(model, name) for name in site_names(model)]
    with capture(sites, stop=False) as run:
        want = run(model, **inputs)
    assert torch.equal(residual, want[SITE])
    assert torch.equal(seen, want["vision.1.resid_post"])
    assert torch.equal(projected, want["projector"])


@torch.no_grad()
def test_an_edit_is_steering(model, inputs, sae):
    nn = NNsight(model)
    layer = nn.model.language_model.layers[1]
    direction = STRENGTH * sae.W_dec[LATENT]
    with nn.trace(**inputs):
        layer.output = layer.output + direction
        logits = nn.output.logits.save()
    with steered(model, sae, [Edit(LATENT, STRENGTH, 1.0)]):
        want = model(**inputs).logits
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, model(**inputs).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*was never reached")  # how nnsight ends an open loop
def test_generation_under_an_edit_is_steered_generation(model, inputs, sae):
    nn = NNsight(model)
    direction = STRENGTH * sae.W_dec[LATENT]
    with nn.edit() as (tracer, edited):
        layer = edited.model.language_model.layers[1]
        for _ in tracer.iter[:]:
            layer.output = layer.output + direction
    with edited.trace(fn=model.generate, **inputs, max_new_tokens=8, do_sample=False) as tracer:
        ids = tracer.result.save()
    with steered(model, sae, [Edit(LATENT, STRENGTH, 1.0)]):
        want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ids, want)
    assert not torch.equal(want, model.generate(**inputs, max_new_tokens=8, do_sample=False))
