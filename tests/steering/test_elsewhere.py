"""An edit is the same in TransformerLens and nnsight as in our hooks."""

import pytest
import torch
from nnsight import NNsight

from hooks.files import ConfigError
from hooks.lens import boot, lens_name
from hooks.maira2 import Maira2ForConditionalGeneration
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit
from steering.elsewhere import intervention, lens_hook
from steering.generate import prompt_inputs, steered
from steering.selection import output_scores

SITE = "llm.1.resid_post"
EDITS = [
    Edit(4, 20.0, 1.0),
    Edit(5, mode="ablate"),
    Edit(6, 9.0, 1.0, "minimum"),
    Edit(7, 2.0, mode="scale"),
    Edit(8, 3.0, 2.0, "clamp"),
]


@pytest.fixture(scope="module")
def sae():
    return MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE), seed=3).eval()


@pytest.fixture(scope="module")
def inputs(model, processor, studies):
    return prompt_inputs(model, processor, studies[1])


@torch.no_grad()
def test_nnsight(model, inputs, sae):
    change = intervention(sae, EDITS)
    nn = NNsight(model)
    layer = nn.model.language_model.layers[1]
    with nn.trace(**inputs):
        layer.output = change(layer.output)
        logits = nn.output.logits.save()
    with steered(model, sae, EDITS):
        want = model(**inputs).logits
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, model(**inputs).logits, atol=1e-2)


@torch.no_grad()
def test_transformer_lens(checkpoint, inputs, sae):
    model = Maira2ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    got = boot(checkpoint).run_with_hooks(
        input=inputs["input_ids"],
        **given,
        fwd_hooks=[(lens_name(SITE), lens_hook(sae, EDITS))],
    )
    with steered(model, sae, EDITS):
        want = model(**inputs).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, model(**inputs).logits, atol=1e-2)


@torch.no_grad()
def test_a_latent_that_writes_a_word_scores_higher(model, processor, studies, sae):
    """The last layer's direction is a word's unembedding, or its opposite."""
    last = model.config.text_config.num_hidden_layers - 1
    own = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=f"llm.{last}.resid_post"), seed=3).eval()
    head = model.get_output_embeddings().weight
    own.W_dec[0] = head[200] / head[200].norm()
    own.W_dec[1] = 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [Edit(0, 100.0, 1.0), Edit(1, 1e-3, 1.0)]
    writes, idle = output_scores(model, processor, studies[0], own, edits)
    assert writes.latent == 0 and len(writes.words) == 20
    assert writes.score > idle.score
    films = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site="projector"), seed=3)
    with pytest.raises(ConfigError, match="not of the language model"):
        output_scores(model, processor, studies[0], films, edits)
