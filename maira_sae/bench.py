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


@app.command(epilog="Example: `maira-sae bench store --json` — SAELens needs `make peers` first")
def store(
    activations: Annotated[
        Path | None, typer.Option(help="Folder to read; default: one of random rows.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the random folder.")] = 1 << 19,
    d_model: Annotated[int, typer.Option(help="Their width.")] = 512,
    batch: Annotated[int, typer.Option(help="Rows of a shuffled batch.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Turns of each way of reading.")] = 3,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    peers_python: Annotated[
        Path, typer.Option(envvar="PEERS_PYTHON", help="Python with the other libraries.")
    ] = Path(".venv-peers/bin/python"),
    as_json: Json = False,
) -> None:
    """Reading a folder in order and shuffled, beside plain reading, and SAELens' cached loading."""
    from dataclasses import replace

    import torch

    from hooks.store import ActivationFolder
    from maira_sae.bench_store import StoreBench, make_folder, run, table

    config = replace(StoreBench(), rows=rows, d_model=d_model, batch=batch, rounds=rounds)
    config = replace(config.quick() if quick else config, threads=torch.get_num_threads())
    with TemporaryDirectory() as temporary:
        made = Path(temporary) / "acts"
        folder = ActivationFolder(activations) if activations else make_folder(made, config)
        result = run(folder, config, peers_python, Path(temporary))
    typer.echo(table(result))
    if as_json:
        typer.echo(json.dumps(result))


@app.command(epilog="Example: `maira-sae bench harvest --json` — SAELens needs `make peers` first")
def harvest(
    model: Annotated[
        str, typer.Option(help="mini, real, smollm2, or a MAIRA-2 checkpoint with --studies.")
    ] = "mini",
    studies: Annotated[
        Path | None, typer.Option(help="Folder of studies for a checkpoint.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Site; default: the middle of the language model.")
    ] = None,
    n: Annotated[int, typer.Option(help="Studies or texts of a turn.")] = 256,
    studies_per_part: Annotated[int, typer.Option(help="Studies or texts of a part.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens a forward pass; default: as a harvest has.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype the mini model or checkpoint runs in.")
    ] = "auto",
    memory_tokens: Annotated[
        int, typer.Option(help="Also harvest this many tokens and watch resident memory.")
    ] = 0,
    peers_python: Annotated[
        Path, typer.Option(envvar="PEERS_PYTHON", help="Python with the other libraries.")
    ] = Path(".venv-peers/bin/python"),
    as_json: Json = False,
) -> None:
    """A whole harvest beside bare forward passes on the same batches, and SAELens' runner.

    mini is the phantom's model; real the assembled towers, with Open-i reports and a film of its
    own for each; smollm2 their language model alone, on the same reports.
    """
    import torch

    from hooks.harvest_config import HarvestConfig
    from maira_sae import harvest_subjects as subjects
    from maira_sae.bench_harvest import HarvestBench, memory, run, table

    config = HarvestBench(rounds, threads=torch.get_num_threads())
    place = site or ("llm.3.resid_post" if model == "mini" else "llm.15.resid_post")
    policy = "all" if model == "smollm2" else "published"
    taken = HarvestConfig(
        (place,), policy, studies_per_part=studies_per_part, batch_tokens=batch_tokens
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model == "mini":
            subject = subjects.mini(taken, n, folder, dtype)
        elif model == "real":
            subject = subjects.real(taken, n, folder)
        elif model == "smollm2":
            subject = subjects.smollm2(taken, n)
        else:
            subject = subjects.checkpoint(taken, site, n, model, studies, dtype)
        result = run(subject, config, folder, peers_python)
        if memory_tokens:
            result["memory"] = memory(subject, folder, memory_tokens)
    typer.echo(table(result))
    if as_json:
        typer.echo(json.dumps(result))


@app.command(epilog="Example: `maira-sae bench steer --demo demo-out --json`")
def steer(
    batch: Annotated[int, typer.Option(help="Reports written together.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Length of every report.")] = 50,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    demo: Annotated[
        Path | None,
        typer.Option(help="Finished phantom demo: also measure its findings and clinic figures."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """What steering costs on the mini model; with --demo, also what it does to every finding."""
    from maira_sae import bench_clinic, phantom_steering
    from maira_sae.bench_steer import SteerBench, run, table

    config = SteerBench(batch, new_tokens, rounds, threads=threads)
    result = run(config.quick() if quick else config)
    typer.echo(table(result))
    if demo is not None:
        steering, clinic = phantom_steering.SteeringBench(), bench_clinic.ClinicBench()
        if quick:
            steering, clinic = steering.quick(), clinic.quick()
        found = phantom_steering.run(demo / "vision-sae", steering)
        typer.echo(phantom_steering.table(found))
        with TemporaryDirectory() as temporary:
            result |= {**bench_clinic.run(demo, clinic, Path(temporary) / "index"), **found}
    if as_json:
        typer.echo(json.dumps(result))


@app.command(epilog="Example: `maira-sae bench labels --json`")
def labels(
    n: Annotated[int, typer.Option("--labels", help="Labels to get.")] = 2000,
    latency: Annotated[float, typer.Option(help="Seconds before each reply.")] = 0.1,
    faults: Annotated[float, typer.Option(help="Share of requests that fail.")] = 0.1,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 64,
    sdk: Annotated[bool, typer.Option("--sdk", help="Also by the openai SDK alone.")] = False,
    as_json: Json = False,
) -> None:
    """A labelling job against a scripted server with latency and faults, beside the ideal rate."""
    from maira_sae.bench_labels import LabelsBench, run, run_sdk, table

    config = LabelsBench(n, latency, faults, concurrency)
    with TemporaryDirectory(dir=Path.cwd()) as temporary:
        result = run(config, Path(temporary))
    if sdk:
        result["sdk"] = run_sdk(config)
    _print(result, table, as_json)


@app.command(
    epilog="Example: `maira-sae bench collect --d-model 1024 --latents 16384 --json` — delphi "
    "needs `make peers` first"
)
def collect(
    sae_folder: Annotated[
        Path | None, typer.Argument(metavar="SAE", help="SAE folder; default: a random one.")
    ] = None,
    activations: Annotated[
        Path | None, typer.Argument(metavar="ACTS", help="Its rows; default: random ones.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Random rows.")] = 40_000,
    d_model: Width = 1024,
    latents: Latents = 16_384,
    k: Active = 64,
    grid: Annotated[int, typer.Option(help="Patch rows, and columns, of a film.")] = 16,
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    peers_python: Annotated[
        Path, typer.Option(envvar="PEERS_PYTHON", help="Python with the other libraries.")
    ] = Path(".venv-peers/bin/python"),
    as_json: Json = False,
) -> None:
    """The collecting pass beside one read with one encode, and beside delphi's cache."""
    from maira_sae.bench_collect import CollectBench, run, table

    if (sae_folder is None) != (activations is None):
        raise typer.BadParameter("give both SAE and ACTS, or neither for random ones")
    config = CollectBench(rows, d_model, latents, k, grid, repeats)
    config = config.quick() if quick else config
    _print(run(config, sae_folder, activations, peers_python), table, as_json)


@app.command(epilog="Example: `maira-sae bench clinic --demo demo-out --json`")
def clinic(
    demo: Annotated[Path, typer.Option(help="Finished folder of `maira-sae demo`.")],
    reviewed: Annotated[
        int, typer.Option(help="Held-out studies whose reports are reviewed.")
    ] = 60,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """History highlights, visual search and report review against the phantom's truth."""
    from maira_sae.bench_clinic import ClinicBench, run, table

    config = ClinicBench(reviewed)
    with TemporaryDirectory() as temporary:
        result = run(demo, config.quick() if quick else config, Path(temporary) / "index")
    _print(result, table, as_json)


@app.command(epilog="Example: `maira-sae bench phantom-labels demo-out/text-features --json`")
def phantom_labels(
    features: Annotated[Path, typer.Argument(help="Features of the demonstration's reports.")],
    side: Annotated[str, typer.Option(help="Patients that score: score or steer.")] = "score",
    out: Annotated[
        Path | None, typer.Option(help="Folder of answers to keep; default: a temporary one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Planted findings named by a labeller that sees its prompt alone, over real HTTP."""
    from maira_sae.phantom_labels import run, table

    with TemporaryDirectory() as temporary:
        result = run(features, out or Path(temporary), side)
    _print(result, table, as_json)
