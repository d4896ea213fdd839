"""What single latents know on the phantom, over seeds of studies and dictionaries.

    python -m benchmarks.phantom --out bench-out [--seeds 0 1 2]

Runs the stages of `maira-sae demo` up to the truth for each seed (resuming what is there) and
prints every finding's AUROC, then means with their spread over seeds.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from maira_sae.phantom_demo import PhantomDemo, PhantomDemoConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
arguments = parser.parse_args()

runs = {
    seed: PhantomDemo(
        arguments.out / f"phantom-{seed}", replace(PhantomDemoConfig(), seed=seed)
    ).run(last="truth")
    for seed in arguments.seeds
}
columns = ("auroc", "random_auroc", "patch_auroc", "random_patch_auroc", "pixel_auroc")
print(f"{'finding':<20}" + "".join(f"{column:>20}" for column in columns))
findings = [run["truth"]["findings"] for run in runs.values()]
for name in findings[0]:
    values = [[run[name][column] for run in findings] for column in columns]
    print(f"{name:<20}" + "".join(f"{np.mean(v):>13.3f} ±{np.std(v, ddof=1):.3f}" for v in values))
print()
for key in ("auroc", "random_auroc", "patch_auroc", "random_patch_auroc"):
    means = [run["truth"]["mean_over_findings"][key] for run in runs.values()]
    print(f"mean {key:<20} " + "  ".join(f"{mean:.4f}" for mean in means))
for stream in ("text", "vision"):
    for seed, run in runs.items():
        quality = run["evaluate"] if stream == "text" else run["evaluate"]["vision_quality"]
        print(f"seed {seed} {stream:<6} FVU {quality['fvu']:.4f}  L0 {quality['l0']:.2f}")
