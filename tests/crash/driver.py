"""Runs trainings that die. Started by test_training.py as a process of its own, without threads.

    python -m tests.crash.driver ACTIVATIONS FOLDER {boundaries,random,full} [--mutate] [N]

Each training is a forked child. A child that is to die counts every call that makes a write
durable or visible; at the chosen one it tears whatever was not yet durable, as a power failure
may, and kills itself. Then a second child runs the same command to its end. The last line of
output is JSON.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from hooks import files
from hooks.store import ActivationFolder
from sae.train import train
from sae.trainer import TrainConfig

CALLS = ("fsync", "replace", "unlink", "rmdir")
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


def child(work):
    """Fork, run ``work``; returns the exit status of the child, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call):
    """Make this process die at the ``call``-th durable write."""
    count = 0

    def wrapped(name, real):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                if name == "fsync" and os.fstat(args[0]).st_mode & 0o100000:
                    os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


@contextmanager
def in_place(path):
    """What :func:`hooks.files.atomic_path` must not be: the suite has to notice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def result(out):
    weights = (out / "sae.safetensors").read_bytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def after_death(activations, out, want, dies):
    """How a run ends that dies by ``dies`` and is started again: ``ok`` or what went wrong."""
    status = child(lambda: (dies(), run(activations, out)))
    if status == 0:
        return "lived"
    if status != -signal.SIGKILL:
        return f"failed before it could die ({status})"
    if child(lambda: run(activations, out)) != 0:
        return "could not go on"
    return "ok" if result(out) == want else "went on to another result"


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
    if kind == "boundaries":
        call = 0
        while outcomes.get(call) != "lived":
            call += 1
            out = folder / f"call-{call}"
            outcomes[call] = after_death(activations, out, want, lambda n=call: die_at(n))
        del outcomes[call]
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

            outcomes[number] = after_death(activations, folder / f"time-{number}", want, timer)
    elif kind == "full":
        # Every file that can be written is smaller than this; then one is not.
        sizes = sorted({p.stat().st_size for p in (folder / "whole").rglob("*") if p.is_file()})
        for limit in sizes[1:]:
            out = folder / f"full-{limit}"

            def small(limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1, resource.RLIM_INFINITY))

            status = child(lambda small=small, out=out: (small(), run(activations, out)))
            again = child(lambda out=out: run(activations, out))
            good = status == 1 and again == 0 and result(out) == want
            outcomes[limit] = "ok" if good else f"ended with {status}, then {again}"
    sys.stdout.write(json.dumps(outcomes) + "\n")


if __name__ == "__main__":
    main()
