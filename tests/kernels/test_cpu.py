"""The CPU kernels against the reference, on the shapes and codes that break kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.files import ConfigError
from sae.kernels import Above, BatchTopK, Nested, ReferenceKernels, TopK, Weights, cost, encoder
from sae.kernels.autograd import nested_loss
from sae.kernels.cpu import CPUKernels
from sae.kernels.reference import code_of

REFERENCE = ReferenceKernels()
PREFIXES = (5, 17, 40)
NESTED = Nested(PREFIXES, (0.2, 0.3, 0.7))


def assert_same_code(ours, reference):
    assert torch.equal(ours.row_ptr, reference.row_ptr)
    assert torch.equal(ours.col, reference.col)
    torch.testing.assert_close(ours.val, reference.val)
    assert ours.shape == reference.shape
    assert ours.least == pytest.approx(reference.least)
    assert (ours.row_ptr.dtype, ours.col.dtype) == (torch.int64, torch.int64)


def assert_same_step(weights, code, x, nested, token_weights=None):
    """Every result but the code's, from one code."""
    ours = CPUKernels()
    decoded = ours.decode(weights, code, x, nested, token_weights)
    expected = REFERENCE.decode(weights, code, x, nested, token_weights)
    torch.testing.assert_close(decoded[:2], expected[:2])
    torch.testing.assert_close(
        ours.contributions(weights, code, nested), REFERENCE.contributions(weights, code, nested)
    )
    S = REFERENCE.suffixes(weights, code, expected, nested, token_weights)
    torch.testing.assert_close(ours.suffixes(weights, code, expected, nested, token_weights), S)
    gradients = REFERENCE.gradients(weights, code, x, S, nested)
    torch.testing.assert_close(ours.gradients(weights, code, x, S, nested), gradients)
    dirty = Weights(*(torch.full_like(tensor, 7.0) for tensor in weights))
    fused = ours.backward(weights, code, x, decoded, nested, token_weights, dirty)
    torch.testing.assert_close(fused, gradients)
    assert fused is dirty
    walked = ours.backward(weights, code, x, expected, nested, token_weights)  # nothing inner kept
    torch.testing.assert_close(walked, gradients)


@pytest.fixture(params=["sparse", "dense"])
def passes(request, monkeypatch):
    """Run a test with every group's passes forced one way."""
    below = {"sparse": 2.0**40, "dense": 0.0}[request.param]
    monkeypatch.setattr(cost, "sparse_below", lambda batch, latents: below)


def awkward_codes():
    generator = torch.Generator().manual_seed(3)
    z = torch.rand(12, 40, generator=generator, dtype=torch.float64)
    z *= torch.rand(12, 40, generator=generator) < 0.1
    cases = {"plain": z.clone()}
    cases["empty tokens"] = z.clone()
    cases["empty tokens"][[0, 5, 11]] = 0
    cases["empty latents at the ends of groups"] = z.clone()
    cases["empty latents at the ends of groups"][:, [0, 4, 5, 16, 17, 39]] = 0
    cases["empty inner group"] = z.clone()
    cases["empty inner group"][:, :5] = 0
    cases["empty middle group"] = z.clone()
    cases["empty middle group"][:, 5:17] = 0
    cases["empty last group"] = z.clone()
    cases["empty last group"][:, 17:] = 0
    cases["nothing active"] = torch.zeros_like(z)
    cases["one hot latent"] = torch.zeros_like(z)
    cases["one hot latent"][:, 20] = 1.5
    cases["one entry"] = torch.zeros_like(z)
    cases["one entry"][11, 39] = 2.0
    cases["everything active"] = z + 0.5
    return cases


@pytest.mark.parametrize("case", awkward_codes())
@pytest.mark.parametrize("weighted", [False, True])
def test_step_on_awkward_codes(dictionary, tokens, passes, case, weighted):
    token_weights = torch.rand(12, dtype=torch.float64) if weighted else None
    code = code_of(awkward_codes()[case])
    assert_same_step(dictionary(7, 40), code, tokens(12, 7), NESTED, token_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 64, 101])
@pytest.mark.parametrize("prefixes", [(40,), (1, 2, 40), PREFIXES])
def test_step_on_awkward_shapes(dictionary, tokens, dtype, d, prefixes):
    nested = Nested(prefixes, tuple(0.1 + i for i in range(len(prefixes))))
    weights, x = dictionary(d, 40, dtype), tokens(12, d, dtype)
    code = REFERENCE.encode(weights, x, BatchTopK(3))
    assert_same_step(weights, code, x, nested)


def test_gradients_in_many_blocks(dictionary, tokens, monkeypatch):
    """Results larger than a cache are made in blocks of latents, the last one short."""
    monkeypatch.setattr("sae.kernels.sparse.BLOCK", 7 * 3)
    weights, x = dictionary(7, 40), tokens(12, 7)
    assert_same_step(weights, REFERENCE.encode(weights, x, BatchTopK(3)), x, NESTED)


@pytest.fixture(params=[False, True], ids=["full", "screened"])
def kernels(request, monkeypatch):
    """Small blocks, so that floors rise on the way and blocks end short."""
    monkeypatch.setattr(encoder, "SCREEN_BLOCK", 12 * 7)
    monkeypatch.setattr(encoder, "FULL_BLOCK", 12 * 11)
    return CPUKernels(screen=request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0.01, 1, 2.4, 10, 39, 80])
def test_batch_topk_is_exact_for_any_floor(dictionary, tokens, kernels, k, dtype):
    weights, x = dictionary(7, 40, dtype), tokens(12, 7, dtype)
    expected = REFERENCE.encode(weights, x, BatchTopK(k))
    least = expected.least
    for floor in (0.0, 1e-30, 0.3 * least, 0.999 * least, least, 1.001 * least, 2 * least, 1e9):
        assert_same_code(kernels.encode(weights, x, BatchTopK(k, floor)), expected)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_batch_topk_of_any_shape(dictionary, tokens, data):
    batch, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    latents, k = data.draw(st.integers(1, 70)), data.draw(st.floats(0.1, 20))
    floor, screen = data.draw(st.floats(0, 5)), data.draw(st.booleans())
    scale = 10 ** data.draw(st.integers(-3, 3))
    weights = dictionary(d, latents, seed=data.draw(st.integers(0, 99)), bias=0.5)
    x = scale * tokens(batch, d, seed=data.draw(st.integers(0, 99)))
    expected = REFERENCE.encode(weights, x, BatchTopK(k))
    assert_same_code(CPUKernels(screen).encode(weights, x, BatchTopK(k, floor)), expected)


def test_screening_survives_lopsided_norms(dictionary, tokens, kernels):
    """One token a thousand times as long as the rest, latents of very different norms."""
    weights, x = dictionary(33, 200), tokens(12, 33)
    x[3] *= 1000
    weights.W_enc.mul_(torch.logspace(-3, 2, 200, dtype=torch.float64)[:, None])
    weights.b_enc.copy_(torch.linspace(-50, 50, 200, dtype=torch.float64))
    for k in (1, 5, 30):
        expected = REFERENCE.encode(weights, x, BatchTopK(k))
        for floor in (0.0, 0.5 * expected.least, expected.least):
            assert_same_code(kernels.encode(weights, x, BatchTopK(k, floor)), expected)


def rounding_conspires(d, side):
    """Every rounding to bf16 errs the same way, as far as it can, on one side of the product."""
    long, exact = torch.full((3, d), 1 + 2.0**-8 * 0.99), torch.ones(3, d)
    short = torch.full((3, d), 1 + 2.0**-8 * 1.01)  # rounded up to 1 + 2^-7
    off = torch.stack([long[0], short[0], exact[0]]).double()
    return (off, exact.double()) if side == "x" else (exact.double(), off)


@pytest.mark.parametrize("side", ["x", "W", "random", "whole"])
@pytest.mark.parametrize("d", [4, 100, 1000])
def test_screening_bounds_hold(tokens, d, side):
    """No entry at or above the floor is missed, and every bound is one."""
    if side == "random":
        x, W = tokens(50, d, seed=3), tokens(90, d, seed=4)
    elif side == "whole":  # exact in bf16, so only the result is rounded
        x, W = tokens(50, d, seed=3).sign(), tokens(90, d, seed=4).mul(8).round()
    else:
        x, W = rounding_conspires(d, side)
    b = torch.linspace(-0.3, 0.3, len(W), dtype=torch.float64)
    pre = x @ W.T + b
    positive = pre[pre > 0].sort().values
    for floor in (1e-6, float(positive[len(positive) // 2]), float(positive[-1])):
        found = encoder.Screener(x).candidates(W, b, floor)
        row, col = found.row.long(), found.col.long()
        assert (found.low <= pre[row, col]).all() and (pre[row, col] <= found.high).all()
        missed = pre >= floor
        missed[row, col] = False
        assert not missed.any()


def test_ties_with_the_least_all_stay(kernels):
    """Whole numbers, so that sums are exact in any order."""
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    W = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    weights = Weights(W, W.new_zeros(4), W, W.new_zeros(2))
    for floor in (0.0, 0.9, 1.0, 1.5):
        code = kernels.encode(weights, x, BatchTopK(1, floor))  # 3 asked; 2 twos, then 4 ones
        assert code.dense().tolist() == [[1, 1, 0, 0], [2, 2, 1, 0], [0, 0, 1, 0]]
        assert code.least == 1.0
    assert kernels.encode(weights, x, TopK(1)).dense().tolist() == [
        [1, 1, 0, 0],
        [2, 2, 0, 0],
        [0, 0, 1, 0],
    ]


def test_nothing_positive_gives_an_empty_code(dictionary, tokens, kernels):
    weights = dictionary(7, 40)
    weights.b_enc.fill_(-100.0)
    for selection in (BatchTopK(3), BatchTopK(3, 0.5), TopK(3)):
        code = kernels.encode(weights, tokens(12, 7), selection)
        assert code.val.numel() == 0 and code.least == 0 and code.row_ptr.tolist() == [0] * 13


@pytest.mark.parametrize("k", [1, 3, 39, 100])
def test_topk(dictionary, tokens, kernels, k):
    weights, x = dictionary(7, 40), tokens(12, 7)
    expected = REFERENCE.encode(weights, x, TopK(k))
    assert_same_code(kernels.encode(weights, x, TopK(k)), expected)


@pytest.mark.parametrize("k", [1, 3, 6, 50])
def test_auxiliary(dictionary, tokens, passes, k):
    weights, x, residual = dictionary(7, 40), tokens(12, 7), tokens(12, 7, seed=5)
    candidates = torch.tensor([30, 2, 3, 17, 39, 8])
    ours, theirs = dictionary(7, 40, seed=9), dictionary(7, 40, seed=9)  # added to, not overwritten
    loss = CPUKernels().auxiliary(weights, x, residual, candidates, k, 0.3, ours)
    expected = REFERENCE.auxiliary(weights, x, residual, candidates, k, 0.3, theirs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)
    none = candidates[:0]
    assert CPUKernels().auxiliary(weights, x, residual, none, k, 0.3, ours) == 0
    assert CPUKernels().auxiliary(weights, x, torch.ones_like(x), candidates, k, 0.3, ours) == 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("selection", [BatchTopK(2), BatchTopK(2, 0.7), TopK(2)])
@pytest.mark.parametrize("ours", [REFERENCE, CPUKernels(False), CPUKernels(True)])
def test_gradcheck(dictionary, tokens, ours, selection):
    weights = Weights(*(t.requires_grad_() for t in dictionary(3, 9)))
    x, token_weights = tokens(4, 3), torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    nested = Nested((2, 5, 9), (0.2, 0.3, 0.7))

    def loss(*four):
        return nested_loss(ours, Weights(*four), x, selection, nested, token_weights)[0]

    assert torch.autograd.gradcheck(loss, tuple(weights))


def test_autograd_refuses_what_it_lacks(dictionary, tokens):
    weights, x = dictionary(5, 14), tokens(4, 5).requires_grad_()
    with pytest.raises(ConfigError, match="detach"):
        nested_loss(REFERENCE, weights, x, TopK(2), Nested((14,), (1.0,)))


def test_other_types_are_refused(dictionary, tokens):
    weights, x = dictionary(5, 14, torch.bfloat16), tokens(4, 5, torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16"):
        CPUKernels().encode(weights, x, TopK(2))


@pytest.mark.parametrize("screen", [False, True])
def test_equal_inputs_give_equal_bits(dictionary, tokens, screen):
    weights, x = dictionary(65, 700, torch.float32), tokens(300, 65, torch.float32)
    nested = Nested((50, 200, 700), (0.2, 0.3, 0.7))

    def step():
        ours = CPUKernels(screen)
        code = ours.encode(weights, x, BatchTopK(9, 0.5))
        decoded = ours.decode(weights, code, x, nested)
        out = weights.zeros()
        ours.backward(weights, code, x, decoded, nested, out=out)
        ours.auxiliary(weights, x, decoded.residual, torch.arange(100), 20, 0.1, out)
        return [*code[:3], *decoded[:2], *out]

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_a_dense_inner_group_is_written_out(dictionary, tokens):
    """The cost model splits a step: matrix products inside, gathers outside."""
    z = torch.zeros(64, 40, dtype=torch.float64)
    z[:, :5] = 1.0
    z[::8, 30] = 2.0
    code = code_of(z)
    assert code.val.numel() == 328
    assert cost.sparse_below(64, 5) <= 64 * 5  # group 1 is full
    assert cost.sparse_below(64, 23) > 8  # group 3 has one latent on every eighth token
    assert_same_step(dictionary(7, 40), code, tokens(64, 7), NESTED)


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 100.0])
def test_everything_above_a_threshold(dictionary, tokens, threshold, screen):
    weights, x = dictionary(9, 40), tokens(21, 9)
    ours = CPUKernels(screen).encode(weights, x, Above(threshold))
    assert_same_code(ours, REFERENCE.encode(weights, x, Above(threshold)))
    pre = torch.relu((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc)
    torch.testing.assert_close(ours.dense(), pre * (pre > threshold))


def test_entries_of_at_least_a_limit_or_a_limit_each(dictionary, tokens):
    code = REFERENCE.encode(dictionary(9, 40), tokens(6, 9), TopK(5))
    z = code.dense()
    assert_same_code(code.at_least(0.8), code_of(z * (z >= 0.8)))
    each = torch.linspace(0.1, 1.5, 6, dtype=z.dtype)
    assert_same_code(code.at_least(each), code_of(z * (z >= each[:, None])))
    assert code.at_least(1e9).least == 0
