"""What a training step should cost on a GPU, pass by pass: modelled, not measured.

    python -m sae.kernels.gpu_model --latents 32768 --k 64

A pass takes the longer of its arithmetic at :attr:`Gpu.gemm` and its bytes at the rate of where
they come from. Matrices in bf16, as the Triton kernels run them. Legend: B tokens, D width,
F latents, k mean active latents a token, G groups.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hooks.files import ConfigError

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Gpu:
    """Rates of a device, in units a second: a data sheet's peaks times a share often reached."""

    name: str
    gemm: float
    """bf16 operations of a matrix product: 68 % of the dense peak."""
    memory: float
    """Bytes to and from device memory: 85 % of the peak."""
    cache: float
    """Bytes of rows gathered from the L2 cache. An assumption; nobody measured it here."""


H100 = Gpu("H100 SXM", 0.68 * 990e12, 0.85 * 3.35e12, 5.5e12)
A100 = Gpu("A100 SXM 80 GB", 0.68 * 312e12, 0.85 * 2.04e12, 3.3e12)
GPUS = {"h100": H100, "a100": A100}


@dataclass(frozen=True)
class Shape:
    """Sizes of a step, and how the optimizer and the gathers run."""

    latents: int = 32_768
    k: float = 64
    batch: int = 8192
    width: int = 4096
    groups: int = 5
    adam: Literal["fused bf16", "fused", "separate"] = "fused"
    """``fused``: gradients never stored, moments in fp32 or bf16; ``separate``: gradients stored
    in fp32. All keep fp32 weights and a bf16 copy."""
    gathers: Literal["cache", "memory"] = "cache"
    """Where gathered rows are read from; slices of the width that fit make it the cache."""
    whole_rows: bool = True
    """Whether a fused update gathers ``S`` for whole decoder rows, as the programs do now, to know
    their length; slices then do not fit the cache."""
    filter_reads: int = 2
    """Readings of the pre-activations by the filter: to count, and to write."""

    def __post_init__(self) -> None:
        for name, value in (("adam", self.adam), ("gathers", self.gathers)):
            known = ADAM_BYTES if name == "adam" else ("cache", "memory")
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; known are {', '.join(known)}")
        if min(self.latents, self.k, self.batch, self.width, self.groups) <= 0:
            raise ConfigError(f"sizes must be positive, found {self}")


ADAM_BYTES = {
    "fused bf16": 2 * FP32 + 4 * BF16 + BF16,
    "fused": 6 * FP32 + BF16,
    "separate": 8 * FP32 + BF16,
}
"""Of each parameter: weight and two moments read and written, the copy written; if separate, the
gradient written and read."""


class Pass(NamedTuple):
    """One row of the table."""

    name: str
    bytes: float
    flops: float
    ms: float
    """Modelled."""


def sparse_step(shape: Shape, gpu: Gpu = H100) -> list[Pass]:
    """The passes of a step as the Triton kernels run it.

    >>> round(sum(row.ms for row in sparse_step(Shape(adam="fused bf16"))), 1)
    9.5
    """
    B, D, F = shape.batch, shape.width, shape.latents
    entries = B * shape.k
    pre = B * F * BF16
    product = 2 * B * D * F
    gather = (entries * D * BF16, 2 * entries * D)
    source = gpu.cache if shape.gathers == "cache" else gpu.memory
    whole = shape.whole_rows and shape.adam != "separate"
    return [
        _row("encoder product", gpu, F * D * BF16, product),
        _row("pre-activations written, filtered", gpu, (1 + shape.filter_reads) * pre, 0),
        _row("decode: gather W_dec", gpu, *gather, source),
        _row("reverse walk: gather W_dec", gpu, *gather, source),
        _row("reverse walk: write S", gpu, shape.groups * B * D * BF16, 0),
        _row("decoder gradient: gather S", gpu, *gather, gpu.memory if whole else source),
        _row("encoder gradient: gather x", gpu, *gather, source),
        _row(f"Adam, {shape.adam}", gpu, 2 * F * D * ADAM_BYTES[shape.adam], 0),
    ]


def dense_step(shape: Shape, gpu: Gpu = H100) -> list[Pass]:
    """The same step as five matrix products, each prefix's reconstruction adding to the last.

    Eighteen passes over ``[B, F]`` for ReLU, selection, mask and their gradients are assumed.
    """
    B, D, F = shape.batch, shape.width, shape.latents
    return [
        _row("five matrix products", gpu, 5 * F * D * BF16, 5 * 2 * B * D * F),
        _row("elementwise passes over [B, F]", gpu, 18 * B * F * BF16, 0),
        _row("Adam, separate", gpu, 2 * F * D * ADAM_BYTES["separate"], 0),
    ]


def _row(name: str, gpu: Gpu, size: float, flops: float, rate: float | None = None) -> Pass:
    seconds = max(size / (rate or gpu.memory), flops / gpu.gemm)
    return Pass(name, size, flops, 1e3 * seconds)


def table(shape: Shape, gpu: Gpu = H100) -> str:
    """Both steps as text, with totals and tokens a second."""
    lines = [f"Modelled, not measured: {gpu.name}, {shape}"]
    for title, rows in (("sparse", sparse_step(shape, gpu)), ("dense", dense_step(shape, gpu))):
        total = sum(row.ms for row in rows)
        lines += ["", f"{title:36}{'GB':>8}{'TFLOP':>8}{'ms':>8}{'share':>7}"]
        for name, size, flops, ms in rows:
            lines.append(f"{name:36}{size / 1e9:8.2f}{flops / 1e12:8.2f}{ms:8.2f}{ms / total:7.0%}")
        rate = shape.batch / total * 1e3 / 1e6
        lines.append(f"{'total':36}{'':16}{total:8.2f}   {rate:.2f} M tokens/s")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Modelled cost of a training step on a GPU.")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    default = Shape()
    for name in ("latents", "k", "batch", "width", "groups"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--adam", choices=ADAM_BYTES, default=default.adam)
    parser.add_argument("--gathers", choices=("cache", "memory"), default=default.gathers)
    arguments = vars(parser.parse_args())
    gpu = GPUS[arguments.pop("gpu")]
    sys.stdout.write(table(Shape(**arguments), gpu))


if __name__ == "__main__":
    main()
