"""A dictionary on held-out patients, beside PCA, random directions and other dictionaries.

All stand at one L0, that of the dictionary: PCA has as many components, other dictionaries get a
threshold for it, random ones fire as often. Every figure has what it is a mean of and a 95 %
interval by patient.

Letters: n rows, d width, F latents, R roles, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.baselines import fit_pca, random_dictionary
from sae.calibrate import calibrate_by_role, calibrate_threshold
from sae.cross_entropy import StudyLosses
from sae.intervals import (
    DRAWS,
    Figure,
    auroc_interval,
    mean_interval,
    patient_codes,
    patient_draws,
    ratio,
)
from sae.latent_scores import scorable
from sae.latents import gather
from sae.maxima import maxima_of
from sae.model import MatryoshkaSAE
from sae.probing import sparse_probes
from sae.stability import stability

DENSITY_EDGES = tuple(float(edge) for edge in np.linspace(-7, 0, 29))
"""Of the histogram of log10 firing rates."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on whom."""

    heldout: float = 0.2
    """Share of patients."""
    ks: tuple[int, ...] = (1, 2, 5, 10)
    """Latents of the probes."""
    least: int = 5
    """Studies with a label, and without, that each side must have for a probe."""
    draws: int = DRAWS
    """Resamples of patients behind an interval."""
    sample_rows: int = 8192
    """Held-out rows on which the random dictionary's firing rates are set."""
    batch: int = 4096
    seed: int = 0


class Code(NamedTuple):
    """Anything that encodes rows and puts them together again."""

    encode: Callable[[Tensor], Tensor]
    """Rows ``[n, d]`` to features ``[n, m]``, 0 or above."""
    decode: Callable[[Tensor], Tensor]
    """Features back to rows."""
    n_features: int
    l0: float | None = None
    """Fixed, or None to count what fires."""
    sae: MatryoshkaSAE | None = None

    def reconstruct(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What is left of rows, for a model to go on with."""
        return self.decode(self.encode(x))


def code_of(sae: MatryoshkaSAE) -> Code:
    """A dictionary at inference."""

    def encode(x: Tensor) -> Tensor:
        return sae.encode(x.to(sae.W_dec))

    return Code(encode, sae.decode, sae.config.n_latents, None, sae)


def codes(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    config: EvaluationConfig,
    others: Mapping[str, MatryoshkaSAE],
) -> dict[str, Code]:
    """The dictionary under the name ``sae``, and all that stands beside it at its L0.

    The thresholds of ``others`` are changed. PCA's components are those of training patients.

    Raises
    ------
    ConfigError
        If another dictionary is of another site, or has a name that is taken.
    """
    site = sae.config.site
    heldout = folder.heldout(config.heldout)
    if not heldout.any() or heldout.all():
        raise ConfigError(
            f"{folder.folder}: {int(heldout.sum())} of {len(heldout)} rows are of held-out "
            "patients; change the held-out share, or harvest more studies"
        )
    l0 = _l0(sae, folder, heldout, config.batch)
    if l0 <= 0:
        raise ConfigError("no latent of the dictionary fires on held-out rows; train for longer")
    rank = min(max(round(l0), 1), sae.config.d_model)
    pca = fit_pca(folder, site, ~heldout, rank, config.batch)
    sample = _rows(folder, site, heldout, config.sample_rows).to(sae.W_dec)
    found = {
        "sae": code_of(sae),
        "pca": Code(pca.encode, pca.decode, 2 * rank, float(rank)),
        "random": code_of(random_dictionary(sae, sample, config.seed)),
    }
    for name, other in others.items():
        if name in found:
            raise ConfigError(f"the name {name!r} is taken by {sorted(found)}; give another one")
        if other.config.site != site:
            raise ConfigError(
                f"{name} is a dictionary of site {other.config.site!r}, not of {site!r}; compare "
                "dictionaries of one site"
            )
        with torch.no_grad():
            other.threshold.fill_(
                calibrate_threshold(other, folder, heldout, l0, config.batch).threshold
            )
        found[name] = code_of(other)
    return found


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


class Tally(NamedTuple):
    """What was counted of one code, by patient and role."""

    roles: tuple[str, ...]
    sums: Float[Tensor, "P R 6"]
    """Rows, squared error, squared distance from the mean of all held-out rows, the same from the
    role's mean, active features, cosines."""
    fired: Float[Tensor, "R m"]
    draws: Float[Tensor, "B P"]
    code: Code

    def rates(self, role: int | None = None) -> Float[Tensor, " m"]:
        """Share of rows each feature fires on."""
        chosen = slice(None) if role is None else slice(role, role + 1)
        rows = self.sums[:, chosen, 0].sum()
        return self.fired[chosen].sum(0) / rows

    def figures(self, role: int | None = None) -> dict[str, Figure]:
        """FVU, L0 and cosine, overall (with the overall mean) or of a role (with its own)."""
        whole = self.sums.sum(1) if role is None else self.sums[:, role]
        rows, error, spread_all, spread_role, active, cosine = whole.T
        n = int(rows.sum())
        return {
            "fvu": ratio(error, spread_all if role is None else spread_role, n, self.draws),
            "l0": ratio(active, rows, n, self.draws),
            "cosine": ratio(cosine, rows, n, self.draws),
        }

    def record(self) -> dict[str, Any]:
        """For JSON; latents only of codes that have any."""
        found: dict[str, Any] = {n: one.record() for n, one in self.figures().items()}
        present = [i for i in range(len(self.roles)) if float(self.sums[:, i, 0].sum()) > 0]
        found["roles"] = {
            self.roles[i]: {n: one.record() for n, one in self.figures(i).items()} for i in present
        }
        if self.code.sae is None:
            return found
        names: list[tuple[dict[str, Any], int | None]] = [(found, None)]
        names += [(found["roles"][self.roles[i]], i) for i in present]
        for target, role in names:
            rates = self.rates(role)
            target["dead_fraction"] = mean_interval((rates == 0).double()).record()
            target["density"] = density(rates)
        return found


def density(rates: Float[Tensor, " F"]) -> dict[str, Any]:
    """Histogram of log10 firing rates; latents that never fire are counted apart.

    >>> density(torch.tensor([0.0, 0.1, 1.0]))["never"]
    1
    """
    alive = rates[rates > 0].double().log10().clamp_min(DENSITY_EDGES[0])
    counts, _ = np.histogram(alive.numpy(), bins=np.array(DENSITY_EDGES))
    return {
        "log10_edges": list(DENSITY_EDGES),
        "counts": counts.tolist(),
        "never": int((rates == 0).sum()),
    }


@torch.no_grad()
def tally(
    beside: Mapping[str, Code],
    folder: ActivationFolder,
    site: str,
    mask: Bool[np.ndarray, " n"],
    config: EvaluationConfig,
) -> dict[str, Tally]:
    """Run every code over the rows of ``mask``, a batch at a time, in two passes."""
    roles = tuple(role.name.lower() for role in Role)
    role_of = torch.tensor([roles.index(name) for name in folder.column("role")])
    patients, n_patients = patient_codes(folder.column("patient")[mask].tolist())
    draws = patient_draws(n_patients, config.draws, config.seed)
    patient_of = torch.full((folder.n_tokens,), -1)
    patient_of[torch.from_numpy(mask)] = patients
    d = folder.width(site)
    totals, counts = torch.zeros(len(roles), d, dtype=torch.float64), torch.zeros(len(roles))
    for x, where in _batches(folder, site, mask, config.batch):
        totals.index_add_(0, role_of[where], x.double())
        counts += torch.bincount(role_of[where], minlength=len(roles))
    mean = totals.sum(0) / counts.sum()
    means = totals / counts.clamp_min(1)[:, None]

    sums = {n: torch.zeros(n_patients * len(roles), 6, dtype=torch.float64) for n in beside}
    fired = {
        n: torch.zeros(len(roles), c.n_features, dtype=torch.float64) for n, c in beside.items()
    }
    for x, where in _batches(folder, site, mask, config.batch):
        exact, role = x.double(), role_of[where]
        cell = patient_of[where] * len(roles) + role
        spread = (exact - mean).square().sum(1)
        own_spread = (exact - means[role]).square().sum(1)
        for name, code in beside.items():
            features = code.encode(x)
            rebuilt = code.decode(features).cpu().double()
            active = (features > 0).cpu().double()
            l0 = active.sum(1) if code.l0 is None else torch.full((len(x),), code.l0)
            error = (exact - rebuilt).square().sum(1)
            cosine = torch.nn.functional.cosine_similarity(exact, rebuilt, dim=1)
            ones = torch.ones(len(x), dtype=torch.float64)
            values = torch.stack([ones, error, spread, own_spread, l0.double(), cosine], 1)
            sums[name].index_add_(0, cell, values)
            fired[name].index_add_(0, role, active)
    return {
        name: Tally(roles, sums[name].view(n_patients, len(roles), 6), fired[name], draws, code)
        for name, code in beside.items()
    }


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


@torch.no_grad()
def _l0(sae: MatryoshkaSAE, folder: ActivationFolder, mask: np.ndarray, batch: int) -> float:
    active = 0
    for x, _ in _batches(folder, sae.config.site, mask, batch):
        active += int((sae.encode(x.to(sae.W_dec)) > 0).sum())
    return active / int(mask.sum())


def _batches(folder: ActivationFolder, site: str, mask: np.ndarray, batch: int) -> Any:
    """Chosen rows, and their numbers, in order."""
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        chosen = torch.from_numpy(mask[start:stop])
        if chosen.any():
            where = chosen.nonzero().flatten() + start
            yield folder.rows(site, start, stop)[chosen].float(), where


def _rows(folder: ActivationFolder, site: str, mask: np.ndarray, most: int) -> Tensor:
    """At most that many of the chosen rows, evenly spread over them."""
    numbers = np.flatnonzero(mask)
    numbers = numbers[:: max(1, -(-len(numbers) // most))]
    spread = np.zeros_like(mask)
    spread[numbers] = True
    return torch.cat([x for x, _ in _batches(folder, site, spread, 4096)])
