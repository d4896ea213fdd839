"""What a dictionary costs the model, and what its latents know about labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hooks.files import ConfigError
from hooks.harvest import POLICIES
from hooks.progress import track
from hooks.prompts import Prompt, PromptRunner
from hooks.roles import Role
from hooks.sites import resolve_site, rewrite
from hooks.store import ActivationFolder
from hooks.studies import Study
from sae.model import MatryoshkaSAE


class CrossEntropy(NamedTuple):
    """Mean next-token loss (nats) on report tokens, with the site left alone or replaced."""

    n_tokens: int
    clean: float
    reconstructed: float
    zero_ablated: float
    mean_ablated: float

    @property
    def recovered_zero(self) -> float:
        """``(zero − reconstructed) / (zero − clean)``: 1 is a perfect dictionary."""
        return (self.zero_ablated - self.reconstructed) / (self.zero_ablated - self.clean)

    @property
    def recovered_mean(self) -> float:
        """The same against mean ablation, which is the harder baseline."""
        return (self.mean_ablated - self.reconstructed) / (self.mean_ablated - self.clean)


@torch.no_grad()
def cross_entropy(
    model: Any,
    runner: PromptRunner,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    mean: Float[Tensor, " d"],
) -> CrossEntropy:
    """Loss on the reports of ``studies`` with the SAE's site replaced four ways.

    Only positions of the roles the SAE was trained on (its policy) are replaced; everything else
    keeps its own activation, in all four conditions.

    Parameters
    ----------
    mean
        Mean activation of those roles, for mean ablation.
    """
    site = resolve_site(model, sae.config.site)
    kept = POLICIES[sae.config.policy]
    prompts = [runner.prompt(i, study) for i, study in enumerate(studies)]
    if not any(prompt.tokens.of_role(Role.REPORT, Role.GROUNDING).any() for prompt in prompts):
        raise ConfigError("no study has a report, so there is no loss to measure; give reports")
    mean = mean.to(model.device, torch.float32)
    sae = sae.to(model.device)
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "reconstructed": lambda x: sae(x),
        "zero_ablated": torch.zeros_like,
        "mean_ablated": lambda x: mean.expand_as(x),
    }
    losses = {}
    n_tokens = 0
    for name, change in track(changes.items(), "cross-entropy", total=len(changes)):
        losses[name], n_tokens = _mean_loss(model, runner, prompts, site, kept, change)
    return CrossEntropy(n_tokens, **losses)


def _mean_loss(
    model: Any,
    runner: PromptRunner,
    prompts: Sequence[Prompt],
    site: Any,
    kept: Sequence[Role],
    change: Callable[[Tensor], Tensor] | None,
) -> tuple[float, int]:
    def forward(batch: Sequence[Prompt], start: int, inputs: Mapping[str, Any]) -> Tensor:
        mask = _padded_mask(batch, start, inputs["input_ids"].shape[1], kept).to(model.device)

        def replace(value: Tensor) -> Tensor:
            if change is None or not mask.any():
                return value
            changed = value.clone()
            changed[mask] = change(value[mask].float()).to(value.dtype)
            return changed

        with rewrite(site, replace):
            return model.model(**inputs).last_hidden_state

    total, count = 0.0, 0
    for ran in runner.run(prompts, forward):
        for i, prompt in enumerate(ran.prompts):
            targets = np.flatnonzero(prompt.tokens.of_role(Role.REPORT, Role.GROUNDING))
            rows = torch.from_numpy(targets - 1)  # each token is predicted from the one before
            hidden = ran.result[i, : len(prompt.tokens) - ran.start]
            if ran.prefix is not None:
                hidden = torch.cat([ran.prefix[0], hidden])
            logits = model.lm_head(hidden[rows.to(hidden.device)]).float()
            ids = torch.from_numpy(prompt.tokens.ids[targets]).to(logits.device)
            total += float(F.cross_entropy(logits, ids, reduction="sum"))
            count += len(targets)
    return total / count, count


def _padded_mask(
    batch: Sequence[Prompt], start: int, width: int, kept: Sequence[Role]
) -> Bool[Tensor, "batch width"]:
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, prompt in enumerate(batch):
        own = prompt.tokens.of_role(*kept)[start:]
        mask[i, : len(own)] = torch.from_numpy(own)
    return mask


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


def auroc(scores: Float[Tensor, "S F"], labels: Bool[Tensor, " S"]) -> Float[Tensor, " F"]:
    """Area under the ROC curve of every column; ties count one half. NaN with one class only."""
    positive, negative = scores[labels].T.contiguous(), scores[~labels].T.contiguous()
    if positive.shape[1] == 0 or negative.shape[1] == 0:
        return torch.full((scores.shape[1],), float("nan"))
    negative = negative.sort(dim=1).values
    below = torch.searchsorted(negative, positive, right=False)
    not_above = torch.searchsorted(negative, positive, right=True)
    wins = (below + not_above).double().sum(dim=1) / 2
    return (wins / (positive.shape[1] * negative.shape[1])).float()


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


@torch.no_grad()
def random_dictionary(
    sae: MatryoshkaSAE, x: Float[Tensor, "rows d"], seed: int = 0
) -> MatryoshkaSAE:
    """A dictionary of random directions: what a method finds without any learning.

    Shape, site and decoder bias are those of ``sae``. Every latent fires on the same share of
    ``x``, so that both have the same L0 there: with one threshold for all, the directions that
    happen to lie along the largest variance would fire almost everywhere and the rest never.
    """
    config = replace(sae.config, activation="threshold")
    random = MatryoshkaSAE(config, seed=seed, dtype=sae.W_dec.dtype).to(sae.W_dec.device)
    random.b_dec.copy_(sae.b_dec)
    active = round(float((sae.encode(x) > 0).sum()) / sae.config.n_latents)
    scores = (x - random.b_dec) @ random.W_enc
    random.b_enc.copy_(-scores.kthvalue(len(x) - active, dim=0).values)
    return random.eval()
