"""Reports from a cache with room are those of the cache of transformers, bit for bit."""

import numpy as np
import pytest
import torch

from phantom.cache import ROOM, RoomyLayer, roomy_cache
from phantom.corpus import grey, normalised
from phantom.model import load
from phantom.study import sample_study


@pytest.fixture(scope="module")
def prompted():
    model, words = load()
    studies = [sample_study(seed, lateral=False, prior=False) for seed in range(2)]
    tokens = words.tokenize_reporting(indication="trauma .", technique="", comparison="none .")
    ids = torch.from_numpy(tokens.ids)[None].repeat(len(studies), 1)
    pixels = normalised(np.stack([grey(study.frontal) for study in studies]), words)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "max_new_tokens": 5,
        "eos_token_id": None,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }


@torch.no_grad()
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_is_the_same_with_beams_and_without(prompted, how):
    model, inputs = prompted
    plain = model.generate(**inputs, **how)
    roomy = model.generate(**inputs, **how, past_key_values=roomy_cache())
    assert torch.equal(plain.sequences, roomy.sequences)
    assert torch.equal(torch.stack(plain.logits), torch.stack(roomy.logits))


def test_a_layer_grows_and_survives_what_beams_do():
    layer, states = RoomyLayer(), torch.randn(2, 3, 2 * ROOM + 9, 4)
    given = torch.zeros(2, 3, 0, 4)
    at = 0
    for step in (5, 1, ROOM - 2, 3, ROOM, 1, 1):
        new = states[:, :, at : at + step]
        keys, values = layer.update(new, -new)
        given, at = torch.cat([given, new], 2), at + step
        assert torch.equal(keys, given) and torch.equal(values, -given)
    order = torch.tensor([1, 0])
    layer.batch_select_indices(order)
    new = torch.randn(2, 3, 1, 4)
    keys, values = layer.update(new, -new)
    want = torch.cat([given[order], new], 2)
    assert torch.equal(keys, want) and torch.equal(values, -want)
    layer.crop(-4)
    assert torch.equal(layer.update(new, new)[0], torch.cat([want[:, :, :-4], new], 2))
