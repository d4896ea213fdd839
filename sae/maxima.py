"""The largest activation of every latent in every study, and the one that best tells a label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.latent_scores import auroc
from sae.model import MatryoshkaSAE


class StudyMaxima(NamedTuple):
    """The largest activation of every latent in every study."""

    studies: list[str]
    values: Float[Tensor, "S F"]


@torch.no_grad()
def study_maxima(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    role: Role = Role.REPORT,
    batch: int = 8192,
) -> StudyMaxima:
    """Maximum over each study's tokens of ``role``; ``S · F`` floats stay in memory."""
    site = folder.check_site(sae.config.site)
    names = folder.column("study")
    chosen = folder.column("role") == role.name.lower()
    studies = list(dict.fromkeys(names))
    numbers = {name: i for i, name in enumerate(studies)}
    rows = torch.tensor([numbers[name] for name in names])
    values = torch.zeros(len(studies), sae.config.n_latents)
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        mask = torch.from_numpy(chosen[start:stop])
        if mask.any():
            z = sae.encode(folder.rows(site, start, stop)[mask].to(sae.W_dec)).cpu()
            index = rows[start:stop][mask][:, None].expand_as(z)
            values.scatter_reduce_(0, index, z.to(values.dtype), reduce="amax")
    return StudyMaxima(studies, values)


class Probe(NamedTuple):
    """The single latent that best separates studies with and without a label."""

    latent: int
    auroc: float
    """On held-out studies."""
    auroc_chosen_on: float
    """On the studies the latent was chosen on."""
    n_positive: int
    """Held-out studies that carry the label."""


def best_latent(
    maxima: StudyMaxima, labels: Bool[Tensor, " S"], heldout: Bool[Tensor, " S"]
) -> Probe:
    """Choose a latent by AUROC on training studies and measure it on held-out ones."""
    on_train = auroc(maxima.values[~heldout], labels[~heldout])
    latent = int(on_train.nan_to_num(0).argmax())
    column = maxima.values[heldout][:, latent : latent + 1]
    return Probe(
        latent=latent,
        auroc=float(auroc(column, labels[heldout])[0]),
        auroc_chosen_on=float(on_train[latent]),
        n_positive=int(labels[heldout].sum()),
    )
