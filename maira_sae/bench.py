"""`maira-sae bench …`: the measurements this library's claims rest on, each a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from maira_sae.bench_train import StepShape

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


Width = Annotated[int, typer.Option("--d-model", help="Width of the activations.")]
Latents = Annotated[int, typer.Option(help="Size of the dictionary.")]
Active = Annotated[int, typer.Option("--k", help="Mean active latents per token.")]
Tokens = Annotated[int, typer.Option("--batch", help="Tokens a step.")]
Threads = Annotated[int, typer.Option(help="Threads; 0 means as many as torch takes.")]


@app.command(
    epilog="Example: `maira-sae bench train --d-model 512 --latents 8192 --k 32 --batch 2048` — "
    "other libraries need `make peers` first"
)
def train(
    d_model: Width = 512,
    latents: Latents = 8192,
    k: Active = 32,
    batch: Tokens = 2048,
    steps: Annotated[int, typer.Option(help="Steps of each trainer.")] = 200,
    threads: Threads = 0,
    peers: Annotated[
        str, typer.Option(help="Who runs beside ours, of sae_lens, dictionary_learning, dense.")
    ] = "sae_lens,dictionary_learning,dense",
    peers_python: Annotated[
        Path, typer.Option(envvar="PEERS_PYTHON", help="Python with the other libraries.")
    ] = Path(".venv-peers/bin/python"),
    as_json: Json = False,
) -> None:
    """A whole training step: ours, other libraries' and plain torch, in turn on one machine."""
    from maira_sae.bench_train import compare, table

    names = ("maira_sae", *(name for name in peers.split(",") if name))
    shape = _shape(d_model, latents, k, batch, threads)
    _print(compare(shape, names, steps, str(peers_python)), table, as_json)


@app.command(epilog="Example: `maira-sae bench kernels --d-model 1024 --latents 16384`")
def kernels(
    d_model: Width = 512,
    latents: Latents = 8192,
    k: Active = 32,
    batch: Tokens = 2048,
    steps: Annotated[int, typer.Option(help="Steps.")] = 40,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Where a step's time goes, beside what this machine's rates, or an H100's, would allow."""
    from maira_sae.bench_kernels import budget, table

    _print(budget(_shape(d_model, latents, k, batch, threads), steps), table, as_json)


@app.command(epilog="Example: `maira-sae bench resume --latents 16384`")
def resume(
    d_model: Width = 512,
    latents: Latents = 8192,
    k: Active = 32,
    batch: Tokens = 2048,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """What writing and reading a checkpoint costs, beside a step and the bare disk."""
    from maira_sae.bench_resume import measure, table

    with TemporaryDirectory(dir=Path.cwd()) as temporary:
        result = measure(_shape(d_model, latents, k, batch, threads), Path(temporary))
    _print(result, table, as_json)


def _shape(d_model: int, latents: int, k: int, batch: int, threads: int) -> StepShape:
    import torch

    from maira_sae.bench_train import StepShape

    return StepShape(d_model, latents, k, batch, threads or torch.get_num_threads())


def _print(
    result: dict[str, Any], table: Callable[[Mapping[str, Any]], str], as_json: bool
) -> None:
    typer.echo(table(result))
    if as_json:
        typer.echo(json.dumps(result))
