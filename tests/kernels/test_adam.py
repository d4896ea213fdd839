"""DictionaryAdam against torch.optim.Adam with each step written out."""

import pytest
import torch

from hooks.files import ConfigError
from sae.kernels import DictionaryAdam, Weights


def plain_step(weights, optimizer, gradients, lr, clip):
    for parameter, gradient in zip(weights, gradients, strict=True):
        parameter.grad = gradient.clone()
    grad, W = weights.W_dec.grad, weights.W_dec.detach()
    grad.sub_((grad * W).sum(dim=1, keepdim=True) * W)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(list(weights), clip)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    with torch.no_grad():
        weights.W_dec.div_(weights.W_dec.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_equals_torch_over_20_steps(dictionary, monkeypatch, clip):
    monkeypatch.setattr("sae.kernels.adam.BLOCK", 7 * 6)  # 40 rows in blocks of 6
    ours = dictionary(7, 40)
    theirs = Weights(*(tensor.clone().requires_grad_() for tensor in ours))
    adam = DictionaryAdam(ours, betas=(0.9, 0.99), eps=1e-7)
    optimizer = torch.optim.Adam(list(theirs), betas=(0.9, 0.99), eps=1e-7)
    for step in range(20):
        gradients = dictionary(7, 40, seed=100 + step, bias=1.0)
        plain_step(theirs, optimizer, gradients, 0.01 / (step + 1), clip)
        adam.update(gradients, 0.01 / (step + 1), clip)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-12, atol=1e-13)
    norms = ours.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_clipping_acts(dictionary):
    small, large = dictionary(7, 40), dictionary(7, 40)
    gradients = dictionary(7, 40, seed=5)
    DictionaryAdam(small, eps=1.0).update(Weights(*(g.clone() for g in gradients)), 0.1, 1e-3)
    DictionaryAdam(large, eps=1.0).update(gradients, 0.1)
    assert not torch.allclose(small.W_enc, large.W_enc)


def test_restored_state_continues_bit_for_bit(dictionary):
    def run(adam, weights, steps):
        for step in steps:
            adam.update(dictionary(7, 40, seed=step), 0.01, 1.0)

    straight = dictionary(7, 40)
    run(DictionaryAdam(straight), straight, range(6))

    weights = dictionary(7, 40)
    first = DictionaryAdam(weights)
    run(first, weights, range(3))
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = DictionaryAdam(weights)
    second.restore(saved | {"another": torch.zeros(1)})
    assert second.steps == 3
    run(second, weights, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True))


def test_restore_names_what_does_not_fit(dictionary):
    adam = DictionaryAdam(dictionary(7, 40))
    with pytest.raises(ConfigError, match=r"exp_avg\.W_enc should have shape \(40, 7\), found no"):
        adam.restore({})
    with pytest.raises(ConfigError, match=r"found shape \(41, 7\)"):
        adam.restore(DictionaryAdam(dictionary(7, 41)).tensors())
