"""The oracle against automatic differentiation of the plain formulas, and against known answers."""

import pytest
import torch

from hooks.files import ConfigError
from sae.kernels import BatchTopK, Nested, ReferenceKernels, TopK, Weights, select
from sae.kernels.reference import code_of
from sae.loss import auxiliary_loss
from sae.model import MatryoshkaSAE, SAEConfig

REFERENCE = ReferenceKernels()
NESTED = Nested((5, 17, 40), (0.2, 0.3, 0.7))


def plain_pre(weights, x):
    return torch.relu((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc)


def plain_losses(weights, z, x, nested, token_weights):
    """Each prefix decoded from scratch."""
    t = torch.ones(len(x), 1, dtype=x.dtype) if token_weights is None else token_weights[:, None]
    decoded = [z[:, :m] @ weights.W_dec[:m] + weights.b_dec for m in nested.prefixes]
    return torch.stack([(t * (x - x_hat) ** 2).sum() / x.numel() for x_hat in decoded])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("selection", [BatchTopK(3), TopK(4)])
def test_gradients_are_those_of_autograd(dictionary, tokens, selection, weighted):
    weights = Weights(*(t.requires_grad_() for t in dictionary(7, 40)))
    x = tokens(12, 7)
    token_weights = torch.rand(12, dtype=x.dtype) if weighted else None
    code = REFERENCE.encode(weights, x, selection)
    decoded = REFERENCE.decode(weights, code, x, NESTED, token_weights)
    gradients = REFERENCE.backward(weights, code, x, decoded, NESTED, token_weights)

    z = plain_pre(weights, x) * (code.dense() > 0)
    losses = plain_losses(weights, z, x, NESTED, token_weights)
    expected = torch.autograd.grad(losses @ losses.new_tensor(NESTED.weights), list(weights))
    torch.testing.assert_close(decoded.losses, losses.detach())
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_selections_are_those_of_sorting(dictionary, tokens):
    weights, x = dictionary(7, 40), tokens(12, 7)
    pre = plain_pre(weights, x)
    kept = REFERENCE.encode(weights, x, BatchTopK(2.25)).dense()
    largest = pre.flatten().sort(descending=True).values[:27]
    assert torch.equal(kept[kept > 0].sort(descending=True).values, largest)
    kept = REFERENCE.encode(weights, x, TopK(3)).dense()
    assert torch.equal(kept, pre * (pre >= pre.sort(dim=1).values[:, -3:-2]))


def test_code_of_a_known_matrix():
    code = code_of(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.5]]))
    assert code.row_ptr.tolist() == [0, 1, 1, 3]
    assert code.col.tolist() == [1, 0, 2]
    assert code.row().tolist() == [0, 2, 2]
    assert code.val.tolist() == [2.0, 3.0, 0.5]
    assert code.firings().tolist() == [1, 1, 1]
    assert code.least == 0.5 and code.shape == (3, 3)


def test_auxiliary_is_the_loss_of_the_trainer(dictionary, tokens):
    """Same value and gradients as :func:`sae.loss.auxiliary_loss` under autograd."""
    weights, x = dictionary(6, 20), tokens(15, 6)
    residual = tokens(15, 6, seed=4)
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[1, 4, 5, 11, 19]] = True
    sae = MatryoshkaSAE(SAEConfig(6, 20, 2, (4, 6, 10)), dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc.T)
        sae.W_dec.copy_(weights.W_dec)
        sae.b_enc.copy_(weights.b_enc)
        sae.b_dec.copy_(weights.b_dec)
    expected = auxiliary_loss(sae, sae.pre_activations(x), residual, dead, k=2)
    (0.5 * expected).backward()
    out = weights.zeros()
    loss = REFERENCE.auxiliary(weights, x, residual, dead.nonzero().squeeze(1), 2, 0.5, out)
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(out, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True):
        grad = theirs.grad
        torch.testing.assert_close(ours, grad.T if theirs is sae.W_enc else grad)


def test_auxiliary_of_nothing_is_zero(dictionary, tokens):
    weights, x = dictionary(6, 20), tokens(15, 6)
    none = torch.zeros(0, dtype=torch.int64)
    assert REFERENCE.auxiliary(weights, x, x, none, 2) == 0
    assert REFERENCE.auxiliary(weights, x, torch.ones_like(x), torch.arange(3), 2) == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: BatchTopK(0), "k is 0"),
        (lambda: BatchTopK(3, -1.0), "floor is -1.0"),
        (lambda: TopK(0), "k is 0"),
        (lambda: Nested((3, 3), (1.0, 1.0)), "strictly ascending"),
        (lambda: Nested((3, 5), (1.0,)), "1 weights for 2 prefixes"),
        (lambda: select("cpu", "cuda"), "reference, cpu, triton"),
    ],
)
def test_mistakes_are_named(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


def test_the_environment_names_the_kernels(monkeypatch):
    monkeypatch.delenv("MAIRA_SAE_KERNELS", raising=False)
    assert select("cpu").name == "cpu"
    monkeypatch.setenv("MAIRA_SAE_KERNELS", "reference")
    assert select("cpu").name == "reference"
    assert select("cpu", "cpu").name == "cpu"
