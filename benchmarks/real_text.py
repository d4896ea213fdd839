"""FVU against training tokens, and best-latent AUROC, on the real text tower.

    python -m benchmarks.real_text --out bench-out [--seed 0] [--steps 300]

Runs the stages of `maira-sae demo --real` up to the probes (resuming what is there) and prints one
row per held-out measurement.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from maira_sae.real_demo import RealDemo, RealDemoConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=RealDemoConfig.steps)
arguments = parser.parse_args()

config = replace(RealDemoConfig(), seed=arguments.seed, steps=arguments.steps)
results = RealDemo(arguments.out, config).run(last="probe")
print(f"{'tokens':>10} {'FVU':>8} {'L0':>7}")
for point in results["train"]["curve"]:
    print(f"{point['tokens']:>10,} {point['fvu']:>8.4f} {point['l0']:>7.2f}")
print(f"\n{'finding':<24} {'latent':>7} {'AUROC':>7} {'positives':>10}")
probes = results["probe"]["probes"]
for finding, probe in probes.items():
    print(f"{finding:<24} {probe['latent']:>7} {probe['auroc']:>7.3f} {probe['n_positive']:>10}")
mean = sum(probe["auroc"] for probe in probes.values()) / len(probes)
print(f"\nmean AUROC over {len(probes)} findings: {mean:.3f}")
print(
    "dead {dead_fraction:.2%}, cross-entropy recovered {ce_recovered:.4f} (zero ablation), "
    "{ce_recovered_mean_ablation:.4f} (mean ablation)".format(**results["evaluate"])
)
