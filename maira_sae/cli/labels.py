"""Features → labels → scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooks.files import MairaSaeError, nearest
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    AllowRemote,
    Endpoint,
    Json,
    Llm,
    endpoint_of,
    finish,
    load_studies,
    numbers,
)

if TYPE_CHECKING:
    from autointerp import EndpointConfig, Label

NONE = "no clear concept"
FeaturesFolder = Annotated[Path, typer.Argument(metavar="FEATURES", help="Features folder.")]
Tokenizer = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint with the tokenizer; default: the harvest's."),
]
Concurrency = Annotated[int, typer.Option(help="Requests under way at once.")]
RequestRate = Annotated[
    float | None, typer.Option(help="Most requests a minute, retries included.")
]
TokenRate = Annotated[float | None, typer.Option(help="Most tokens a minute, by the estimate.")]
PriceIn = Annotated[float | None, typer.Option(help="Price of 1M tokens in.")]
PriceOut = Annotated[float | None, typer.Option(help="Price of 1M tokens out.")]
MaxCost = Annotated[
    float | None, typer.Option(help="Stop before all runs into --out cost more; exit 3.")
]
MaxRequests = Annotated[
    int | None, typer.Option(help="Stop after so many requests of this run; exit 3.")
]
Redact = Annotated[bool, typer.Option(help="Take identifiers out of text for a remote host.")]


@app.command(
    epilog="Example: `maira-sae label features/ --latents 12,77 --endpoint "
    "http://127.0.0.1:8000/v1 --llm llama --out labels/`"
)
def label(
    features: FeaturesFolder,
    out: Annotated[Path, typer.Option(help="Label folder to make or complete.")],
    latents: Annotated[
        str | None, typer.Option(help="Comma-separated latent numbers; default: all that fire.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Only so many latents, those that fire in most studies.")
    ] = None,
    explainer: Annotated[
        str, typer.Option(help="text, or reports: of the studies on whose films a latent fires.")
    ] = "text",
    modality: Annotated[
        str | None, typer.Option(help="Default: report for text, frontal for reports.")
    ] = None,
    studies: Annotated[Path | None, typer.Option(help="Studies, for --explainer reports.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="State the activation above which each label holds; of text, and takes a short "
            "question for each excerpt.",
        ),
    ] = False,
    endpoint: Endpoint = None,
    llm: Llm = None,
    model: Tokenizer = None,
    allow_remote: AllowRemote = None,
    concurrency: Concurrency = 16,
    requests_per_minute: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    max_requests: MaxRequests = None,
    redact: Redact = True,
    as_json: Json = False,
) -> None:
    """Name latents, by a language model or by word statistics; `score` then tests the names.

    Run again to resume: what was answered is in --out, and is not asked again. Every request that
    leaves is listed in requests.jsonl there.
    """
    from autointerp import Features, LabelConfig, label_latents, labeller_of
    from autointerp.labelling import announce

    found = Features.open(features)
    if explainer == "reports" and studies is None:
        raise MairaSaeError("--explainer reports needs --studies, whose reports it reads")
    if latents is not None and top is not None:
        raise MairaSaeError("--latents names them and --top counts them; give one of the two")
    chosen = numbers(latents, "--latents", int) if latents else tuple(sorted(found.alive()[:top]))
    config = LabelConfig(
        chosen,
        explainer,  # pyright: ignore[reportArgumentType]
        modality or ("frontal" if explainer == "reports" else "report"),
        calibrate,
    )
    records = load_studies(studies) if studies else []
    limits = {
        **{"concurrency": concurrency, "requests_per_minute": requests_per_minute},
        **{"tokens_per_minute": tokens_per_minute, "price_in": price_in, "price_out": price_out},
        **{"max_cost": max_cost, "max_requests": max_requests},
    }
    where = _limited(endpoint_of(endpoint, llm, allow_remote), limits, redact)
    who = labeller_of(where, _tokenizer(model, found), out)
    announce(who, found, config, records, lambda left: typer.echo(f"to do: {left}"))
    labels = label_latents(found, who, config, out, records)
    named = sum(one.label is not None for one in labels)
    lines = [f"{one.latent}\t{one.label or NONE}{_holds(one)}" for one in labels]
    result = {"labels": [one._asdict() for one in labels], "named": named}
    finish(result, as_json, "\n".join(lines))


@app.command(
    epilog="Example: `maira-sae score features/ labels/ --endpoint http://127.0.0.1:8000/v1 "
    "--llm llama --out scores/`"
)
def score(
    features: FeaturesFolder,
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="Label folder.")],
    out: Annotated[Path, typer.Option(help="Scores folder to make.")],
    scorers: Annotated[
        str, typer.Option(help="Of detection, fuzzing and embedding (MiniLM, on this machine).")
    ] = "detection",
    endpoint: Endpoint = None,
    llm: Llm = None,
    model: Tokenizer = None,
    allow_remote: AllowRemote = None,
    concurrency: Concurrency = 16,
    requests_per_minute: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    max_requests: MaxRequests = None,
    redact: Redact = True,
    as_json: Json = False,
) -> None:
    """Test each label on patients whom no explainer saw, beside another latent's label.

    A latent is on above the threshold that its label states (`label --calibrate`), or wherever it
    fires. The score is balanced accuracy: 0.5 is chance, also for a judge that always answers no.
    What could not be read is missing, and lowers the coverage. Answers are kept beside the labels.
    """
    from autointerp import Features, detection_scores, labeller_of, read_labels, write_scores
    from autointerp.embedding import MiniLM, embedding_scores
    from autointerp.labelling import fuzzing_scores

    found, names = Features.open(features), read_labels(labels)
    limits = {
        **{"concurrency": concurrency, "requests_per_minute": requests_per_minute},
        **{"tokens_per_minute": tokens_per_minute, "price_in": price_in, "price_out": price_out},
        **{"max_cost": max_cost, "max_requests": max_requests},
    }
    where = _limited(endpoint_of(endpoint, llm, allow_remote), limits, redact)
    tokenizer = _tokenizer(model, found)
    who = labeller_of(where, tokenizer, labels)
    scores = []
    for scorer in scorers.split(","):
        if scorer == "detection":
            scores += detection_scores(found, names, who, tokenizer)
        elif scorer == "fuzzing":
            scores += fuzzing_scores(found, names, who, tokenizer)
        elif scorer == "embedding":
            of_text = {one.latent: one.label for one in names if one.modality == "report"}
            scores += embedding_scores(found, of_text, tokenizer, MiniLM())
        else:
            known = ("detection", "fuzzing", "embedding")
            raise MairaSaeError(
                f"no scorer {scorer!r}{nearest(scorer, known)}; choose from {', '.join(known)}"
            )
    write_scores(scores, out, judge=who.model, scorers=scorers)
    by_latent = {one.latent: one.label for one in names}
    lines = [
        f"{one.latent}\t{by_latent[one.latent] or NONE}\t{one.scorer} {_shown(one.value)} (other "
        f"label {_shown(one.baseline)}; {one.n} answers, {one.coverage:.0%} read)"
        for one in scores
    ]
    finish({"scores": [vars(one) for one in scores]}, as_json, "\n".join(lines))


def _holds(label: Label) -> str:
    return "" if label.fit is None else f"\tabove {label.threshold:.3g} (fit {label.fit:.3f})"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _limited(where: EndpointConfig | None, limits: dict[str, Any], redact: bool) -> Any:
    """The endpoint with its rates, prices and budgets."""
    from dataclasses import replace

    from autointerp import Limits

    if where is not None:
        return replace(where, limits=Limits(**limits), redact=redact)
    if any(value != getattr(Limits(), name) for name, value in limits.items()):
        raise MairaSaeError("rates, prices and budgets are for --endpoint; leave them out")
    return None


def _tokenizer(model: str | None, features: Any) -> Any:
    from hooks.processor import load_processor

    return load_processor(model or features.manifest["model"]["id"]).tokenizer
