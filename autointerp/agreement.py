"""Whether a latent knows a study's labels, without a language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from autointerp.scores import Score
from hooks.files import ConfigError
from sae.intervals import auroc_interval, patient_codes, patient_draws
from sae.latent_scores import auroc, best_threshold, f1

_SE = 3.919928  # a 95 % interval in standard errors


class Agreement(NamedTuple):
    """A latent's largest activation in each study against one label."""

    score: Score
    """Its value is the AUROC."""
    f1: float
    """On held-out studies, at the threshold."""
    threshold: float
    """Of best F1 on the other patients' studies."""


def agreement(
    latent: int,
    modality: str,
    about: str,
    maxima: Float[np.ndarray, " S"],
    labels: Bool[np.ndarray, " S"],
    patients: list[str],
    heldout: Bool[np.ndarray, " S"],
    seed: int = 0,
) -> Agreement:
    """How well a latent's maxima tell the studies that carry a label.

    The baseline is the AUROC for labels dealt anew to the held-out studies. A study without a
    value (NaN) is missing: it lowers the coverage.

    Raises:
        ConfigError: a side has one class only, or a patient is on both sides.
    """
    names = np.asarray(patients)
    both = np.intersect1d(names[heldout], names[~heldout])
    if len(both):
        raise ConfigError(f"patient {both[0]!r} is on both sides; split studies by patient")
    known = np.isfinite(maxima)
    for name, side in (("held-out", heldout & known), ("other", ~heldout & known)):
        if labels[side].all() or not labels[side].any():
            raise ConfigError(
                f"{int(labels[side].sum())} of {int(side.sum())} {name} studies carry {about!r}; "
                "give more studies, or leave this label out"
            )
    scored, other = heldout & known, ~heldout & known
    values, truth = torch.from_numpy(maxima[scored]), torch.from_numpy(labels[scored])
    threshold = best_threshold(torch.from_numpy(maxima[other]), torch.from_numpy(labels[other]))
    codes, n_patients = patient_codes(names[scored].tolist())
    figure = auroc_interval(values, truth, codes, patient_draws(n_patients, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    dealt = truth[torch.randperm(len(truth), generator=generator)]
    spread = (figure.high - figure.low) / _SE
    score = Score(
        latent=latent,
        scorer="agreement",
        modality=modality,
        value=figure.value,
        standard_error=spread if np.isfinite(spread) else None,
        baseline=float(auroc(values[:, None], dealt)[0]),
        auroc=figure.value,
        coverage=float(known[heldout].mean()),
        n=int(scored.sum()),
        n_patients=n_patients,
        about=about,
    )
    return Agreement(score, f1(values.double() >= threshold, truth), threshold)
