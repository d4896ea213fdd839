"""Dictionaries and activations → features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    Json,
    SaeFolder,
    Seed,
    finish,
    load_studies,
)


@app.command(epilog="Example: `maira-sae collect sae/ acts/ --studies studies/ --out features/`")
def collect(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    out: Annotated[Path, typer.Option(help="Features folder to make.")],
    studies: Annotated[
        Path | None, typer.Option(help="Folder of studies, for their labels; else none are used.")
    ] = None,
    n_top: Annotated[int, typer.Option(help="Strongest examples of each latent.")] = 8,
    n_quantile: Annotated[int, typer.Option(help="Examples spread over its range.")] = 8,
    n_contrast: Annotated[int, typer.Option(help="Silent examples of each kind.")] = 4,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option(help="Start even where the disk seems too small.")] = False,
    as_json: Json = False,
) -> None:
    """Statistics and examples of every latent in one pass, by modality, split by patient.

    A pass that is stopped leaves nothing and starts again; a finished one is kept.
    """
    import torch

    from autointerp.collect import CollectConfig
    from autointerp.collect import collect as collect_features
    from autointerp.size import CollectSize
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE

    config = CollectConfig(n_top, n_quantile, n_contrast, seed=seed)
    device = "cuda" if torch.cuda.is_available() else None
    sae = MatryoshkaSAE.from_pretrained(sae_folder, device)
    known = load_studies(studies) if studies else []

    def before(size: CollectSize) -> None:
        typer.echo(f"to do: {size}")
        if not force:
            size.check_room()

    found = collect_features(sae, ActivationFolder(activations), config, out, known, before=before)
    alive = found.alive()
    dense = sum(found.dense(latent) for latent in range(found.n_latents))
    result = {
        "features": str(out),
        "n_latents": found.n_latents,
        "alive": len(alive),
        "dense": dense,
        "examples": found.manifest["n_examples"],
        "studies_by_set": found.manifest["studies_by_set"],
    }
    text = f"{len(alive)} latents fire, {dense} more are dense; {result['examples']} examples"
    finish(result, as_json, text)
