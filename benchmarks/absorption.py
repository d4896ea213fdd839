"""Absorption of Matryoshka and BatchTopK dictionaries at equal L0, on planted features.

    python -m benchmarks.absorption --out bench-out/absorption [--seeds 0 1 2]

The same experiment as `maira-sae bench absorption`; see `maira_sae.bench_absorption`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from maira_sae.bench_absorption import AbsorptionBench, run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
arguments = parser.parse_args()
torch.set_num_threads(1)
config = replace(AbsorptionBench(), seeds=tuple(arguments.seeds))
print(json.dumps(run(config, arguments.out), indent=2))
