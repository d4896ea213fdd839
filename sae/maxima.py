"""The largest activation of every latent in every study, and the one that best tells a label."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
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


def study_maxima(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    role: Role | None = Role.REPORT,
    batch: int = 8192,
) -> StudyMaxima:
    """Maximum over each study's tokens of ``role``, or over all of its tokens.

    ``S · F`` floats stay in memory.
    """

    def encode(x: Tensor) -> Tensor:
        return sae.encode(x.to(sae.W_dec))

    return maxima_of(encode, sae.config.n_latents, folder, sae.config.site, role, batch)


@torch.no_grad()
def maxima_of(
    encode: Callable[[Tensor], Tensor],
    n_latents: int,
    folder: ActivationFolder,
    site: str,
    role: Role | None = None,
    batch: int = 8192,
) -> StudyMaxima:
    """:func:`study_maxima` of anything that turns rows ``[batch, d]`` into ``[batch, F]`` ≥ 0."""
    folder.check_site(site)
    names = folder.column("study")
    chosen = np.ones(folder.n_tokens, dtype=bool)
    if role is not None:
        chosen = folder.column("role") == role.name.lower()
    studies = list(dict.fromkeys(names))
    numbers = {name: i for i, name in enumerate(studies)}
    rows = torch.tensor([numbers[name] for name in names])
    values = torch.zeros(len(studies), n_latents)
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        mask = torch.from_numpy(chosen[start:stop])
        if mask.any():
            z = encode(folder.rows(site, start, stop)[mask]).cpu()
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
