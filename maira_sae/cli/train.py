"""Activations → dictionaries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    Json,
    Seed,
    device_map,
    finish,
    load_studies,
    numbers,
)


@app.command(
    epilog="Example: `maira-sae train acts/ --site llm.15.resid_post --expansion 4 --out sae/`; "
    "on 8 GPUs `torchrun --nproc-per-node 8 -m maira_sae train acts/ … --shard-latents`; without "
    "a folder, rows come from the model: `maira-sae train --model maira-2/ --studies mimic/ …`"
)
def train(
    out: Annotated[Path, typer.Option(help="SAE folder to make or complete.")],
    activations: Annotated[
        Path | None,
        typer.Argument(metavar="[ACTS]", help="Activation folder; without one, --model runs."),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Site; not needed when there is one. Repeatable.")
    ] = None,
    expansion: Annotated[
        list[int] | None, typer.Option(help="Dictionary size over width (8). Repeatable.")
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Mean active latents per token (32). Repeatable.")
    ] = None,
    activation: Annotated[str, typer.Option(help="batch_topk or topk.")] = "batch_topk",
    groups: Annotated[
        str, typer.Option(help="Group fractions, such as 0.25,0.75; 1 means no nesting.")
    ] = "",
    sampled_prefixes: Annotated[
        int, typer.Option(help="Prefixes drawn anew each step, instead of groups.")
    ] = 0,
    k_start: Annotated[int | None, typer.Option(help="k at the first step.")] = None,
    k_anneal_steps: Annotated[int, typer.Option(help="Steps from --k-start to --k.")] = 0,
    steps: int = 10_000,
    batch: Annotated[int, typer.Option(help="Tokens a step, of all ranks together.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Default: 2e-4 / sqrt(F / 2^14).")] = None,
    warmup_steps: int = 1000,
    role_weight: Annotated[
        list[str] | None, typer.Option(help="Loss weight of a role: report=2. Repeatable.")
    ] = None,
    max_norm: Annotated[
        float | None, typer.Option(help="Leave out rows above so many root-mean-square norms.")
    ] = None,
    threshold_start: Annotated[
        int, typer.Option(help="Step from which the threshold is followed.")
    ] = 1000,
    calibration_rows: Annotated[
        int, typer.Option(help="Rows on which the final threshold is set so that L0 is k.")
    ] = 0,
    dead_after_tokens: int = 10_000_000,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    kernels: Annotated[
        str | None, typer.Option(help="reference, cpu or triton; default: the fastest.")
    ] = None,
    shard_latents: Annotated[
        bool, typer.Option(help="Under torchrun: split the dictionary, not the batch.")
    ] = False,
    log: Annotated[
        list[str] | None, typer.Option(help="tensorboard or wandb (offline). Repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to run instead of ACTS.")] = None,
    studies: Annotated[Path | None, typer.Option(help="Studies for --model.")] = None,
    policy: Annotated[str, typer.Option(help="Tokens kept of --model.")] = "published",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train Matryoshka BatchTopK SAEs; run again to resume.

    Several sites, expansions or k train in one pass over the data, each into a folder of its own
    under --out.
    """
    from itertools import product

    from hooks.files import read_json
    from sae import TrainConfig, train_all
    from sae import train as run

    rows: Any = _live_rows(model, studies, site, policy) if activations is None else None
    if activations is not None:
        from hooks.store import ActivationFolder

        rows = ActivationFolder(activations)
    common: dict[str, Any] = {
        "activation": activation,
        "sampled_prefixes": sampled_prefixes,
        "k_start": k_start,
        "k_anneal_steps": k_anneal_steps,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "role_weights": _weights(role_weight or ()),
        "max_norm": max_norm,
        "threshold_start": threshold_start,
        "calibration_rows": calibration_rows,
        "dead_after_tokens": dead_after_tokens,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "kernels": kernels,
        "shard_latents": shard_latents,
        "measure_every": max(1, steps // 10),
        "seed": seed,
    }
    if groups:
        common["group_fractions"] = numbers(groups, "--groups", float)
    chosen = list(product(site or [_only_site(rows)], expansion or [8], k or [32]))
    configs = {
        f"{place}-x{size}-k{active}": TrainConfig(place, expansion=size, k=active, **common)
        for place, size, active in chosen
    }
    loggers = tuple(log or ())
    with _ranks() as leader:
        if len(configs) == 1:
            saes = {"": run(rows, next(iter(configs.values())), out, loggers)}
        else:
            saes = train_all(rows, configs, out, loggers)
    if not leader:
        return
    records = {name: read_json(out / name / "metrics.json") for name in saes}
    lines = [f"{sae!r}\n{records[name]['heldout']}" for name, sae in saes.items()]
    result = records.get("", {"saes": records})
    finish({"out": str(out), **result}, as_json, "\n".join(lines))


def _only_site(folder: Any) -> str:
    if len(folder.sites) > 1:
        raise MairaSaeError(f"{folder.folder} has sites {folder.sites}; choose one with --site")
    return folder.sites[0]


def _weights(pairs: Sequence[str]) -> dict[str, float]:
    weights = {}
    for pair in pairs:
        role, _, number = pair.partition("=")
        try:
            weights[role] = float(number)
        except ValueError:
            raise MairaSaeError(f"--role-weight is {pair!r}; write one like report=2") from None
    return weights


def _live_rows(
    model: str | None, studies: Path | None, sites: list[str] | None, policy: str
) -> Any:
    """Rows straight from a model, where no activation folder is given."""
    if model is None or studies is None or not sites:
        raise MairaSaeError(
            "give an activation folder, or --model, --studies and --site to train without one"
        )
    from hooks.harvest import HarvestConfig
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from sae import LiveRows

    loaded = load_model(model, device_map=device_map())
    config = HarvestConfig(tuple(sites), policy)
    return LiveRows(loaded, load_processor(model), load_studies(studies), config)


@contextmanager
def _ranks() -> Iterator[bool]:
    """Join the process group that ``torchrun`` describes, if it does; yields whether to print."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()
