"""Studies → activations: what a folder of studies holds, and its activations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    Dtype,
    Json,
    ModelFolder,
    StudiesFolder,
    device_map,
    finish,
    load_studies,
    own_device,
)


@app.command(epilog="Example: `maira-sae studies mimic-cxr-jpg/ --open --json`")
def studies(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of studies.")],
    layout: Annotated[
        str | None, typer.Option(help="What DIR holds; default: told by its files.")
    ] = None,
    open_films: Annotated[
        bool, typer.Option("--open", help="Open every film, to find those that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a folder of studies holds: layout, counts, splits, gaps; leaks are an error."""
    from hooks.progress import track
    from hooks.readers import detect_layout, read_studies, survey
    from hooks.studies import refuse_leaks

    layout = layout or detect_layout(folder)
    found = survey(track(read_studies(folder, layout=layout), "studies"), open_films)
    result = {"layout": layout, **found.as_dict()}
    finish(result, as_json, _survey_lines(layout, found))
    refuse_leaks(found.leaks)


def _survey_lines(layout: str, found: Any) -> str:
    def counts(numbers: dict[str, int], limit: int = 14) -> str:
        shown = [f"{name} {n}" for name, n in list(numbers.items())[:limit] if n]
        return ", ".join(shown) or "none"

    lines = [
        f"layout    {layout}",
        f"studies   {found.studies} of {found.patients} patients, {found.films} films",
        f"with      {counts(found.have)}",
        f"sentences {found.sentences} with {found.boxes} boxes",
        f"labels    {counts(found.labels)}",
        f"splits    its own: {counts(found.given_splits)}; ours: {counts(found.splits)}",
    ]
    lines += [
        f"gap       {kind}: {gap.n}, the first {gap.first}" for kind, gap in found.gaps.items()
    ]
    return "\n".join(lines + [f"leak      {leak}" for leak in found.leaks[:20]])


@app.command(
    epilog="Example: `maira-sae harvest --model maira-2/ --studies mimic/ "
    "--site llm.15.resid_post --out acts/`"
)
def harvest(
    model: ModelFolder,
    studies: StudiesFolder,
    site: Annotated[list[str], typer.Option(help="Named place; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Activation folder to make or complete.")],
    policy: Annotated[
        str, typer.Option(help="Tokens to keep: published, report, clinical, patches, all.")
    ] = "published",
    patches: Annotated[
        str | None,
        typer.Option(help="Sample of each study's patches: uniform:0.1 or norm:64, for example."),
    ] = None,
    store_dtype: Annotated[str, typer.Option(help="Dtype on disk.")] = "bfloat16",
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Padded tokens a forward pass; default: 2048 on a processor, else 8192."),
    ] = None,
    studies_per_part: Annotated[
        int, typer.Option(help="Studies that are kept in memory and committed together.")
    ] = 64,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1, help="Parts made at a time; default: one a core (at most 4), one on a GPU."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Stop at a study that cannot be read, instead of skipping it.")
    ] = False,
    retry_skipped: Annotated[
        bool, typer.Option(help="Read skipped studies again, after they were mended.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Start even where the disk seems too small.")] = False,
    dtype: Dtype = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Check prompts against the checkpoint's own processor.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="Along the model's own reports, not the given ones.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest report of --generate.")] = 300,
    as_json: Json = False,
) -> None:
    """Write the activations of studies into a folder; run again to resume.

    The model is MAIRA-2 or another LLaVA; or an image encoder alone, which sees the films; or a
    causal language model alone, which reads the reports. Under torchrun each process makes its own
    parts, and the last one to finish seals the folder.
    """
    from hooks.harvest import Harvest, HarvestConfig
    from hooks.loading import load_any
    from hooks.policies import PatchSample
    from hooks.processor import load_processor

    sample = None if patches is None else PatchSample.parse(patches)
    config = HarvestConfig(
        tuple(site), policy, store_dtype, studies_per_part, batch_tokens, patches=sample
    )
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if retry_skipped and world > 1:
        raise MairaSaeError("--retry-skipped is for one process; run it once without torchrun")
    records = load_studies(studies)
    device = device_map() if world == 1 else own_device()
    loaded, sees = load_any(model, dtype=dtype, device_map=device)
    if sees != "studies" and generate:
        raise MairaSaeError(f"--generate needs a model that writes reports, not {model}")
    share = {"strict": strict, "rank": rank, "world": world}
    if sees != "studies":
        job = _tower_job(model, loaded, sees, records, config, out, share)
    elif generate:
        from hooks.generation import Decoding, generation_job

        words, decoding = load_processor(model, trust_remote_code), Decoding(max_new_tokens)
        job = generation_job(loaded, words, records, config, out, decoding, **share)
    else:
        words = load_processor(model, trust_remote_code)
        job = Harvest(loaded, words, records, config, out, **share)
    job.streams = streams or job.streams
    if retry_skipped:
        job.reopen_skipped()
    result: dict[str, Any] = {"out": str(out)}
    if not job.sealed and rank == 0 and sees == "studies" and not generate:
        left = job.estimate()
        typer.echo(f"to do: {left}")
        if not force:
            left.check_room(out)
        result["estimate"] = left._asdict()
    folder = job.run()
    if folder is None:
        text = f"process {rank} of {world} is done; the last one to finish seals {out}"
        finish({**result, "sealed": False}, as_json, text)
        return
    result |= {
        "sealed": True,
        "n_tokens": folder.n_tokens,
        "n_studies": folder.manifest["n_studies"],
        "n_skipped": folder.manifest.get("n_skipped", 0),
        "sites": folder.sites,
    }
    finish(result, as_json, repr(folder))


def _tower_job(
    source: str,
    model: Any,
    sees: str,
    studies: Sequence[Any],
    config: Any,
    out: Path,
    share: dict[str, Any],
) -> Any:
    """An image encoder over the studies' films, or a language model over their reports."""
    from hooks.plain import FilmScale, Text, films_job, texts_job

    if sees == "films":
        return films_job(model, studies, config, out, FilmScale.from_pretrained(source), **share)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [Text(s.id, s.report, s.patient) for s in studies if s.report]
    return texts_job(model, tokenizer, texts, config, out, **share)
