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


@app.command(
    epilog="Example: `maira-sae bench train --d-model 512 --latents 8192 --k 32 --batch 2048` — "
    "other libraries need `make peers` first"
)
def train(
    d_model: Annotated[int, typer.Option(help="Width of the activations.")] = 512,
    latents: Annotated[int, typer.Option(help="Size of the dictionary.")] = 8192,
    k: Annotated[int, typer.Option(help="Mean active latents per token.")] = 32,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Steps of each trainer.")] = 200,
    threads: Annotated[int, typer.Option(help="Threads of each trainer.")] = 0,
    peers: Annotated[
        str, typer.Option(help="Who runs beside ours, of sae_lens, dictionary_learning, dense.")
    ] = "sae_lens,dictionary_learning,dense",
    peers_python: Annotated[
        Path, typer.Option(envvar="PEERS_PYTHON", help="Python with the other libraries.")
    ] = Path(".venv-peers/bin/python"),
    as_json: Json = False,
) -> None:
    """A whole training step: ours, other libraries', and plain torch, in turn on one machine."""
    import torch

    from maira_sae.bench_train import StepShape, compare, table

    shape = StepShape(d_model, latents, k, batch, threads or torch.get_num_threads())
    names = ("maira_sae", *(name for name in peers.split(",") if name))
    result = compare(shape, names, steps, str(peers_python))
    typer.echo(table(result))
    if as_json:
        typer.echo(json.dumps(result))
