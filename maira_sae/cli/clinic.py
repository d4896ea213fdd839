"""index, search, history, review, draft. For research, not for diagnosis."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError, StudyError, nearest
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    Dtype,
    Json,
    ModelFolder,
    SaeFolder,
    StudiesFolder,
    device_map,
    finish,
    load_studies,
    numbers,
)

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.")]
StudyId = Annotated[str, typer.Option(help="Study id.")]
NOTICE = "For research, not for diagnosis."


@app.command(epilog="Example: `maira-sae index vision-sae/ vision-acts/ --out index/`")
def index(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    out: Annotated[Path, typer.Option(help="Index folder to make.")],
    as_json: Json = False,
) -> None:
    """Summarise every study by the largest activation of each latent, for search and history."""
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering.search import build_index

    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    made = build_index(sae, folder, out)
    result = {"out": str(out), "rows": len(made.rows), "kinds": made.kinds, "notice": NOTICE}
    finish(result, as_json, f"{out}: {len(made.rows)} rows of {made.kinds}")


@app.command(epilog="Example: `maira-sae search index/ --latents 26,62 --top 10`")
def search(
    index_folder: IndexFolder,
    latents: Annotated[str | None, typer.Option(help="Comma-separated latents.")] = None,
    like: Annotated[str | None, typer.Option(help="Id of a study in the index.")] = None,
    kind: Annotated[str, typer.Option(help="frontal, lateral, prior, report …")] = "frontal",
    top: Annotated[int, typer.Option(help="Studies to name.")] = 10,
    as_json: Json = False,
) -> None:
    """Name the studies in which latents are strongest, or that are most like one study."""
    from steering.search import Index

    if (latents is None) == (like is None):
        raise MairaSaeError("give --latents or --like, one of them")
    found = Index(index_folder)
    if like is not None:
        hits = found.like(like, top, kind)
    else:
        hits = found.by_latents(numbers(latents or "", "--latents", int), top, kind)
    text = "\n".join([f"{hit.score:.3f}  {hit.study}" for hit in hits] + [NOTICE])
    finish({"hits": [hit._asdict() for hit in hits], "notice": NOTICE}, as_json, text)


@app.command(epilog="Example: `maira-sae history index/ --study s50`")
def history(
    index_folder: IndexFolder,
    study: StudyId,
    top: Annotated[int, typer.Option(help="Latents to name.")] = 10,
    as_json: Json = False,
) -> None:
    """Name the latents that appear, vanish or change between the prior and the current film."""
    from steering.history import film_pairs
    from steering.search import Index

    found = film_pairs(Index(index_folder)).highlights(study, top)
    lines = [f"latent {h.latent} {h.kind}: {h.before:.3g} to {h.now:.3g}" for h in found]
    result = {"study": study, "highlights": [h._asdict() for h in found], "notice": NOTICE}
    finish(result, as_json, "\n".join([*(lines or ["no latent changes"]), NOTICE]))


def _loaded(model: str, studies: Path, study: str, dtype: str) -> tuple[Any, Any, Any]:
    from hooks.maira2 import load_model
    from hooks.processor import load_processor

    records = {record.id: record for record in load_studies(studies)}
    if study not in records:
        raise StudyError(
            f"{studies} has no study {study!r}{nearest(study, records)}; choose one of its "
            f"{len(records)}, such as {next(iter(records), '')!r}"
        )
    loaded = load_model(model, dtype=dtype, device_map=device_map())
    return loaded, load_processor(model), records[study]


@app.command(
    epilog="Example: `maira-sae review vision-sae/ --model maira-2/ --studies mimic/ --study s50`"
)
def review(
    sae_folder: SaeFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: StudyId,
    text_sae: Annotated[Path | None, typer.Option(help="SAE of the words.")] = None,
    least_support: Annotated[float, typer.Option(help="Nats below which it is flagged.")] = 4.0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Name the image latents behind each sentence of a report, and flag what has none."""
    from sae import MatryoshkaSAE
    from steering.review import ReviewConfig
    from steering.review import review as run

    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    words = MatryoshkaSAE.from_pretrained(text_sae) if text_sae is not None else None
    loaded, processor, record = _loaded(model, studies, study, dtype)
    config = ReviewConfig(least_support=least_support)
    found = run(loaded, processor, record, sae, text_sae=words, config=config)
    lines = []
    for one in found:
        behind = ", ".join(f"{e.latent} ({e.drop:.2f})" for e in one.image) or "none"
        flag = "" if one.supported else "UNSUPPORTED "
        lines.append(f"{flag}{one.text}\n  support {one.support:.2f}; latents {behind}")
    result = {"study": study, "sentences": [asdict(one) for one in found], "notice": NOTICE}
    finish(result, as_json, "\n".join([*lines, NOTICE]))


@app.command(
    epilog="Example: `maira-sae draft sae/ acts/ --model maira-2/ --studies mimic/ --study s50 "
    "--clamp 12=2 --ablate 7`"
)
def draft(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: StudyId,
    clamp: Annotated[
        list[str] | None, typer.Option(help="latent=strength, in p99; repeat.")
    ] = None,
    ablate: Annotated[list[int] | None, typer.Option(help="Latent; repeat.")] = None,
    max_new_tokens: int = 300,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate a report under chosen edits; every edit is listed with it."""
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering import Edit, measure_references
    from steering.draft import draft as run

    wanted: dict[int, float] = {}
    for pair in clamp or []:
        latent, _, strength = pair.partition("=")
        try:
            wanted[int(latent)] = float(strength)
        except ValueError:
            raise MairaSaeError(f"--clamp is {pair!r}; write one like 12=2") from None
    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    edits = [Edit(latent, mode="ablate") for latent in ablate or []]
    if wanted:
        references = measure_references(sae, ActivationFolder(activations), list(wanted))
        edits += [references.edit(latent, s, "clamp") for latent, s in wanted.items()]
    loaded, processor, record = _loaded(model, studies, study, dtype)
    made = run(loaded, processor, record, sae, edits, max_new_tokens=max_new_tokens)
    result = {**asdict(made), "sentences": made.sentences, "notice": NOTICE}
    finish(result, as_json, str(made))
