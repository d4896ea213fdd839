"""review, draft: one study's report. For research, not for diagnosis."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    BoxOption,
    Dtype,
    Json,
    LabelsFolder,
    ModelFolder,
    Out,
    SaeFolder,
    StudiesFolder,
    StudyId,
    ViewOption,
    Where,
    finish_reading,
    load_both,
    names_of,
    positions,
    reading_page,
    study_of,
    warned,
)

Changes = Annotated[list[str] | None, typer.Option(help="latent=strength, in p99; repeat.")]


@app.command(
    epilog="Example: `maira-sae review vision-sae/ --model maira-2/ --studies mimic/ --study s50 "
    "--labels labels/ --out review/`"
)
def review(
    sae_folder: SaeFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: StudyId,
    report: Annotated[
        Path | None, typer.Option(help="Text file to review in place of the study's report.")
    ] = None,
    text_sae: Annotated[Path | None, typer.Option(help="SAE of the words.")] = None,
    labels: LabelsFolder = None,
    text_labels: Annotated[Path | None, typer.Option(help="Labels folder of --text-sae.")] = None,
    least_support: Annotated[float, typer.Option(help="Nats below which it is flagged.")] = 4.0,
    dtype: Dtype = "auto",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Name the image latents behind each sentence of a report, and flag what has none."""
    from hooks.provenance import untrained_parts
    from sae import MatryoshkaSAE
    from steering.pages import name_of, write_review
    from steering.review import ReviewConfig
    from steering.review import review as run

    if text_labels is not None and text_sae is None:
        raise MairaSaeError("--text-labels names the latents of --text-sae; give both")
    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    names = names_of(labels, sae.config.site)
    words = MatryoshkaSAE.from_pretrained(text_sae) if text_sae is not None else None
    text_names = names_of(text_labels, words.config.site) if words is not None else {}
    record = study_of(studies, study)
    if report is not None:
        record = record.model_copy(update={"report": _text_of(report)})
    loaded, processor = load_both(model, dtype)
    config = ReviewConfig(least_support=least_support)
    found = run(
        loaded,
        processor,
        record,
        sae,
        text_sae=words,
        names=names,
        text_names=text_names,
        config=config,
    )
    untrained = untrained_parts(model, loaded)
    if out is not None:
        write_review(
            out / "review.html",
            reading_page(
                f"Review of {study}",
                {"model": model, "site": sae.config.site, "report": report or "the study's own"},
                warned(untrained),
                "What each sentence of the report rests on: image latents, and their patches.",
            ),
            record,
            found,
            least_support=least_support,
            size=processor.image_size,
        )
    lines = []
    for one in found:
        behind = ", ".join(f"{name_of(e.latent, names)} {e.drop:.2f}" for e in one.image) or "none"
        flag = "" if one.supported else "UNSUPPORTED "
        lines.append(f"{flag}{one.text}\n  support {one.support:.2f}; latents {behind}")
    result = {
        "study": study,
        "sentences": [asdict(one) for one in found],
        "unsupported": [one.text for one in found if not one.supported],
    }
    finish_reading(result, untrained, as_json, "\n".join(lines), out, "review")


@app.command(
    epilog="Example: `maira-sae draft sae/ acts/ --model maira-2/ --studies mimic/ --study s50 "
    "--clamp 12=2 --ablate 7 --out draft/`"
)
def draft(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: StudyId,
    add: Changes = None,
    clamp: Changes = None,
    minimum: Changes = None,
    scale: Annotated[list[str] | None, typer.Option(help="latent=factor; repeat.")] = None,
    ablate: Annotated[list[int] | None, typer.Option(help="Latent; repeat.")] = None,
    where: Where = "all",
    view: ViewOption = None,
    box: BoxOption = None,
    opening: Annotated[str, typer.Option(help="First words of the report.")] = "",
    labels: LabelsFolder = None,
    max_new_tokens: int = 300,
    dtype: Dtype = "auto",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Generate a report under chosen edits; the text is marked as edited, every edit listed."""
    from hooks.provenance import untrained_parts
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering import Edit, measure_references
    from steering.draft import draft as run

    by_mode = {"add": add, "clamp": clamp, "minimum": minimum, "scale": scale}
    wanted = [
        (mode, *_change(pair, f"--{mode}"))
        for mode, pairs in by_mode.items()
        for pair in pairs or []
    ]
    places = positions(where, view, box)
    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    names = names_of(labels, sae.config.site)
    edits = [Edit(latent, mode="ablate") for latent in ablate or []]
    if wanted:
        folder = ActivationFolder(activations)
        references = measure_references(sae, folder, [latent for _, latent, _ in wanted])
        edits += [references.edit(latent, s, mode) for mode, latent, s in wanted]  # pyright: ignore
    record = study_of(studies, study)
    loaded, processor = load_both(model, dtype)
    made = run(
        loaded,
        processor,
        record,
        sae,
        edits,
        where=places,
        names=names,
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    untrained = untrained_parts(model, loaded)
    if out is not None:
        from steering.pages import write_draft
        from steering.patches import sees_patches, study_heat

        latents = [edit.latent for edit in edits]
        seen = sees_patches(sae) and bool(latents)
        write_draft(
            out / "draft.html",
            reading_page(
                f"Draft of {study}, with edits",
                {"model": model, "site": sae.config.site, "where": made.where, "opening": opening},
                warned(untrained),
                "This text is not the model's own reading of the films: it was written under the "
                "edits below.",
            ),
            record,
            made,
            heat=study_heat(loaded, processor, sae, record, latents) if seen else None,
            size=processor.image_size,
        )
    result = {
        **asdict(made),
        **{"heading": made.heading, "marked": made.marked, "sentences": made.sentences},
    }
    finish_reading(result, untrained, as_json, str(made), out, "draft")


def _change(pair: str, option: str) -> tuple[int, float]:
    """A latent and a strength from words like ``12=2``."""
    latent, _, strength = pair.partition("=")
    try:
        return int(latent), float(strength)
    except ValueError:
        raise MairaSaeError(f"{option} is {pair!r}; write one like 12=2") from None


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise MairaSaeError(f"--report {path} is no file; give a text file")
    return path.read_text(encoding="utf-8").strip()
