"""k-sparse probes of study labels, on every code that stands beside a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hooks.files import ConfigError
from hooks.store import ActivationFolder
from sae.codes import Code, EvaluationConfig
from sae.intervals import auroc_interval, patient_codes, patient_draws
from sae.latent_scores import scorable
from sae.latents import gather
from sae.maxima import maxima_of
from sae.probing import sparse_probes


def probe_labels(
    beside: Mapping[str, Code],
    folder: ActivationFolder,
    site: str,
    labels: Mapping[str, Sequence[str]],
    config: EvaluationConfig,
) -> dict[str, Any]:
    """k-sparse probes of study labels on the largest activation of each study.

    Latents are chosen and weights fitted on training patients; AUROC and F1 are of held-out ones.

    Raises
    ------
    ConfigError
        If no study of the folder has an entry in ``labels``.
    """
    everyone = list(dict.fromkeys(folder.column("study")))
    known = torch.tensor([study in labels for study in everyone])
    studies = [study for study in everyone if study in labels]
    if not studies:
        raise ConfigError(
            f"none of the {len(everyone)} studies of {folder.folder} has labels, such as "
            f"{everyone[0]!r}; give the studies that were harvested"
        )
    owner = dict(zip(folder.column("study"), folder.column("patient"), strict=True))
    side = dict(zip(folder.column("study"), folder.heldout(config.heldout), strict=True))
    heldout = torch.tensor([bool(side[study]) for study in studies])
    names = sorted({label for study in studies for label in labels[study]})
    truth = torch.tensor([[n in labels[study] for n in names] for study in studies]).bool()
    truth = truth.view(len(studies), len(names))
    usable = scorable(truth, heldout, config.least)
    record: dict[str, Any] = {
        "n_studies": len(studies),
        "n_studies_unknown": len(everyone) - len(studies),
        "left_out": [name for name, ok in zip(names, usable.tolist(), strict=True) if not ok],
        "labels": {},
    }
    kept = [name for name, ok in zip(names, usable.tolist(), strict=True) if ok]
    if not kept:
        return record
    patient, n_patients = patient_codes(
        [owner[s] for s, out in zip(studies, heldout.tolist(), strict=True) if out]
    )
    draws = patient_draws(n_patients, config.draws, config.seed)
    record["labels"] = {label: {} for label in kept}
    for name, code in beside.items():
        maxima = maxima_of(code.encode, code.n_features, folder, site, None, config.batch)
        latents = gather(maxima.values[known])
        heldout_latents = latents.take(heldout)
        found = sparse_probes(latents, truth[:, usable], heldout, config.ks)
        for column, (label, by_k) in enumerate(zip(kept, found, strict=True)):
            carried = truth[heldout][:, usable][:, column]
            record["labels"][label][name] = {
                str(k): {
                    "auroc": auroc_interval(
                        heldout_latents.dense(probe.latents).double()
                        @ torch.tensor(probe.weights, dtype=torch.float64)
                        + probe.bias,
                        carried,
                        patient,
                        draws,
                    ).record(),
                    "f1": probe.f1,
                    "n_positive": probe.n_positive,
                    "latents": list(probe.latents),
                }
                for k, probe in by_k.items()
            }
    return record
