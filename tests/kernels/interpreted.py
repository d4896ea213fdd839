"""Parity of the Triton kernels with the dense float64 reference, in Triton's interpreter.

``test_triton.py`` runs this file in a process of its own with ``TRITON_INTERPRET=1``, which counts
when a program is decorated. The interpreter takes some 5 ms for one program instance, so shapes
are tiny. It runs instances one after another: races and missing barriers would not show, but no
program has shared writes. With ``TRITON_INTERPRET=0`` the same tests run on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sae.kernels.adam import DictionaryAdam
from sae.kernels.columns import range_sums
from sae.kernels.filtering import Tuning
from sae.kernels.interface import Above, BatchTopK, Code, Nested, TopK, Weights
from sae.kernels.reference import ReferenceKernels
from sae.kernels.triton import TritonKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="run with TRITON_INTERPRET=1"
)
ORACLE = ReferenceKernels()
SINGLE = 2e-6
"""Relative norm of a float32 result's error against float64."""


@dataclass(frozen=True)
class Case:
    """A dictionary, a batch and how work on it is cut up."""

    name: str
    batch: int = 8
    prefixes: tuple[int, ...] = (4, 10, 24)
    width: int = 40
    selection: BatchTopK | TopK | Above = field(default_factory=lambda: BatchTopK(2.5))
    bias: tuple[int, int, float] = (0, 0, 0.0)
    """A range of latents and their encoder bias."""
    silent: tuple[int, int] = (0, 0)
    """A range of tokens on which no latent is active."""
    whole: bool = False
    """Whole numbers only, so that products are exact and equal entries plenty."""
    token_weights: bool = False
    tuning: Tuning = field(default_factory=Tuning)

    @property
    def nested(self) -> Nested:
        count = len(self.prefixes)
        return Nested(self.prefixes, tuple((i + 1) / count for i in range(count)))

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Weights, Tensor, Tensor | None]:
        """Weights, batch and token weights."""
        random = torch.Generator().manual_seed(len(self.name))
        F, D = self.prefixes[-1], self.width

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=random)
            return values.round() if self.whole else values

        W = normal(F, D) if self.whole else normal(F, D) / D**0.5
        b_enc, b_dec = normal(F), normal(D)
        x = normal(self.batch, D)
        first, end, value = self.bias
        b_enc[first:end] = value
        if self.silent[1]:
            b_enc.sub_(1).clamp_max_(0)
            x[slice(*self.silent)] = b_dec
        weights = Weights(W, b_enc, normal(F, D) / D**0.5, b_dec)
        token_weights = torch.rand(self.batch, generator=random).round(decimals=1)
        weights = Weights(*(tensor.to(DEVICE, dtype) for tensor in weights))
        token_weights = token_weights.to(DEVICE) if self.token_weights else None
        return weights, x.to(DEVICE, dtype), token_weights


FINE = Tuning(cache_bytes=0, chunk=100, segment=4)
CASES = [
    Case("plain"),
    Case("odd width, two slices, chunks, segments", width=99, tuning=FINE),
    Case("one group, k of 1", prefixes=(24,), selection=BatchTopK(1), width=16),
    Case("empty tokens, width 1", silent=(2, 5), width=1),
    Case("empty group", bias=(4, 10, -50.0)),
    Case("one hot latent", batch=18, bias=(5, 6, 50.0), tuning=FINE, prefixes=(6, 12)),
    Case("ties", whole=True, width=3),
    Case("too few positive", bias=(0, 23, -50.0)),
    Case("none positive", bias=(0, 24, -50.0)),
    Case("every entry", selection=BatchTopK(24)),
    Case("token weights", token_weights=True, selection=TopK(3), tuning=FINE),
    Case("ties in tokens", whole=True, width=3, selection=TopK(2)),
    Case("above a threshold, itself left out", whole=True, width=3, selection=Above(1.0)),
    Case("k above F", selection=TopK(30), prefixes=(2, 5)),
    Case("one token, one latent", batch=1, prefixes=(1,), bias=(0, 1, 50.0)),
]


def double(weights: Weights) -> Weights:
    return Weights(*(tensor.double() for tensor in weights))


def as_double(code: Code) -> Code:
    return code._replace(val=code.val.double())


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).norm())
    return difference / float(expected.double().norm() + 1e-30) if difference else 0.0


def assert_same_code(found: Code, expected: Code) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.row_ptr, expected.row_ptr)
    assert torch.equal(found.col, expected.col)
    assert error(found.val, expected.val) < SINGLE
    assert abs(found.least - expected.least) <= 1e-5 * max(1.0, expected.least)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_is_the_references(case):
    kernels = TritonKernels(case.tuning)
    weights, x, token_weights = case.data()
    exact, x_exact = double(weights), x.double()
    t_exact = None if token_weights is None else token_weights.double()

    code = kernels.encode(weights, x, case.selection)
    assert_same_code(code, ORACLE.encode(exact, x_exact, case.selection))
    code_exact = as_double(code)

    decoded = kernels.decode(weights, code, x, case.nested, token_weights)
    expected = ORACLE.decode(exact, code_exact, x_exact, case.nested, t_exact)
    assert error(decoded.losses, expected.losses) < SINGLE
    assert error(decoded.residual, expected.residual) < SINGLE

    S = kernels.suffixes(weights, code, decoded, case.nested, token_weights)
    S_exact = ORACLE.suffixes(exact, code_exact, expected, case.nested, t_exact)
    assert error(S, S_exact) < SINGLE

    expected_gradients = ORACLE.gradients(exact, code_exact, x_exact, S_exact, case.nested)
    fused = kernels.backward(weights, code, x, decoded, case.nested, token_weights)
    gradients = kernels.gradients(weights, code, x, S, case.nested, out=weights.zeros())
    for name, want in expected_gradients._asdict().items():
        assert error(getattr(fused, name), want) < 4 * SINGLE, name
        assert error(getattr(gradients, name), want) < 4 * SINGLE, name

    sums = kernels.contributions(weights, code, case.nested)
    assert error(sums, ORACLE.contributions(exact, code_exact, case.nested)) < SINGLE


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.9, 1.0, 1.1, 100.0])
@pytest.mark.parametrize("tuning", [Tuning(), FINE], ids=["whole", "chunks"])
def test_any_guess_gives_the_exact_batch_topk(floor, tuning):
    """``floor`` is in units of the answer: far too low, just below, on it, above, hopeless."""
    weights, x, _ = Case("guess", batch=6).data()
    kernels = TritonKernels(tuning)
    expected = ORACLE.encode(double(weights), x.double(), BatchTopK(1.5))
    guess = BatchTopK(1.5, floor=floor * expected.least)
    assert_same_code(kernels.encode(weights, x, guess), expected)


def test_equal_inputs_give_equal_bits():
    case = CASES[1]
    kernels = TritonKernels(case.tuning)
    weights, x, _ = case.data()

    def step() -> list[Tensor]:
        code = kernels.encode(weights, x, case.selection)
        decoded = kernels.decode(weights, code, x, case.nested)
        return [*code[:3], *decoded[:2], *kernels.backward(weights, code, x, decoded, case.nested)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_bfloat16():
    """What is rounded to bfloat16 is ``x @ W_encᵀ``, ``S`` and the gradients' own type, no sum.

    The interpreter cuts bits off where a GPU rounds to nearest, so an error may be 2⁻⁷.
    """
    kernels, case = TritonKernels(FINE), Case("halves", width=72)
    weights, x, _ = case.data(torch.bfloat16)
    exact, x_exact = double(weights), x.double()
    code = kernels.encode(weights, x, case.selection)
    product = x_exact @ exact.W_enc.T
    pre = product + exact.b_enc - exact.W_enc @ exact.b_dec
    row = code.row()
    slack = product[row, code.col].abs() * 2**-8 + 1e-5
    assert ((code.val - pre[row, code.col]).abs() <= slack).all()
    assert code.val.dtype == torch.float32

    code_exact = as_double(code)
    decoded = kernels.decode(weights, code, x, case.nested)
    expected = ORACLE.decode(exact, code_exact, x_exact, case.nested)
    assert error(decoded.losses, expected.losses) < SINGLE
    assert error(decoded.residual, expected.residual) < SINGLE

    S_exact = ORACLE.suffixes(exact, code_exact, expected, case.nested)
    want = ORACLE.gradients(exact, code_exact, x_exact, S_exact, case.nested)
    out = Weights(*(torch.empty_like(tensor, dtype=torch.float32) for tensor in weights))
    kernels.backward(weights, code, x, decoded, case.nested, out=out)
    assert error(out.b_enc, want.b_enc) < 4 * SINGLE
    assert error(out.W_enc, want.W_enc) < 4 * SINGLE
    assert SINGLE < error(out.W_dec, want.W_dec) < 2**-7
    halves = kernels.backward(weights, code, x, decoded, case.nested)
    for name, value in want._asdict().items():
        assert getattr(halves, name).dtype == torch.bfloat16
        assert error(getattr(halves, name), value) < 2**-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auxiliary_loss_is_the_references(dtype):
    tolerance = SINGLE * 4 if dtype == torch.float32 else 2**-5
    kernels, case = TritonKernels(), Case("auxiliary")
    weights, x, _ = case.data(dtype)
    random = torch.Generator().manual_seed(3)
    residual = torch.randn(case.batch, case.width, generator=random).to(DEVICE)
    candidates = torch.tensor([1, 5, 6, 11, 20], device=DEVICE)
    for k in (2, 9):
        out, want = weights.zeros(), double(weights.zeros())
        arguments = (double(weights), x.double(), residual.double(), candidates, k)
        expected = ORACLE.auxiliary(*arguments, scale=0.5, out=want)
        found = kernels.auxiliary(weights, x, residual, candidates, k, scale=0.5, out=out)
        assert error(found, expected) < tolerance
        for a, b in zip(out, want, strict=True):
            assert error(a, b) < tolerance
    none = candidates[:0]
    assert kernels.auxiliary(weights, x, residual, none, 2) == 0
    assert kernels.auxiliary(weights, x, torch.ones_like(residual), candidates, 2) == 0


@pytest.mark.parametrize("shadowed", [False, True])
def test_fused_update_is_the_separate_one(shadowed):
    """Encoder and biases bit for bit on the first step; the decoder up to the order of its dots."""
    case = Case("update", bias=(2, 3, 20.0), tuning=FINE, prefixes=(4, 14), width=33)
    kernels = TritonKernels(case.tuning)
    weights, x, _ = case.data()
    weights.W_dec.div_(weights.W_dec.norm(dim=1, keepdim=True))
    twins = [Weights(*(tensor.clone() for tensor in weights)) for _ in range(2)]
    separate, fused = (DictionaryAdam(twin) for twin in twins)
    shadow = Weights(*(tensor.bfloat16() for tensor in weights))
    for step in range(3):
        for optimizer in (separate, fused):
            used = shadow if shadowed else optimizer.weights
            code = kernels.encode(used, x, case.selection)
            decoded = kernels.decode(used, code, x, case.nested)
            if optimizer is separate:
                gradients = optimizer.weights.zeros()
                kernels.backward(used, code, x, decoded, case.nested, out=gradients)
                optimizer.update(gradients, lr=1e-2)
            else:
                kernels.update(optimizer, 1e-2, used, code, x, decoded, case.nested)
        assert separate.steps == fused.steps == step + 1
        for name, tensor in separate.tensors().items():
            assert error(fused.tensors()[name], tensor) < SINGLE, name
        for a, b in zip(separate.weights, fused.weights, strict=True):
            assert error(b, a) < SINGLE
        if step == 0 and INTERPRETED:  # torch's own CUDA Adam contracts products and sums
            for name in ("W_enc", "b_enc", "b_dec"):
                assert torch.equal(getattr(separate.weights, name), getattr(fused.weights, name))
    norms = fused.weights.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    if shadowed:
        for a, b in zip(shadow, fused.weights, strict=True):
            assert ((a.float() - b).abs() <= b.abs() * 2**-7).all()


def test_offsets_pass_32_bits():
    """A table of more than 2³¹ elements, of which one row is ever touched."""
    rows, width = 2**25 + 2, 64
    table = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    table[-1] = torch.arange(width, device=DEVICE)
    one, last = torch.ones(1, device=DEVICE), torch.tensor([rows - 1], device=DEVICE)
    begin, end = torch.tensor([0], device=DEVICE), torch.tensor([1], device=DEVICE)
    sums = range_sums(table, last, 2 * one, begin, end, cache_bytes=0)
    assert torch.equal(sums[0], 2.0 * torch.arange(width, device=DEVICE))
    code = Code(torch.tensor([0, 1], device=DEVICE), last, one, (1, rows), 1.0)
    bias = torch.zeros(width, dtype=torch.bfloat16, device=DEVICE)
    weights = Weights(table, bias, table, bias)
    decoded = TritonKernels().decode(weights, code, bias[None], Nested((rows,), (1.0,)))
    assert torch.equal(decoded.residual[0], torch.arange(width, device=DEVICE).float())
