"""Labels → control."""

from __future__ import annotations

from typing import Annotated

import typer

from hooks.files import StudyError, nearest
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    Dtype,
    Json,
    ModelFolder,
    SaeFolder,
    StudiesFolder,
    device_map,
    finish,
    load_studies,
)


@app.command(
    epilog="Example: `maira-sae steer sae/ acts/ --model maira-2/ --studies mimic/ --study s50 "
    "--latent 12 --strength 2`"
)
def steer(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: Annotated[str, typer.Option(help="Study id.")],
    latent: Annotated[int, typer.Option(help="Latent number.")],
    strength: Annotated[
        float | None,
        typer.Option(help="In units of the latent's 99th percentile; of scale, the factor."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="add, scale, clamp, minimum (clamp from below) or ablate.")
    ] = "add",
    where: Annotated[str, typer.Option(help="all, prompt or generated.")] = "all",
    opening: Annotated[str, typer.Option(help="First words of the report.")] = "",
    max_new_tokens: int = 300,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate a study's report with a latent turned up or down, beside the plain one."""
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering import Edit, compare, measure_references

    records = {record.id: record for record in load_studies(studies)}
    if study not in records:
        raise StudyError(f"{studies} has no study {study!r}{nearest(study, records)}")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    reference = measure_references(sae, folder, [latent]).of(latent)
    edit = Edit(latent, strength, reference, mode)  # pyright: ignore[reportArgumentType]
    texts = compare(
        load_model(model, dtype=dtype, device_map=device_map()),
        load_processor(model),
        records[study],
        sae,
        [edit],
        where=where,  # pyright: ignore[reportArgumentType]
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    result = {
        **texts._asdict(),
        **{"latent": latent, "mode": mode, "strength": strength, "reference": reference},
    }
    finish(result, as_json, f"before: {texts.before}\nafter:  {texts.after}")
