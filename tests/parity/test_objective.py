"""The training objective against a literal dense float64 implementation, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.loss import auxiliary_loss, objective
from sae.model import MatryoshkaSAE, SAEConfig


def literal(x, W_enc, b_enc, W_dec, b_dec, k, groups, weights, dead, aux_weight, aux_k):
    """Written from the definitions, one token and one group at a time."""
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    order = pre.flatten().argsort(descending=True)[: len(x) * k]
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[order] = True
    z = torch.where(mask.reshape(pre.shape), pre, 0)
    total = torch.zeros((), dtype=x.dtype)
    end = 0
    for size, weight in zip(groups, weights, strict=True):
        end += size
        for b in range(len(x)):
            reconstruction = b_dec.clone()
            for j in range(end):
                reconstruction = reconstruction + z[b, j] * W_dec[j]
            total = total + weight * ((x[b] - reconstruction) ** 2).sum() / x.numel()
    residual = (x - (z @ W_dec + b_dec)).detach()
    indices = [j for j in range(len(dead)) if dead[j]]
    auxiliary = torch.zeros((), dtype=x.dtype)
    if indices:
        revived = torch.zeros_like(x)
        for b in range(len(x)):
            strongest = sorted(indices, key=lambda j: -float(pre[b, j].detach()))[:aux_k]
            revived = torch.stack(
                [
                    revived[i] + sum(pre[b, j] * W_dec[j] for j in strongest) * (i == b)
                    for i in range(len(x))
                ]
            )
        spread = ((residual - residual.mean(0)) ** 2).sum()
        if float(spread) < 1e-20:  # a perfect reconstruction leaves nothing to explain
            return total
        auxiliary = ((residual - revived) ** 2).sum() / spread
    return total + aux_weight * auxiliary


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 5),
    k=st.integers(1, 4),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    aux_k=st.integers(1, 5),
)
def test_loss_and_gradients(seed, batch, k, groups, dead_share, aux_k):
    generator = torch.Generator().manual_seed(seed)
    f, d = sum(groups), 5
    k = min(k, f)
    sae = MatryoshkaSAE(SAEConfig(d, f, k, tuple(groups)), seed=seed, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(f, generator=generator))
        sae.b_dec.copy_(torch.randn(d, generator=generator))
    x = torch.randn(batch, d, generator=generator, dtype=torch.float64)
    dead = torch.rand(f, generator=generator) < dead_share
    weights = torch.rand(len(groups), generator=generator).double()
    weights = (weights / weights.sum()).tolist()

    ours = objective(sae, x, dead, weights, aux_weight=0.25, aux_k=aux_k).total
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    got = torch.autograd.grad(ours, parameters, retain_graph=True)
    theirs = literal(x, *parameters, k, groups, weights, dead, 0.25, aux_k)
    want = torch.autograd.grad(theirs, parameters)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference)


def test_auxiliary_loss_is_zero_without_dead_latents_and_one_when_they_are_silent():
    sae = MatryoshkaSAE(SAEConfig(4, 8, 2, (8,)), dtype=torch.float64)
    residual = torch.randn(3, 4, dtype=torch.float64)
    residual -= residual.mean(0)
    pre = torch.zeros(3, 8, dtype=torch.float64)
    none, everything = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    assert float(auxiliary_loss(sae, pre, residual, none, 4)) == 0
    silent = auxiliary_loss(sae, pre, residual, everything, 4)
    assert float(silent.detach()) == pytest.approx(1)
    assert float(auxiliary_loss(sae, pre, residual * 0, everything, 4)) == 0


def test_group_losses_are_plain_mean_squared_errors():
    sae = MatryoshkaSAE(SAEConfig(4, 8, 2, (3, 5)), dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    result = objective(sae, x, torch.zeros(8, dtype=torch.bool), (0.5, 0.5), 0.0, 1)
    for error, reconstruction in zip(
        result.groups, sae.decode_prefixes(result.latents), strict=True
    ):
        torch.testing.assert_close(error, (x - reconstruction.detach()).square().mean())
