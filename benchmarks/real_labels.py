"""Agreement of single latents with held-out MeSH labels of real reports, without a language model.

    python -m benchmarks.real_labels --out bench-out [--steps 100] [--seed 0]

Harvests Open-i reports through the real text tower, trains a Matryoshka and a plain BatchTopK
dictionary in one pass, and prints, for the twelve commonest findings, the held-out AUROC of the
best single latent of each (chosen on other patients, by the maximum over a report's tokens)
beside a linear probe on the mean of the stream. Standard errors are over resampled patients.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from hooks.roles import Role
from hooks.studies import split_of
from maira_sae.demo import HELDOUT
from maira_sae.real_demo import RealDemo, RealDemoConfig
from sae import TrainConfig, train_all
from sae.dense_probe import dense_probe
from sae.intervals import auroc_interval, patient_codes, patient_draws
from sae.maxima import best_latent, study_maxima

NOT_FINDINGS = {
    "normal",
    "No Indexing",
    "Technical Quality of Image Unsatisfactory",
    *("Lung", "Thoracic Vertebrae", "Spine", "Diaphragm", "Aorta", "Aorta, Thoracic"),
    *("Markings", "Density"),
    *("Catheters, Indwelling", "Surgical Instruments", "Implanted Medical Device"),
}
"""Headings that name a body part, a bare descriptor, a device, or nothing."""
N_FINDINGS = 12

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

demo = RealDemo(arguments.out, replace(RealDemoConfig(), seed=arguments.seed))
demo.run(last="harvest")
c, folder = demo.config, demo.activations
nested = TrainConfig(
    site=c.site,
    expansion=c.expansion,
    k=c.k,
    steps=arguments.steps,
    batch=c.batch,
    lr=1e-3,
    warmup_steps=20,
    dead_after_tokens=100_000,
    threshold_start=arguments.steps // 4,
    threshold_beta=0.98,
    heldout=HELDOUT,
    seed=c.seed,
    measure_every=arguments.steps,
)
configs = {"matryoshka": nested, "batchtopk": replace(nested, group_fractions=(1.0,))}
saes = train_all(folder, configs, arguments.out / f"labels-saes-{arguments.steps}")

maxima = {name: study_maxima(sae, folder, Role.REPORT) for name, sae in saes.items()}
names = maxima["matryoshka"].studies
by_id = {study.id: study for study in demo.studies}
studies = [by_id[name] for name in names]
patients = [study.patient or study.id for study in studies]  # as Study.split has it
heldout = torch.tensor([split_of(patient, HELDOUT) == "heldout" for patient in patients])
nearer = torch.tensor([split_of(patient, 2 * HELDOUT) == "heldout" for patient in patients])
inner = ~heldout & nearer

report = torch.from_numpy(folder.column("role") == Role.REPORT.name.lower())
numbers = {name: i for i, name in enumerate(names)}
owner = torch.tensor([numbers[name] for name in folder.column("study")])[report]
stream = folder.rows(c.site, 0, folder.n_tokens)[report].float()
sums = torch.zeros(len(names), stream.shape[1]).index_add_(0, owner, stream)
means = sums / torch.bincount(owner, minlength=len(names)).clamp_min(1)[:, None]

counts = Counter(label for study in studies for label in set(study.labels))
findings = [name for name, _ in counts.most_common() if name not in NOT_FINDINGS][:N_FINDINGS]
codes, n_patients = patient_codes([p for p, out in zip(patients, heldout, strict=True) if out])
draws = patient_draws(n_patients, seed=c.seed)
shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(c.seed))


def error(scores, labels):
    """Half of the 95 % interval over patients, in standard errors."""
    figure = auroc_interval(scores, labels, codes, draws)
    return (figure.high - figure.low) / 3.92


heads = " ".join(f"{name:>15}" for name in (*maxima, "dense"))
print(f"{'finding':<26} {'n':>4} {heads} {'shuffled':>9}")
rows = []
for finding in findings:
    labels = torch.tensor([finding in study.labels for study in studies])
    row = {"finding": finding, "n": int(labels[heldout].sum())}
    for name, found in maxima.items():
        best = best_latent(found, labels, heldout)
        row[name] = best.auroc
        row[f"{name}_error"] = error(found.values[heldout][:, best.latent], labels[heldout])
    probe = dense_probe(means, labels, heldout, inner)
    row["dense"], row["dense_error"] = probe.auroc, error(probe.scores, labels[heldout])
    row["shuffled"] = best_latent(maxima["matryoshka"], labels[shuffled], heldout).auroc
    cells = [f"{row[k]:.3f} ± {row[f'{k}_error']:.3f}" for k in (*maxima, "dense")]
    print(
        f"{finding:<26} {row['n']:>4} " + " ".join(f"{cell:>15}" for cell in cells),
        f"{row['shuffled']:>9.3f}",
    )
    rows.append(row)
mean = {key: sum(row[key] for row in rows) / len(rows) for key in (*maxima, "dense", "shuffled")}
print("mean " + ", ".join(f"{key} {value:.3f}" for key, value in mean.items()))
print(json.dumps({"findings": rows, "mean": mean, "n_studies": len(names), "tokens": len(stream)}))
