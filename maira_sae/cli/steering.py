"""Labels → control."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import EndpointError, MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    AllowRemote,
    BoxOption,
    Dtype,
    Json,
    LabelsFolder,
    Llm,
    ModelFolder,
    SaeFolder,
    StudiesFolder,
    ViewOption,
    Where,
    device_map,
    endpoint_of,
    finish,
    load_studies,
    names_of,
    numbers,
    positions,
    study_of,
    warned,
)


@app.command(
    epilog="Example: `maira-sae steer sae/ acts/ --model maira-2/ --studies mimic/ --study s50 "
    "--latent 12 --strength 2 --out steering/`"
)
def steer(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    latent: Annotated[int, typer.Option(help="Latent number.")],
    study: Annotated[str | None, typer.Option(help="Study id.")] = None,
    studies_n: Annotated[
        int | None, typer.Option(help="Steer this many studies instead, and write --out.")
    ] = None,
    sweep: Annotated[str, typer.Option(help="Strengths of --studies-n, such as 0.5,1,2.")] = "1,2",
    target: Annotated[
        str, typer.Option(help="Words of the concept, by comma; other changes are side effects.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for effects.json and report.html; a random latent runs beside."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="In units of the latent's 99th percentile; of scale, the factor."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="add, scale, clamp, minimum (clamp from below) or ablate.")
    ] = "add",
    where: Where = "all",
    view: ViewOption = None,
    box: BoxOption = None,
    sections: Annotated[str, typer.Option(help="Only prompt sections, by comma.")] = "",
    sentences: Annotated[str, typer.Option(help="Only report sentences, from 0, by comma.")] = "",
    window: Annotated[str | None, typer.Option(help="Only positions: first,end.")] = None,
    opening: Annotated[str, typer.Option(help="First words of the report.")] = "",
    labels: LabelsFolder = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible server that judges entailment both ways."),
    ] = None,
    llm: Llm = None,
    allow_remote: AllowRemote = None,
    radfact: Annotated[
        Path | None, typer.Option(help="Also write RadFact's input: .csv, or .json if grounded.")
    ] = None,
    max_new_tokens: int = 300,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate a study's report with a latent turned up or down, beside the plain one.

    With --out, or over several studies, a random latent that fires as often runs beside it, and a
    page shows films, reports, KL, perplexity, repetition, and with --endpoint entailment.
    """
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from hooks.provenance import untrained_parts
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering import Edit, compare, measure_references
    from steering.entailment import write_radfact
    from steering.run import run_steering

    if (study is None) == (studies_n is None):
        raise MairaSaeError("give --study or --studies-n, one of them")
    if studies_n is not None and strength is not None:
        raise MairaSaeError("--strength is for --study; several studies take --sweep 1,2")
    judge = endpoint_of(endpoint, llm, allow_remote)
    if out is None and studies_n is not None:
        out = Path("steering-out")
    if out is None and (judge is not None or radfact is not None):
        raise MairaSaeError("--endpoint and --radfact judge what --out holds; give a folder")
    words = [word.strip() for word in target.split(",") if word.strip()]
    if studies_n is not None and not words:
        raise MairaSaeError("--target names no word; a sweep needs it to tell side effects apart")
    places = positions(where, view, box, sections, sentences, window)
    one = study is not None
    chosen = [study_of(studies, study)] if one else load_studies(studies)[:studies_n]
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    names = names_of(labels, sae.config.site)
    reference = measure_references(sae, folder, [latent]).of(latent)
    edit = Edit(latent, strength, reference, mode) if study is not None else None  # pyright: ignore
    loaded = load_model(model, dtype=dtype, device_map=device_map())
    processor = load_processor(model)
    if out is None:
        assert edit is not None
        texts = compare(
            loaded,
            processor,
            chosen[0],
            sae,
            [edit],
            where=places,
            opening=opening,
            max_new_tokens=max_new_tokens,
        )
        warnings = warned(untrained_parts(model, loaded))
        result = {
            **texts._asdict(),
            **{"latent": latent, "name": names.get(latent), "mode": mode, "strength": strength},
            **{"reference": reference, "study": study, "warnings": warnings},
        }
        text = f"before: {texts.before}\nafter:  {texts.after}"
        finish(result, as_json, "\n".join([*warnings, text]))
        return
    strengths = (0.0,) if mode == "ablate" else (strength or 0.0,)
    if study is None and mode != "ablate":
        strengths = numbers(sweep, "--sweep", float)
    done = run_steering(
        loaded,
        processor,
        chosen,
        sae,
        folder,
        latent,
        mode,  # pyright: ignore[reportArgumentType]
        strengths,
        words,
        where=places,
        opening=opening,
        ask=_judge(judge, out) if judge is not None else None,
        names=names,
        checkpoint=model,
        max_new_tokens=max_new_tokens,
    )
    done.write(out)
    if radfact is not None:
        reports = [
            (f"{one.study} {one.arm} {one.strength:g}", one.after, one.before)
            for one in done.effects
        ]
        write_radfact(reports, radfact)
    record = done.record()
    result = {
        **{"out": str(out), **record["settings"], "warnings": record["warnings"]},
        **{"doses": record["doses"], "measured": record["measured"]},
        "radfact": None if radfact is None else str(radfact),
    }
    if study is not None:
        first = done.effects[0]
        result |= {"study": study, "strength": strength, "before": first.before}
        result |= {"after": first.after, "measures": done.measures[0].record()}
    n = len(chosen)
    text = f"{out / 'report.html'}: {n} {'study' if n == 1 else 'studies'}"
    finish(result, as_json, "\n".join([*record["warnings"], text]))


def _judge(where: Any, out: Path) -> Any:
    """Asks the endpoint, each question once; a question that failed is missing."""
    from autointerp import Client, Ledger, Request

    out.mkdir(parents=True, exist_ok=True)
    client = Client(where, Ledger(out / "ledger.sqlite"))
    answered = False

    def ask(messages: Sequence[dict[str, str]], schema: Any) -> str | None:
        nonlocal answered
        try:
            reply = client.ask_all([Request(list(messages), 32, schema)])[0]
        except EndpointError:
            if not answered:  # nothing works yet: it is the endpoint, not the question
                raise
            return None
        answered = True
        return reply.text or None

    return ask
