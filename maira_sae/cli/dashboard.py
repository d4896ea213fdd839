"""Features, labels and scores → one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import Json, finish, load_studies, numbers


@app.command(
    epilog="Example: `maira-sae dashboard features/ --labels labels/ --studies studies/ "
    "--model maira-2/ --sae sae/ --out explorer.html`"
)
def dashboard(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features folder.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    labels: Annotated[Path | None, typer.Option(help="Labels folder.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Scores folder.")] = None,
    steering: Annotated[
        Path | None, typer.Option(help="File with the lines of `steer --json`.")
    ] = None,
    studies: Annotated[
        Path | None, typer.Option(help="Folder of studies; without it heat is drawn on black.")
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="SAE folder, for neighbours.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint; without it no report text is shown.")
    ] = None,
    logits: Annotated[
        bool, typer.Option(help="Load the model's weights for the tokens that a latent writes.")
    ] = False,
    latents: Annotated[
        str | None, typer.Option(help="Comma-separated; default: those labelled, then others.")
    ] = None,
    top: Annotated[int, typer.Option(help="Most latents on the page.")] = 2000,
    text: Annotated[bool, typer.Option(help="Hold words of reports and names of studies.")] = True,
    films: Annotated[bool, typer.Option(help="Hold films.")] = True,
    origin: Annotated[
        str | None, typer.Option(help="Whose films and reports these are, for the banner.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Latents",
    max_megabytes: Annotated[float, typer.Option(help="Largest size of the file.")] = 20,
    as_json: Json = False,
) -> None:  # fmt: skip
    """One HTML file to browse latents by label, score and firing rate, that works offline.

    It may hold films and reports of patients: --no-films and --no-text leave them out.
    """
    from autointerp.dashboard import CAREFUL, explorer_from, read_steering
    from autointerp.evidence import model_output_tokens
    from autointerp.explorer import Explorer, ExplorerConfig
    from autointerp.features import Features
    from autointerp.labels import read_labels
    from autointerp.scores import read_scores
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from sae import MatryoshkaSAE

    if logits and (sae is None or model is None):
        raise MairaSaeError("--logits reads the SAE and the model; give --sae and --model")
    found = Features.open(features)
    named = read_labels(labels) if labels else []
    chosen = list(numbers(latents, "--latents", int)) if latents else None
    if chosen is None:
        chosen = list(dict.fromkeys([*(one.latent for one in named), *found.alive()]))[:top]
    dictionary = MatryoshkaSAE.from_pretrained(sae) if sae else None
    processor = load_processor(model) if model else None
    written = {}
    if logits and dictionary is not None and processor is not None and model is not None:
        whole = load_model(model)
        for latent in chosen:
            direction = dictionary.W_dec[latent]
            tokens = model_output_tokens(whole, found.site, direction, processor.tokenizer)
            if tokens is not None:
                written[latent] = tokens
    data = explorer_from(
        found,
        labels=named,
        scores=read_scores(scores) if scores else [],
        studies=load_studies(studies) if studies else [],
        sae=dictionary,
        tokenizer=processor.tokenizer if processor and text else None,
        image_size=getattr(processor, "image_size", 518),
        output_tokens=written,
        steering=read_steering(steering) if steering else {},
        latents=chosen,
        title=title,
        origin=origin or CAREFUL,
    )
    config = ExplorerConfig(text=text, films=films, max_bytes=int(max_megabytes * 1e6))
    page = Explorer(data, config).write(out)
    size = page.stat().st_size
    result = {"dashboard": str(page), "latents": len(data.latents), "bytes": size}
    finish(result, as_json, f"{page}: {len(data.latents):,} latents, {size / 1e6:.1f} MB")
