"""What each pass of a training step costs on a CPU, and so which way to run it.

A pass over a group's code is either a dense product, bounded by arithmetic, or a sparse gather,
bounded by how fast rows arrive. The choice must not vary between runs, or bits would: it is made
with fixed *ratios* of rates (:func:`sparse_below`, :func:`screens`). Rates measured on this
machine (:func:`measure`) serve predictions only (:func:`step_seconds`).

Legend: B tokens, D width, F latents, n active entries, all of one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae.kernels.sparse import bag, sampled_dots

GATHER_FLOPS = 8.0
"""Dense multiply-adds in the time of one gathered multiply-add.

A group's passes run sparse below a share of one in this many active entries. Measured at width 512
on one core of a Xeon with AVX-512 (fp32), gather and product break even at a share of 9–19 % for
decoding, 11–16 % for dot products, 9–12 % for gradients of weights, in groups of 128–2048 latents.
"""


def sparse_below(batch: int, latents: int) -> float:
    """Active entries of a group of ``latents`` below which its passes run sparse.

    >>> sparse_below(1024, 64)
    8192.0
    """
    return batch * latents / GATHER_FLOPS


def screens(dtype: torch.dtype) -> bool:
    """Whether a bf16 product that finds candidates beats the full product in ``dtype``.

    It does where the processor multiplies bf16 tiles (Intel AMX), some ten times as fast as fp32.
    """
    return torch.cpu._is_amx_tile_supported() and dtype in (torch.float32, torch.float64)


@dataclass(frozen=True)
class Machine:
    """Rates that bound a step on one machine, in units a second."""

    gemm: float
    """Operations of an fp32 matrix product."""
    gemm_bf16: float
    """Operations of a bf16 matrix product of the shape that screening uses."""
    stream: float
    """Bytes read or written in order, arrays larger than the caches."""
    gather_weights: float
    """Bytes of dictionary rows gathered and summed by token (large table)."""
    gather_tokens: float
    """Bytes of token rows gathered and summed by latent (small table)."""
    gather_dot: float
    """Bytes of dictionary rows gathered for dot products."""


def measure(d_model: int, latents: int, batch: int, k: int) -> Machine:
    """Measure the rates at a step's own sizes, each the best of several runs; about a second."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_model, generator=generator)
    W = torch.randn(latents, d_model, generator=generator)
    n = batch * k
    col = torch.randint(latents, (n,), generator=generator, dtype=torch.int32)
    row = torch.randint(batch, (n,), generator=generator, dtype=torch.int32)
    val = torch.ones(n)
    by_token = torch.arange(batch + 1, dtype=torch.int32) * k
    by_latent = torch.linspace(0, n, latents + 1).to(torch.int32)
    few, narrow = min(latents, 1024), min(latents, 512)
    x16, W16 = x.bfloat16(), W[:narrow].bfloat16()
    copy = torch.empty_like(W)
    gathered = n * d_model * 4
    return Machine(
        gemm=2 * batch * few * d_model / _best(lambda: x @ W[:few].T),
        gemm_bf16=2 * batch * narrow * d_model / _best(lambda: x16 @ W16.T),
        stream=2 * W.numel() * 4 / _best(lambda: copy.copy_(W)),
        gather_weights=gathered / _best(lambda: bag(col, W, by_token, val)),
        gather_tokens=gathered / _best(lambda: bag(row, x, by_latent, val)),
        gather_dot=gathered / _best(lambda: sampled_dots(by_token, col, x, W)),
    )


@dataclass(frozen=True)
class Step:
    """Predicted seconds of each phase of one training step."""

    encoder: float
    """Products and gathers that give pre-activations."""
    selection: float
    """Passes over B × F that choose among them."""
    decode: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.encoder + self.selection + self.decode + self.gradients + self.optimizer


def step_seconds(
    machine: Machine, d_model: int, latents: int, batch: int, k: float, screen: bool
) -> Step:
    """A sparse step's time if every phase ran at the machine's measured rates.

    Encoder: one product, or a bf16 product, one stream over the weights to round them, and dot
    products for the candidates (about 1.5 n). Selection: one look at each result. Decoder: one
    gather. Gradients: a dot product and two gathers by latent, two matrices written. Optimizer: 7
    streams over each matrix, and 3 half-streams for the gradient's norm.
    """
    gathered = batch * k * d_model * 4
    matrix = latents * d_model * 4
    flops = 2 * batch * latents * d_model
    screened = (
        flops / machine.gemm_bf16 + matrix / machine.stream + 1.5 * gathered / machine.gather_dot
    )
    decode = gathered / machine.gather_weights
    by_latent = 2 * (gathered / machine.gather_tokens + matrix / machine.stream)
    return Step(
        encoder=screened if screen else flops / machine.gemm,
        selection=(2 if screen else 4) * batch * latents / machine.stream,
        decode=decode,
        gradients=gathered / machine.gather_dot + by_latent,
        optimizer=(7 * 2 + 3) * matrix / machine.stream,
    )


def _best(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
