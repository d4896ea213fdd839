"""A dictionary on held-out patients, beside PCA, random directions and other dictionaries.

Every figure has what it is a mean of and a 95 % interval by patient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder
from sae.calibrate import calibrate_by_role, calibrate_threshold
from sae.codes import EvaluationConfig, codes
from sae.cross_entropy import StudyLosses
from sae.intervals import patient_codes, patient_draws, ratio
from sae.label_probes import probe_labels
from sae.model import MatryoshkaSAE
from sae.stability import stability
from sae.tally import tally


def evaluate(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    config: EvaluationConfig | None = None,
    others: Mapping[str, MatryoshkaSAE] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The record that `maira-sae eval` writes, but for cross-entropy.

    Parameters
    ----------
    others
        Dictionaries of the same site, by name; their thresholds are set to ``sae``'s L0.
    labels
        Labels of studies, for the probes; studies without an entry are left out of them.

    Returns
    -------
    dict
        ``dictionaries`` (by name: figures overall and by role, dead latents, density),
        ``calibration`` (thresholds for L0 k, overall and by role), ``stability`` (by name of the
        other dictionary) and ``probing`` (by label and dictionary).

    Raises
    ------
    ConfigError
        If nobody is held out, or nothing fires.
    """
    config = config or EvaluationConfig()
    others = dict(others or {})
    for one in (sae, *others.values()):
        folder.check_trained(one.config.policy)
    heldout = folder.heldout(config.heldout)
    beside = codes(sae, folder, config, others)
    tallies = tally(beside, folder, sae.config.site, heldout, config)
    record: dict[str, Any] = {
        "site": sae.config.site,
        "config": asdict(config),
        "n_tokens": int(heldout.sum()),
        "n_patients": len(set(folder.column("patient")[heldout])),
        "interval": f"95 %, {config.draws} resamples of held-out patients",
        "dictionaries": {name: one.record() for name, one in tallies.items()},
        "calibration": _calibration(sae, folder, heldout, config),
    }
    rates, found = tallies["sae"].rates(), {}
    for name in (*others, "random"):
        other = beside[name].sae
        if other is not None and float((rates > 0).sum()) >= 2:
            alive = tallies[name].rates() > 0
            if int(alive.sum()) >= 2:
                match = stability(sae, other, rates, alive)
                found[name] = {
                    "mean_cosine": match.mean_cosine.record(),
                    "shared": match.shared.record(),
                }
    record["stability"] = found
    if labels is not None:
        record["probing"] = probe_labels(beside, folder, sae.config.site, labels, config)
    return record


def recovered(
    found: StudyLosses, patients: Sequence[str], config: EvaluationConfig
) -> dict[str, Any]:
    """Cross-entropy recovered by every replacement, against zero and against mean ablation.

    Parameters
    ----------
    patients
        Of the studies, in order.
    """
    patient, n_patients = patient_codes(patients)
    draws = patient_draws(n_patients, config.draws, config.seed)

    def by_patient(values: Tensor) -> Tensor:
        return torch.zeros(n_patients, dtype=torch.float64).index_add_(0, patient, values)

    sums = {name: by_patient(losses) for name, losses in found.losses.items()}
    n = int(found.n_tokens.sum())
    ablations = ("zero_ablated", "mean_ablated")
    return {
        name: {
            f"recovered_{ablation.removesuffix('_ablated')}": ratio(
                sums[ablation] - sums[name], sums[ablation] - sums["clean"], n, draws
            ).record()
            for ablation in ablations
        }
        for name in sums
        if name not in ("clean", *ablations)
    }


def _calibration(
    sae: MatryoshkaSAE, folder: ActivationFolder, heldout: np.ndarray, config: EvaluationConfig
) -> dict[str, Any]:
    """Thresholds at which L0 is k, on all held-out rows and on each role's."""
    target = float(sae.config.k)
    if target >= sae.config.n_latents:
        return {}
    try:
        overall = calibrate_threshold(sae, folder, heldout, target, config.batch)
        by_role = calibrate_by_role(sae, folder, heldout, target, config.batch)
    except ConfigError as error:  # fewer positive pre-activations than k: nothing to choose
        return {"target_l0": target, "impossible": str(error)}
    return {
        "target_l0": target,
        "threshold_now": float(sae.threshold),
        "overall": overall._asdict(),
        "roles": {name: one._asdict() for name, one in by_role.items()},
    }
