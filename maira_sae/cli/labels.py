"""Dictionaries → labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    AllowRemote,
    Endpoint,
    Json,
    Llm,
    SaeFolder,
    Seed,
    endpoint_of,
    finish,
    numbers,
)


@app.command(
    epilog="Example: `maira-sae label sae/ acts/ --latents 12,77 --endpoint "
    "http://127.0.0.1:8000/v1 --llm llama --out labels/`"
)
def label(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    latents: Annotated[str, typer.Option(help="Comma-separated latent numbers.")],
    out: Annotated[Path, typer.Option(help="Label folder to make or complete.")],
    endpoint: Endpoint = None,
    llm: Llm = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint with the tokenizer; default: the harvest's.")
    ] = None,
    allow_remote: AllowRemote = None,
    n_explain: Annotated[int, typer.Option(help="Sentences shown to the explainer.")] = 10,
    n_score: Annotated[int, typer.Option(help="Held-out sentences a label is scored on.")] = 20,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 16,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="Most requests a minute, retries included.")
    ] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(help="Most tokens a minute, by the estimate.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of 1M tokens in.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of 1M tokens out.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop before all runs into --out cost more; exit 3.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Stop after so many requests of this run; exit 3.")
    ] = None,
    redact: Annotated[
        bool, typer.Option(help="Take identifiers out of text for a remote host.")
    ] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Name latents, by a language model or by word statistics; score names on held-out patients.

    Run again to resume: what was answered is in --out, and is not asked again. Every request that
    leaves is listed in requests.jsonl there.
    """
    from dataclasses import replace

    from autointerp import LabelConfig, Limits, label_latents
    from hooks.processor import load_processor
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE

    where = endpoint_of(endpoint, llm, allow_remote)
    limits = Limits(
        concurrency,
        requests_per_minute,
        tokens_per_minute,
        price_in,
        price_out,
        max_cost,
        max_requests,
    )
    if where is not None:
        where = replace(where, limits=limits, redact=redact)
    elif limits != Limits():
        raise MairaSaeError("rates, prices and budgets are for --endpoint; leave them out")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    tokenizer = load_processor(model or folder.manifest["model"]["id"]).tokenizer
    config = LabelConfig(
        numbers(latents, "--latents", int), n_explain=n_explain, n_score=n_score, seed=seed
    )
    labels = label_latents(
        sae, folder, tokenizer, where, config, out, lambda left: typer.echo(f"to do: {left}")
    )
    lines = [f"{one.latent}\t{one.label}\t{one.balanced_accuracy}" for one in labels]
    finish({"labels": [one._asdict() for one in labels]}, as_json, "\n".join(lines))
