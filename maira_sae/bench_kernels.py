"""`maira-sae bench kernels`: where a training step's time goes, beside what the machine allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from maira_sae.bench_train import POOL, StepShape
from sae.kernels import BatchTopK, DictionaryAdam, Nested, Weights, cost, gpu_model, select
from sae.model import MatryoshkaSAE, SAEConfig

PHASES = ("encoder", "decode", "gradients", "optimizer")
"""The encoder's phase includes the selection: the kernels select while they encode."""
PASSES = {
    "encoder": ("encoder product", "pre-activations"),
    "decode": ("decode:",),
    "gradients": ("reverse walk", "decoder gradient", "encoder gradient"),
    "optimizer": ("Adam",),
}
"""Passes of the GPU model that make up each phase, by how their names begin."""
LR = 3e-4


def budget(shape: StepShape, steps: int) -> dict[str, Any]:
    """Milliseconds of each phase, by median over steps, and what this machine's rates predict.

    A GPU's rates of products, streams and gathers are measured first, and the passes of
    :mod:`sae.kernels.gpu_model` are timed by them; a CPU's are those of :mod:`sae.kernels.cost`.
    What the model says of an H100 is given on any machine, as modelled.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(shape.threads)
    kernels = select(device)
    seconds = _run(shape, steps, device)
    measured = {phase: 1e3 * median(seconds[phase][steps // 4 :]) for phase in PHASES}
    result: dict[str, Any] = {
        "config": {**asdict(shape), "steps": steps, "kernels": kernels.name, "device": device},
        "ms": measured,
        "ms_step": sum(measured.values()),
        "modelled_h100": {row.name: row.ms for row in gpu_model.sparse_step(_gpu_shape(shape))},
    }
    if device == "cuda":
        gpu = ceilings(shape, device)
        result["machine"] = {"gemm": gpu.gemm, "stream": gpu.memory, "gather": gpu.cache}
        passes = gpu_model.sparse_step(_gpu_shape(shape), gpu)
        result["modelled_ms"] = {
            phase: sum(row.ms for row in passes if row.name.startswith(names))
            for phase, names in PASSES.items()
        }
        result["modelled_ms_step"] = sum(row.ms for row in passes)
    else:
        sizes = (shape.d_model, shape.latents, shape.batch)
        machine = cost.measure(*sizes, shape.k)
        step = cost.step_seconds(machine, *sizes, shape.k, cost.screens(torch.float32))
        predicted = {
            "encoder": step.encoder + step.selection,
            "decode": step.decode,
            "gradients": step.gradients,
            "optimizer": step.optimizer,
        }
        result["machine"] = asdict(machine)
        result["modelled_ms"] = {phase: 1e3 * s for phase, s in predicted.items()}
        result["modelled_ms_step"] = 1e3 * step.total
    return result


def _run(shape: StepShape, steps: int, device: str) -> dict[str, list[float]]:
    kernels = select(device)
    groups = shape.groups
    nested = Nested(tuple(accumulate(groups)), (1 / len(groups),) * len(groups))
    sae = MatryoshkaSAE(SAEConfig(shape.d_model, shape.latents, shape.k)).to(device)
    weights = Weights(*(p.detach() for p in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)))
    optimizer, gradients, floor = DictionaryAdam(weights), weights.zeros(), 0.0
    pool = shape.batches().to(device)
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    last = 0.0

    def done(phase: str) -> None:
        nonlocal last
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[phase].append(now - last)
        last = now

    for number in range(steps):
        x = pool[number % POOL]
        last = time.perf_counter()
        code = kernels.encode(weights, x, BatchTopK(shape.k, floor))
        floor = 0.9 * code.least
        done("encoder")
        decoded = kernels.decode(weights, code, x, nested)
        done("decode")
        kernels.backward(weights, code, x, decoded, nested, out=gradients)
        done("gradients")
        optimizer.update(gradients, LR, clip=1.0)
        done("optimizer")
    return seconds


def ceilings(shape: StepShape, device: str) -> gpu_model.Gpu:
    """A device's rates at the step's own sizes, each the best of several runs."""
    x = torch.randn(shape.batch, shape.d_model, device=device, dtype=torch.float32)
    W = torch.randn(shape.latents, shape.d_model, device=device, dtype=torch.float32)
    index = torch.randint(shape.latents, (shape.batch, shape.k), device=device)
    val = torch.ones(shape.batch, shape.k, device=device)
    copy = torch.empty_like(W)

    def best(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(10):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds[2:])

    bag = torch.nn.functional.embedding_bag
    return gpu_model.Gpu(
        name=torch.cuda.get_device_name() if device == "cuda" else device,
        gemm=2 * x.numel() * shape.latents / best(lambda: x @ W.T),
        memory=2 * W.numel() * W.element_size() / best(lambda: copy.copy_(W)),
        cache=index.numel()
        * shape.d_model
        * W.element_size()
        / best(lambda: bag(index, W, mode="sum", per_sample_weights=val)),
    )


def _gpu_shape(shape: StepShape) -> gpu_model.Shape:
    return gpu_model.Shape(
        *(shape.latents, shape.k, shape.batch, shape.d_model, len(shape.groups)), adam="separate"
    )


def table(result: Mapping[str, Any]) -> str:
    """The budget as text."""
    config, measured = result["config"], result["ms"]
    predicted = result.get("modelled_ms", {})
    lines = [
        f"{config['d_model']} wide, {config['latents']} latents, k {config['k']}, batch "
        f"{config['batch']}; kernels {config['kernels']!r} on {config['device']}, "
        f"{config['threads']} threads",
        f"{'ms a step':24}{'measured':>10}{'at rates':>10}{'ratio':>8}",
    ]
    rows = [(phase, measured[phase], predicted.get(phase)) for phase in PHASES]
    rows.append(("step", result["ms_step"], result.get("modelled_ms_step")))
    for name, ms, model in rows:
        beside = "" if model is None else f"{model:10.1f}{ms / model:8.1f}"
        lines.append(f"{name:24}{ms:10.1f}{beside}")
    if "machine" in result:
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in result["machine"].items())
        lines.append(f"rates of this machine, G/s: {rates}")
    total = sum(result["modelled_h100"].values())
    lines.append(f"on an H100, modelled and not measured: {total:.2f} ms")
    lines += [f"  {name:22}{ms:10.3f}" for name, ms in result["modelled_h100"].items()]
    return "\n".join(lines)
