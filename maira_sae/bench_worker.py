"""One trainer of a benchmark, in a process of its own; runs in a peer's environment too.

    python bench_worker.py NAME BATCHES.safetensors '{"d_model": …, "latents": …, "k": …, …}'

Reads a number of steps a line from standard input, trains on the batches in turn, and answers each
line with the seconds and the loss of every step as JSON. A 0 is answered with the peak memory since
before the trainer was made. Imports nothing of this library but for its own two trainers.
"""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
import json
import resource
import sys
import time
from itertools import accumulate

import torch
from safetensors.torch import load_file

LR = 3e-4
FAR = 10**9
"""Steps or tokens that no run reaches: no schedule ends, nothing is dead."""


def maira_sae(shape):
    """A step of :class:`sae.trainer.Trainer`, its metrics included."""
    from hooks.store import Moments
    from sae.trainer import TrainConfig, Trainer

    width = shape["d_model"]
    config = TrainConfig(
        site="",
        group_sizes=tuple(shape["groups"]),
        k=shape["k"],
        steps=FAR,
        batch=shape["batch"],
        lr=LR,
        warmup_steps=1,
        dead_after_tokens=FAR,
        threshold_start=0,
    )
    moments = Moments(1, torch.zeros(width, dtype=torch.float64), float(width))
    trainer = Trainer(config, moments, "", {}, "cuda" if torch.cuda.is_available() else "cpu")
    roles = torch.zeros(shape["batch"], dtype=torch.int8)

    def step(x, number):
        return trainer.step(x, roles, number)["loss"]

    return step


def dense(shape):
    """Plain torch: dense products, automatic differentiation, ``torch.optim.Adam(fused=True)``."""
    from sae.model import MatryoshkaSAE, SAEConfig, geometric_median

    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups = shape["groups"]
    sae = MatryoshkaSAE(SAEConfig(shape["d_model"], sum(groups), shape["k"], tuple(groups)))
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    idle = torch.zeros(sum(groups), dtype=torch.int64, device=device)

    def step(x, number):
        x = x.to(device)
        if number == 0:
            with torch.no_grad():
                sae.b_dec.copy_(geometric_median(x))
        pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        values = pre.detach().flatten()
        count = len(x) * shape["k"]
        likely = values[values > 0.9 * sae.threshold]
        values = likely if len(likely) >= count else values
        least = values.kthvalue(len(values) - count + 1).values
        z = pre * ((pre >= least) & (pre > 0))
        reconstruction, losses = sae.b_dec, []
        for latents, rows in zip(z.split(groups, dim=1), sae.W_dec.split(groups), strict=True):
            reconstruction = torch.addmm(reconstruction, latents, rows)
            losses.append((x - reconstruction).square().mean())
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = sae.W_dec.grad
            gradient.sub_((gradient * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec)
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
            sae.threshold.copy_(least)
            idle.add_(len(x))
            idle[(z > 0).any(dim=0)] = 0
        return loss.item()

    return step


def sae_lens(shape):
    """SAELens' own trainer and settings, on the same nested sizes."""
    from sae_lens import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        SAETrainer,
    )
    from sae_lens.config import SAETrainerConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=shape["d_model"],
        d_sae=sum(shape["groups"]),
        k=shape["k"],
        matryoshka_widths=list(accumulate(shape["groups"])),
        device=device,
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=FAR,
            train_batch_size_samples=shape["batch"],
            lr=LR,
            lr_end=LR,
            device=device,
            dead_feature_window=FAR,
        ),
        sae=MatryoshkaBatchTopKTrainingSAE(config),
        data_provider=iter(()),
    )

    def step(x, number):
        loss = trainer.step(x).loss.item()
        trainer.n_training_steps += 1
        return loss

    return step


def dictionary_learning(shape):
    """dictionary_learning's own trainer and settings, on the same groups."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    latents = sum(shape["groups"])
    trainer = MatryoshkaBatchTopKTrainer(
        steps=FAR,
        activation_dim=shape["d_model"],
        dict_size=latents,
        k=shape["k"],
        layer=0,
        lm_name="",
        group_fractions=[size / latents for size in shape["groups"]],
        lr=LR,
        warmup_steps=1,
        threshold_start_step=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )

    def step(x, number):
        return trainer.update(number, x)

    return step


TRAINERS = {
    "maira_sae": maira_sae,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "dense": dense,
}


def peak_mb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def serve(name, path, shape):
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    pool = load_file(path)["x"]
    pool = list(pool.to("cuda" if torch.cuda.is_available() else "cpu"))
    answers = sys.stdout
    sys.stdout = sys.stderr  # peers print
    before = peak_mb()
    step = TRAINERS[name](shape)
    done = 0
    for line in sys.stdin:
        count = int(line)
        if count == 0:
            answers.write(json.dumps({"peak_mb": peak_mb() - before}) + "\n")
            answers.flush()
            return
        seconds, losses = [], []
        for _ in range(count):
            began = time.perf_counter()
            losses.append(step(pool[done % len(pool)], done))
            seconds.append(time.perf_counter() - began)
            done += 1
        answers.write(json.dumps({"seconds": seconds, "losses": losses}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
