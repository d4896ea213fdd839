"""Runs trainings that die. Started by test_training.py as a process of its own, without threads.

    python -m tests.crash.driver ACTIVATIONS FOLDER {boundaries,random,full} [--mutate] [N]

Each training is a forked child, see :mod:`tests.crash.dying`. The last line of output is JSON.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from hooks import files
from hooks.store import ActivationFolder
from sae.train import train
from sae.trainer import TrainConfig
from tests.crash.dying import after_death, at_every_write, child, in_place, on_full_disks

STEPS = 12


def run(activations, out):
    config = TrainConfig(
        site="llm.1.resid_post",
        expansion=2,
        k=4,
        steps=STEPS,
        batch=64,
        lr=1e-3,
        warmup_steps=1,
        threshold_start=2,
        checkpoint_every=4,
        keep_checkpoints=1,
        measure_every=6,
        measure_rows=64,
    )
    train(ActivationFolder(activations), config, out)


def result(out):
    weights = (out / "sae.safetensors").read_bytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def main():
    activations, folder, kind, *rest = sys.argv[1:]
    folder = Path(folder)
    torch.set_num_threads(1)
    if "--mutate" in rest:
        from hooks import store  # noqa: F401
        from sae import checkpoint, model

        for module in (files, checkpoint, model):
            module.atomic_path = in_place
    assert child(lambda: run(activations, folder / "whole")) == 0
    want = result(folder / "whole")
    outcomes = {}
    work = partial(run, activations)
    if kind == "boundaries":
        outcomes = at_every_write(work, folder, want, result)
    elif kind == "random":
        began = time.monotonic()
        child(lambda: run(activations, folder / "timed"))
        took = time.monotonic() - began
        rng = random.Random(0)
        for number in range(int(rest[0])):
            delay = rng.uniform(0.02, 0.95) * took

            def timer(delay=delay):
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, delay)

            out = folder / f"time-{number}"
            outcomes[number] = after_death(work, out, want, result, timer)
    elif kind == "full":
        outcomes = on_full_disks(work, folder, folder / "whole", want, result)
    sys.stdout.write(json.dumps(outcomes) + "\n")


if __name__ == "__main__":
    main()
