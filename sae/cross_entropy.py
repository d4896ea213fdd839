"""What a dictionary costs the model: next-token loss with its reconstruction put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class StudyLosses(NamedTuple):
    """Summed next-token loss (nats) of each study's report tokens under each condition."""

    n_tokens: Float[Tensor, " S"]
    losses: Mapping[str, Float[Tensor, " S"]]

    def mean(self, condition: str) -> float:
        """Mean loss of a token."""
        return float(self.losses[condition].sum() / self.n_tokens.sum())


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
    found = study_losses(model, runner, studies, sae, mean, {"reconstructed": sae})
    losses = {name: found.mean(name) for name in found.losses}
    return CrossEntropy(int(found.n_tokens.sum()), **losses)


@torch.no_grad()
def study_losses(
    model: Any,
    runner: PromptRunner,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    mean: Float[Tensor, " d"],
    replacements: Mapping[str, Callable[[Tensor], Tensor]],
) -> StudyLosses:
    """Losses with the site left alone, set to zero, set to its mean, and replaced in other ways.

    Parameters
    ----------
    sae
        Decides the site and, by its policy, the positions.
    replacements
        What to put in place of activations ``[n, d]`` (float32), by name of the condition;
        ``clean``, ``zero_ablated`` and ``mean_ablated`` are added. Modules are moved to the
        model's device.
    """
    site = resolve_site(model, sae.config.site)
    kept = POLICIES[sae.config.policy]
    prompts = [runner.prompt(i, study) for i, study in enumerate(studies)]
    if not any(prompt.tokens.of_role(Role.REPORT, Role.GROUNDING).any() for prompt in prompts):
        raise ConfigError("no study has a report, so there is no loss to measure; give reports")
    mean = mean.to(model.device, torch.float32)
    for replacement in replacements.values():
        if isinstance(replacement, torch.nn.Module):
            replacement.to(model.device)
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        **replacements,
        "zero_ablated": torch.zeros_like,
        "mean_ablated": lambda x: mean.expand_as(x),
    }
    losses = {}
    for name, change in track(changes.items(), "cross-entropy", total=len(changes)):
        losses[name] = _losses(model, runner, prompts, site, kept, change)
    targets = [prompt.tokens.of_role(Role.REPORT, Role.GROUNDING).sum() for prompt in prompts]
    return StudyLosses(torch.tensor(targets, dtype=torch.float64), losses)


def _losses(
    model: Any,
    runner: PromptRunner,
    prompts: Sequence[Prompt],
    site: Any,
    kept: Sequence[Role],
    change: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, " S"]:
    def forward(batch: Sequence[Prompt], start: int, inputs: Mapping[str, Any]) -> Tensor:
        mask = _padded_mask(batch, start, inputs["input_ids"].shape[1], kept).to(model.device)

        def replace(value: Tensor) -> Tensor:
            if change is None or not mask.any():
                return value
            changed = value.clone()
            changed[mask] = change(value[mask].float()).to(value)
            return changed

        with rewrite(site, replace):
            return model.model(**inputs).last_hidden_state

    totals = torch.zeros(len(prompts), dtype=torch.float64)
    for ran in runner.run(prompts, forward):
        for i, prompt in enumerate(ran.prompts):
            targets = np.flatnonzero(prompt.tokens.of_role(Role.REPORT, Role.GROUNDING))
            rows = torch.from_numpy(targets - 1)  # each token is predicted from the one before
            hidden = ran.result[i, : len(prompt.tokens) - ran.start]
            if ran.prefix is not None:
                hidden = torch.cat([ran.prefix[0], hidden])
            logits = model.lm_head(hidden[rows.to(hidden.device)]).float()
            ids = torch.from_numpy(prompt.tokens.ids[targets]).to(logits.device)
            totals[prompt.sequence] = float(F.cross_entropy(logits, ids, reduction="sum"))
    return totals


def _padded_mask(
    batch: Sequence[Prompt], start: int, width: int, kept: Sequence[Role]
) -> Bool[Tensor, "batch width"]:
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, prompt in enumerate(batch):
        own = prompt.tokens.of_role(*kept)[start:]
        mask[i, : len(own)] = torch.from_numpy(own)
    return mask
