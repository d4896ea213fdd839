"""One latent at several strengths over several studies, beside a random latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hooks.files import ConfigError
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit
from steering.effects import Effect, effect
from steering.generate import generate_report, prompt_inputs, steered
from steering.positions import Positions, Where

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
    opening: str = "",
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

        def report(study: Study = study) -> str:
            return generate_report(
                model, processor, study, opening=opening, max_new_tokens=max_new_tokens
            )

        plain = report()
        inputs = prompt_inputs(model, processor, study, opening)
        length = inputs["input_ids"].shape[1]
        tokens = encode_study(processor, study, with_report=False).tokens
        for arm, edit in edits.items():
            for strength in strengths:
                with steered(
                    model,
                    sae,
                    [edit(strength)],
                    where,
                    length,
                    tokens=tokens,
                    tokenizer=processor.tokenizer,
                ):
                    text = report()
                out.append(
                    effect(
                        study.id, study.patient or study.id, arm, strength, plain, text, is_target
                    )
                )
    return out
