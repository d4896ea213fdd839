"""Harvests that die. Started by test_harvest.py as a process of its own, without threads.

    python -m tests.crash.harvest_driver CHECKPOINT STUDIES FOLDER KIND [--mutate]

KIND is one of boundaries, ranks, full; with --mutate, boundaries are only the first few.

Each harvest is a forked child, see :mod:`tests.crash.dying`. One film of the studies is broken. The
last line of output is JSON.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from hooks import files
from hooks.harvest import Harvest, HarvestConfig
from hooks.maira2 import load_model
from hooks.processor import Maira2Processor
from hooks.studies import read_folder
from tests.crash.dying import at_every_write, child, die_at, in_place, on_full_disks

CONFIG = HarvestConfig(("llm.1.resid_post",), studies_per_part=4)


def run(model, processor, studies, out, rank=0, world=1):
    Harvest(model, processor, studies, CONFIG, out, rank=rank, world=world).run()


def result(out):
    """Every byte but temporary files of the killed, which nothing reads."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name[0] != "."}


def lost_rank(work, out, want, call):
    """Rank 1 of 2 dies at its ``call``-th write; then three ranks go on, one after another."""
    first = child(lambda: work(out, rank=0, world=2))
    lost = child(lambda: (die_at(call), work(out, rank=1, world=2)))
    if first != 0 or lost == 0:
        return "lived"
    unfinished = not (out / files.MANIFEST).exists()
    again = [child(lambda rank=rank: work(out, rank=rank, world=3)) for rank in range(3)]
    good = unfinished and again == [0, 0, 0] and result(out) == want
    return "ok" if good else f"unfinished {unfinished}, then {again}"


def main():
    checkpoint, studies, folder, kind, *rest = sys.argv[1:]
    folder = Path(folder)
    torch.set_num_threads(1)
    model, processor = load_model(checkpoint), Maira2Processor.from_pretrained(checkpoint)
    work = partial(run, model, processor, read_folder(Path(studies)))
    if "--mutate" in rest:
        from hooks import activation_writer

        for module in (files, activation_writer):
            module.atomic_path = in_place
    assert child(lambda: work(folder / "whole")) == 0
    want = result(folder / "whole")
    assert "skipped.jsonl" in want
    if kind == "boundaries":
        few = 8 if "--mutate" in rest else None
        outcomes = at_every_write(work, folder, want, result, few)
    elif kind == "full":
        outcomes = on_full_disks(work, folder, folder / "whole", want, result)
    else:
        outcomes = {
            call: lost_rank(work, folder / f"rank-{call}", want, call) for call in (1, 6, 11)
        }
        outcomes["together"] = together(work, folder / "together", want)
    sys.stdout.write(json.dumps(outcomes) + "\n")


def together(work, out, want):
    """Three ranks at the same moment."""
    children = []
    for rank in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                work(out, rank=rank, world=3)
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
        children.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return "ok" if ended == [0, 0, 0] and result(out) == want else f"ended with {ended}"


if __name__ == "__main__":
    main()
