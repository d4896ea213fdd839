"""A steering run from one end to the other: an edit, its control, reports, measures, a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hooks.processor import Maira2Processor
from hooks.provenance import untrained_parts, warning_of
from hooks.store import ActivationFolder
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.baselines import matched_latent
from steering.edits import Edit, Mode
from steering.effects import names_any
from steering.entailment import Ask
from steering.measures import measure_effect
from steering.patches import FilmHeat, sees_patches, study_heat
from steering.positions import Positions, Where
from steering.references import measure_references
from steering.report import SteeringRun
from steering.sweep import RANDOM, STEERED, sweep

RATE_ROWS = 50_000
"""Rows of the folder on which firing rates are measured, to find a latent that fires as often."""


def run_steering(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    latent: int,
    mode: Mode,
    strengths: Sequence[float],
    target: Sequence[str] = (),
    *,
    where: Where | Positions = "all",
    opening: str = "",
    ask: Ask | None = None,
    names: Mapping[int, str] | None = None,
    checkpoint: str | None = None,
    max_new_tokens: int = 300,
) -> SteeringRun:
    """Steer one latent over studies, beside a random latent that fires as often.

    What the control adds is as long as what the edit adds.

    Parameters
    ----------
    strengths
        Of ``ablate``, which has none, it is ``(0.0,)``.
    target
        Words of the concept; without them no change is on target.
    ask
        Judges entailment, see :mod:`steering.entailment`.
    checkpoint
        Where the model is from, for what its record says of untrained parts.
    """
    names = names or {}
    other = matched_latent(latent, _rates(sae, folder))
    references = measure_references(sae, folder, [latent, other])
    norms = sae.W_dec.detach().norm(dim=1)
    length = float(norms[latent] / norms[other])

    def edit(strength: float) -> Edit:
        if mode == "ablate":
            return Edit(latent, mode=mode)
        return references.edit(latent, strength, mode)

    def control(strength: float) -> Edit:
        if mode in ("ablate", "scale"):
            return Edit(other, None if mode == "ablate" else strength, mode=mode)
        return Edit(other, strength, references.of(latent) * length, mode)

    arms: dict[str, Callable[[float], Edit]] = {STEERED: edit, RANDOM: control}
    effects = sweep(
        model,
        processor,
        studies,
        sae,
        arms,
        strengths,
        names_any(target) if target else lambda sentence: False,
        where=where,
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    by_id = {study.id: study for study in studies}
    measures = [
        measure_effect(
            model,
            processor,
            by_id[one.study],
            one,
            sae,
            [arms[one.arm](one.strength)],
            where=where,
            ask=ask,
        )
        for one in effects
    ]
    heat: dict[str, dict[int, FilmHeat]] = {}
    if sees_patches(sae):
        for study in studies:
            heat[study.id] = study_heat(model, processor, sae, study, [latent, other])
    warning = warning_of(untrained_parts(checkpoint, model))
    name = f" ({names[latent]})" if latent in names else ""
    return SteeringRun(
        f"Steering latent {latent}{name}",
        {
            "site": sae.config.site,
            "latent": latent,
            "name": names.get(latent),
            "random latent": other,
            "mode": mode,
            "reference": references.of(latent),
            "target": ", ".join(target),
            "where": str(where),
            "opening": opening,
            "studies": len(studies),
        },
        studies,
        effects,
        measures,
        {STEERED: latent, RANDOM: other},
        names,
        heat,
        processor.image_size,
        [warning] if warning else [],
        bool(target),
    )


@torch.no_grad()
def _rates(sae: MatryoshkaSAE, folder: ActivationFolder) -> torch.Tensor:
    rows = folder.rows(sae.config.site, 0, min(folder.n_tokens, RATE_ROWS)).to(sae.W_dec)
    fired = torch.zeros(sae.config.n_latents)
    for part in rows.split(8192):
        fired += (sae.encode(part) > 0).float().sum(0).cpu()
    return fired / len(rows)
