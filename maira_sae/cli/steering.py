"""Labels → control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError, StudyError, nearest
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
    numbers,
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
    latent: Annotated[int, typer.Option(help="Latent number.")],
    study: Annotated[str | None, typer.Option(help="Study id.")] = None,
    studies_n: Annotated[
        int | None, typer.Option(help="Steer this many studies instead, and write --out.")
    ] = None,
    sweep: Annotated[str, typer.Option(help="Strengths of --studies-n, such as 0.5,1,2.")] = "1,2",
    target: Annotated[
        str, typer.Option(help="Words of the concept, by comma; other changes are side effects.")
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Folder for the records and page of --studies-n.")
    ] = Path("steering-out"),
    strength: Annotated[
        float | None,
        typer.Option(help="In units of the latent's 99th percentile; of scale, the factor."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="add, scale, clamp, minimum (clamp from below) or ablate.")
    ] = "add",
    where: Annotated[str, typer.Option(help="all, prompt or generated.")] = "all",
    view: Annotated[str | None, typer.Option(help="Only patches of frontal, lateral, prior.")] = (
        None
    ),
    box: Annotated[
        str | None, typer.Option(help="Only patches in a box: x0,y0,x1,y1 as fractions.")
    ] = None,
    sections: Annotated[str, typer.Option(help="Only prompt sections, by comma.")] = "",
    sentences: Annotated[str, typer.Option(help="Only report sentences, from 0, by comma.")] = "",
    window: Annotated[str | None, typer.Option(help="Only positions: first,end.")] = None,
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

    if (study is None) == (studies_n is None):
        raise MairaSaeError("give --study or --studies-n, one of them")
    places = _positions(where, view, box, sections, sentences, window)
    records = {record.id: record for record in load_studies(studies)}
    if study is not None and study not in records:
        raise StudyError(
            f"{studies} has no study {study!r}{nearest(study, records)}; choose one of its "
            f"{len(records)}, such as {next(iter(records), '')!r}"
        )
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    reference = measure_references(sae, folder, [latent]).of(latent)
    loaded = load_model(model, dtype=dtype, device_map=device_map())
    processor = load_processor(model)
    if study is None:
        assert studies_n is not None
        chosen = list(records.values())[:studies_n]
        result = _sweep(
            *(loaded, processor, chosen, sae, folder, latent, mode),
            *(numbers(sweep, "--sweep", float), target, places, max_new_tokens, out),
        )
        finish(result, as_json, f"{out / 'report.html'}: {len(chosen)} studies")
        return
    edit = Edit(latent, strength, reference, mode)  # pyright: ignore[reportArgumentType]
    texts = compare(
        loaded,
        processor,
        records[study],
        sae,
        [edit],
        where=places,
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    result = {
        **texts._asdict(),
        **{"latent": latent, "mode": mode, "strength": strength, "reference": reference},
    }
    finish(result, as_json, f"before: {texts.before}\nafter:  {texts.after}")


def _positions(
    where: str,
    view: str | None,
    box: str | None,
    sections: str,
    sentences: str,
    window: str | None,
) -> Any:
    """Where the edits act, from the flags."""
    from dataclasses import replace

    from hooks.grounding import Box
    from hooks.roles import View
    from steering import Positions

    places = Positions.of(where)
    if view is not None:
        names = [one.name.lower() for one in View]
        if view not in names:
            raise MairaSaeError(f"unknown view {view!r}{nearest(view, names)}; choose from {names}")
        places = replace(places, view=View[view.upper()])
    if box is not None:
        corners = numbers(box, "--box", float)
        if len(corners) != 4:
            raise MairaSaeError(f"--box is {box!r}; write four fractions like 0.5,0.5,1,1")
        places = replace(places, box=Box(*corners))
    if sections:
        places = replace(places, sections=tuple(sections.split(",")))  # pyright: ignore
    if sentences:
        places = replace(places, sentences=numbers(sentences, "--sentences", int))
    if window is not None:
        ends = numbers(window, "--window", int)
        if len(ends) != 2:
            raise MairaSaeError(f"--window is {window!r}; write two positions like 0,64")
        places = replace(places, window=ends)
    return places


def _sweep(
    model: Any,
    processor: Any,
    studies: Any,
    sae: Any,
    folder: Any,
    latent: int,
    mode: Any,
    strengths: tuple[float, ...],
    target: str,
    places: Any,
    max_new_tokens: int,
    out: Path,
) -> dict[str, Any]:
    """Several studies at several strengths, beside a random latent that fires as often."""
    import torch

    from steering import Edit, matched_latent, measure_references
    from steering.effects import names_any, records
    from steering.sweep import RANDOM, STEERED, films_with_patches, sweep, write_folder

    if mode == "ablate":
        raise MairaSaeError("ablate has no strengths to sweep; use --mode scale --sweep 0,0.5")
    words = [word.strip() for word in target.split(",") if word.strip()]
    if not words:
        raise MairaSaeError("--target names no word; a sweep needs it to tell side effects apart")
    sample = folder.rows(sae.config.site, 0, min(folder.n_tokens, 50_000)).to(sae.W_dec)
    with torch.no_grad():
        fired = torch.zeros(sae.config.n_latents)
        for part in sample.split(8192):
            fired += (sae.encode(part) > 0).float().sum(0).cpu()
    other = matched_latent(latent, fired / len(sample))
    references = measure_references(sae, folder, [latent, other])
    norms = sae.W_dec.detach().norm(dim=1)
    length = float(norms[latent] / norms[other])

    def edit(strength: float) -> Edit:
        return references.edit(latent, strength, mode)

    def control(strength: float) -> Edit:
        """What it adds is as long as what the edit adds."""
        reference = None if mode == "scale" else references.of(latent) * length
        return Edit(other, strength, reference, mode)

    effects = sweep(
        model,
        processor,
        studies,
        sae,
        {STEERED: edit, RANDOM: control},
        strengths,
        names_any(words),
        where=places,
        max_new_tokens=max_new_tokens,
    )
    settings = {
        "site": sae.config.site,
        "latent": latent,
        "random latent": other,
        "mode": mode,
        "reference": references.of(latent),
        "target": ", ".join(words),
        "where": str(places),
        "studies": len(studies),
    }
    films = films_with_patches(model, processor, studies, sae, latent)
    doses = write_folder(out, f"Steering latent {latent}", settings, effects, films)
    return {"out": str(out), **settings, "doses": records(doses)}
