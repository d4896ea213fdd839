"""`maira-sae bench …`: the measurements this library's claims rest on, each a command."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure: one command for each claim.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command(epilog="Example: `maira-sae bench absorption --json`")
def absorption(
    out: Annotated[
        Path | None, typer.Option(help="Folder to keep, and to resume; default: a temporary one.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Absorption of Matryoshka and BatchTopK dictionaries at equal L0, on planted features."""
    from dataclasses import replace

    import torch

    from maira_sae.bench_absorption import ARMS, AbsorptionBench, run

    torch.set_num_threads(1)  # matrices this small are no faster on more, and slower on busy cores
    config = replace(AbsorptionBench(), seeds=tuple(range(seeds)))
    if quick:
        config = replace(config.quick(), seeds=config.seeds)
    with TemporaryDirectory() as temporary:
        result = run(config, out or Path(temporary))
    for arm in ARMS:
        rates = ", ".join(f"{row[arm]['rate']:.3f}" for row in result["seeds"])
        figures = result[arm]
        typer.echo(
            f"{arm:<11} absorbed {figures['mean']:.3f} ± {figures['sd']:.3f} ({rates})  "
            f"L0 {result['l0'][arm]:.3f}"
        )
    if as_json:
        typer.echo(json.dumps(result))
