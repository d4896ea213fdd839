"""One training step: these kernels against plain torch, on this machine.

    python -m benchmarks.kernels --d-model 512 --latents 8192 --k 32 --batch 2048

Processes run with ``OMP_WAIT_POLICY=PASSIVE`` unless the environment says otherwise: by default
OpenMP's threads spin while they wait for one another, and on a machine with other work that makes
short parallel regions, of which a sparse step has many, several times slower.

Each variant runs in a process of its own, so that its peak memory is its own; the two take turns,
block by block, so that both see the same load. *Plain* is a dense Matryoshka BatchTopK step by
automatic differentiation with ``torch.optim.Adam(fused=True)``, as in :mod:`sae.train`. *Ours* is
the same mathematics through :mod:`sae.kernels`. Both train on the same synthetic tokens (sparse
sums of hidden directions) from the same start; their losses after ``--steps`` must agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sae.kernels import BatchTopK, CPUKernels, DictionaryAdam, Nested, Weights, cost
from sae.model import MatryoshkaSAE, SAEConfig, group_sizes_of

LR = 3e-4
CLIP = 1.0
POOL = 16
"""Different batches; training cycles through them."""
TURN = 5
"""Steps a variant runs before the other has its turn."""
PHASES = ("encoder", "selection", "decode", "gradients", "optimizer")


@dataclass(frozen=True)
class Shape:
    d_model: int
    latents: int
    k: int
    batch: int
    threads: int

    def nested(self) -> Nested:
        sizes = group_sizes_of(self.latents)
        return Nested(tuple(accumulate(sizes)), (1 / len(sizes),) * len(sizes))

    def batches(self) -> list[Tensor]:
        """Sums of ``k / 2`` of 2 F hidden directions a token, with a little noise, norm² near d."""
        generator = torch.Generator().manual_seed(0)
        active = max(1, self.k // 2)
        hidden = torch.randn(2 * self.latents, self.d_model, generator=generator)
        chance = 1 / torch.arange(20, 20 + 2 * self.latents)
        batches = []
        for _ in range(POOL):
            n = self.batch * active
            index = torch.multinomial(chance, n, replacement=True, generator=generator)
            size = torch.rand(n, generator=generator) + 0.5
            x = torch.nn.functional.embedding_bag(
                index.view(self.batch, active),
                hidden,
                mode="sum",
                per_sample_weights=size.view(self.batch, active),
            )
            x += 0.1 * torch.randn(x.shape, generator=generator)
            batches.append(x * self.d_model**0.5 / x.norm(dim=1).mean())
        return batches

    def model(self) -> MatryoshkaSAE:
        return MatryoshkaSAE(SAEConfig(self.d_model, self.latents, self.k), seed=0)


class Timer:
    """Seconds of each phase of each step, and of the processor over each whole step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.processor: list[float] = []

    def start(self) -> None:
        self.last = time.perf_counter()
        self.began = time.process_time()

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase].append(now - self.last)
        self.last = now
        if phase == PHASES[-1]:
            self.processor.append(time.process_time() - self.began)


def ours(shape: Shape, timer: Timer, batches: list[Tensor]) -> Iterator[float]:
    """Loss of each step through the kernels; they select while they encode."""
    sae, kernels, nested = shape.model(), CPUKernels(), shape.nested()
    with torch.no_grad():
        weights = Weights(
            sae.W_enc.T.contiguous(), sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach()
        )
    del sae
    optimizer, gradients, floor, step = DictionaryAdam(weights), weights.zeros(), 0.0, 0
    while True:
        x = batches[step % POOL]
        timer.start()
        code = kernels.encode(weights, x, BatchTopK(shape.k, floor))
        floor = 0.9 * code.least
        timer.stop("encoder")
        timer.stop("selection")
        decoded = kernels.decode(weights, code, x, nested)
        timer.stop("decode")
        kernels.backward(weights, code, x, decoded, nested, out=gradients)
        timer.stop("gradients")
        optimizer.update(gradients, LR, CLIP)
        timer.stop("optimizer")
        step += 1
        yield float(decoded.losses.mean())


def plain(shape: Shape, timer: Timer, batches: list[Tensor]) -> Iterator[float]:
    """Loss of each step by automatic differentiation, as :mod:`sae.train` does it."""
    sae = shape.model()
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    step = 0
    while True:
        x = batches[step % POOL]
        timer.start()
        pre = sae.pre_activations(x)
        timer.stop("encoder")
        z = sae.batch_topk(pre)
        with torch.no_grad():
            sae.threshold.copy_(z[z > 0].min())
        timer.stop("selection")
        loss = torch.stack([(x - part).square().mean() for part in sae.decode_prefixes(z)]).mean()
        timer.stop("decode")
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_gradient()
        timer.stop("gradients")
        torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        sae.normalize_decoder()
        timer.stop("optimizer")
        step += 1
        yield loss.item()


VARIANTS = {"ours": ours, "plain": plain}


def serve(name: str, shape: Shape, pipe: Connection) -> None:
    """Run as many steps as each message asks; answer the last loss; then send the measurements."""
    torch.set_num_threads(shape.threads)
    batches = shape.batches()
    before = peak_bytes()
    timer = Timer()
    steps = VARIANTS[name](shape, timer, batches)
    while count := pipe.recv():
        losses = [next(steps) for _ in range(count)]
        pipe.send(losses)
    pipe.send(
        {
            "seconds": timer.seconds,
            "processor": timer.processor,
            "peak_bytes": peak_bytes() - before,
        }
    )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(shape: Shape, steps: int) -> dict[str, Any]:
    """Both variants in turn, and what the machine's rates predict."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when a new process loads torch
    context = multiprocessing.get_context("spawn")
    pipes, processes, losses = {}, {}, {name: [] for name in VARIANTS}
    for name in VARIANTS:
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=serve, args=(name, shape, theirs))
        processes[name].start()
    for begin in range(0, steps, TURN):
        for name, pipe in pipes.items():
            pipe.send(min(TURN, steps - begin))
            losses[name] += pipe.recv()
    policy = os.environ["OMP_WAIT_POLICY"]
    result: dict[str, Any] = {"shape": asdict(shape), "steps": steps, "omp_wait_policy": policy}
    for name, pipe in pipes.items():
        pipe.send(0)
        told = pipe.recv()
        processes[name].join()
        skip = min(2 * TURN, steps // 2)  # the first steps also warm up
        phases = {phase: told["seconds"][phase][skip:] for phase in PHASES}
        whole = [sum(step) for step in zip(*phases.values(), strict=True)]
        result[name] = {
            "ms": {phase: 1e3 * median(seconds) for phase, seconds in phases.items()},
            "ms_step": 1e3 * median(whole),
            "ms_step_best": 1e3 * min(whole),
            "ms_step_processor": 1e3 * median(told["processor"][skip:]),
            "tokens_per_second": shape.batch / median(whole),
            "peak_mb": told["peak_bytes"] / 1e6,
            "loss": sum(losses[name][-TURN:]) / len(losses[name][-TURN:]),
        }
    mine, other = result["ours"], result["plain"]
    result["speedup"] = other["ms_step"] / mine["ms_step"]
    result["speedup_best"] = other["ms_step_best"] / mine["ms_step_best"]
    result["speedup_processor"] = other["ms_step_processor"] / mine["ms_step_processor"]
    result["memory_ratio"] = mine["peak_mb"] / other["peak_mb"]
    result["loss_difference"] = abs(mine["loss"] / other["loss"] - 1)
    with ProcessPoolExecutor(1, mp_context=context) as another:
        result["modelled"] = another.submit(modelled, shape).result()
    return result


def modelled(shape: Shape) -> dict[str, Any]:
    """Ceilings of this machine, measured now, and the milliseconds they allow."""
    torch.set_num_threads(shape.threads)
    sizes = (shape.d_model, shape.latents, shape.batch)
    machine = cost.measure(*sizes, shape.k)
    screen = cost.screens(torch.float32)
    steps = {
        "ours": cost.step_seconds(machine, *sizes, shape.k, screen),
        "plain": cost.dense_seconds(machine, *sizes),
    }
    return {"machine": asdict(machine), "screen": screen} | {
        name: {"ms": {p: 1e3 * s for p, s in asdict(step).items()}, "ms_step": 1e3 * step.total}
        for name, step in steps.items()
    }


def table(result: dict[str, Any]) -> str:
    model, machine = result["modelled"], result["modelled"]["machine"]
    lines = [
        "{d_model} wide, {latents} latents, k {k}, batch {batch}, {threads} threads".format(
            **result["shape"]
        ),
        f"{'ms a step (median)':20}{'ours':>10}{'modelled':>10}{'plain':>10}{'modelled':>10}",
    ]
    rows = [(phase, [result[v]["ms"][phase] for v in VARIANTS], phase) for phase in PHASES]
    for label, (mine, other), phase in rows:
        predicted = [model[v]["ms"][phase] for v in VARIANTS]
        lines.append(f"{label:20}{mine:10.1f}{predicted[0]:10.1f}{other:10.1f}{predicted[1]:10.1f}")
    mine, other = result["ours"], result["plain"]
    lines += [
        f"{'step':20}{mine['ms_step']:10.1f}{model['ours']['ms_step']:10.1f}"
        f"{other['ms_step']:10.1f}{model['plain']['ms_step']:10.1f}",
        f"{'step (best)':20}{mine['ms_step_best']:10.1f}{'':10}{other['ms_step_best']:10.1f}",
        f"{'step (processor)':20}{mine['ms_step_processor']:10.1f}{'':10}"
        f"{other['ms_step_processor']:10.1f}",
        f"{'tokens a second':20}{mine['tokens_per_second']:10.0f}{'':10}"
        f"{other['tokens_per_second']:10.0f}",
        f"{'peak memory, MB':20}{mine['peak_mb']:10.0f}{'':10}{other['peak_mb']:10.0f}",
        f"{'loss':20}{mine['loss']:10.5f}{'':10}{other['loss']:10.5f}",
        f"ours is {result['speedup']:.1f} times as fast ({result['speedup_best']:.1f} by best "
        f"steps, {result['speedup_processor']:.1f} by processor time) at "
        f"{result['memory_ratio']:.2f} of the memory; after {result['steps']} steps the losses "
        f"differ by {100 * result['loss_difference']:.3f} %",
        "machine: " + ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in machine.items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
    a = parser.parse_args(arguments)
    result = compare(Shape(a.d_model, a.latents, a.k, a.batch, a.threads), a.steps)
    print(json.dumps(result) if a.json else table(result))
    if result["loss_difference"] > 0.005:
        print("the losses differ by more than 0.5 %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
