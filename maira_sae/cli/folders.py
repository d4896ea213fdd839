"""The whole pipeline, and the check of any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    AllowRemote,
    Endpoint,
    Json,
    Llm,
    Seed,
    endpoint_of,
    finish,
)


@app.command(epilog="Example: `maira-sae demo --out demo-out` — then open demo-out/dashboard.html")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for every stage.")],
    real: Annotated[
        bool, typer.Option("--real", help="Real towers, film and reports, not the phantom.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    endpoint: Endpoint = None,
    llm: Llm = None,
    allow_remote: AllowRemote = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline where the truth is known: harvest, train, measure, label, steer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dataclasses import replace

    from rich.console import Console

    where = endpoint_of(endpoint, llm, allow_remote)
    if real:
        if where is not None:
            raise MairaSaeError("--real brings its own language model; leave --endpoint out")
        from maira_sae.real_demo import RealDemo, RealDemoConfig, show

        config = replace(RealDemoConfig(), seed=seed)
        summary = RealDemo(out, config.quick() if quick else config).summarize()
    else:
        from maira_sae.phantom_demo import PhantomDemo, PhantomDemoConfig, show

        config = replace(PhantomDemoConfig(), seed=seed)
        summary = PhantomDemo(out, config.quick() if quick else config, where).summarize()
    show(summary, Console())
    finish(summary, as_json)


@app.command(epilog="Example: `maira-sae verify acts/`")
def verify(
    folder: Annotated[Path, typer.Argument(help="Any finished folder of this library.")],
    as_json: Json = False,
) -> None:
    """Compare every file of a finished folder with its recorded checksum.

    Of an activation folder, also the rows of every part: tensors, token table and sums.
    """
    from hooks.files import MANIFEST, is_sealed, read_json
    from hooks.files import verify as run
    from hooks.store import KIND, ActivationFolder

    if is_sealed(folder) and read_json(folder / MANIFEST).get("kind") == KIND:
        activations = ActivationFolder(folder)
        count, rows = activations.verify(), activations.n_tokens
        text = f"{folder}: {count} files match their checksums, {rows:,} rows in every table"
        finish({"files": count, "rows": rows}, as_json, text)
        return
    count = run(folder)
    finish({"files": count}, as_json, f"{folder}: {count} files match their checksums")
