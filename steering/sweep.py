"""One latent at several strengths over several studies, beside a random latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hooks.files import ConfigError, versions, write_json
from hooks.images import read_image
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.roles import View
from hooks.sites import resolve_site
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit
from steering.effects import Dose, Effect, dose_response, effect, records
from steering.generate import generate_report, steered
from steering.positions import Positions, Where
from steering.report import heat, write_report

STEERED, RANDOM = "steered", "random latent"


def sweep(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    edits: Mapping[str, Callable[[float], Edit]],
    strengths: Sequence[float],
    is_target: Callable[[str], bool],
    *,
    where: Where | Positions = "all",
    max_new_tokens: int = 300,
) -> list[Effect]:
    """Every study's report under every arm's edit at every strength.

    Parameters
    ----------
    edits
        For each arm (the edit and its controls) the edit of a strength.
    """
    if not studies or not strengths:
        raise ConfigError(f"{len(studies)} studies and {len(strengths)} strengths; give one each")
    out = []
    for study in studies:
        plain = generate_report(model, processor, study, max_new_tokens=max_new_tokens)
        tokens = encode_study(processor, study, with_report=False).tokens
        for arm, edit in edits.items():
            for strength in strengths:
                with steered(
                    model,
                    sae,
                    [edit(strength)],
                    where,
                    tokens=tokens,
                    tokenizer=processor.tokenizer,
                ):
                    text = generate_report(model, processor, study, max_new_tokens=max_new_tokens)
                out.append(
                    effect(
                        study.id, study.patient or study.id, arm, strength, plain, text, is_target
                    )
                )
    return out


def write_folder(
    out: Path,
    title: str,
    settings: Mapping[str, Any],
    effects: Sequence[Effect],
    films: Mapping[str, Sequence[tuple[Image.Image, str]]],
) -> list[Dose]:
    """Write ``effects.json`` and ``report.html`` into ``out``; returns the doses."""
    doses = dose_response(effects)
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "effects.json",
        {
            "settings": dict(settings),
            "doses": records(doses),
            "effects": [one.record() for one in effects],
            "versions": versions(),
        },
    )
    write_report(out / "report.html", title, settings, doses, effects, films)
    return doses


@torch.no_grad()
def films_with_patches(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    sae: MatryoshkaSAE,
    latent: int,
) -> dict[str, list[tuple[Image.Image, str]]]:
    """Each study's frontal film, and where a latent of a vision site fires on it."""
    from hooks.prompts import PromptRunner
    from hooks.sites import capture

    site = resolve_site(model, sae.config.site)
    out: dict[str, list[tuple[Image.Image, str]]] = {}
    for study in studies:
        film = read_image(study.frontal)
        out[study.id] = [(film, f"{View.FRONTAL.name.lower()} film")]
        if site.stream != "vision":
            continue
        runner = PromptRunner(model, processor, 8192)
        with capture([site]) as run:
            x = run(runner.see, pixel_values=runner.films([study.frontal]))[site.name]
        n = runner.patches
        z = sae.encode_some(x.reshape(-1, x.shape[-1])[-n:].to(sae.W_dec), [latent])[:, 0]
        side = round(n**0.5)
        grid = z.float().cpu().numpy().reshape(side, side)
        out[study.id].append((heat(film, np.maximum(grid, 0)), f"latent {latent}"))
    return out
