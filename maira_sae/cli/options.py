"""Options that several subcommands share, and what is done with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hooks.files import MairaSaeError, write_json
from hooks.pages import RESEARCH

if TYPE_CHECKING:
    from hooks.study_list import StudyList

N = TypeVar("N", int, float)
LANGUAGE_MODEL = "Language model"
"""Heading in help of the options about whom to ask."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ModelFolder = Annotated[str, typer.Option("--model", help="MAIRA-2 checkpoint, folder or Hub id.")]
StudiesFolder = Annotated[
    Path, typer.Option("--studies", help="Folder of studies, in any layout that `studies` knows.")
]
SaeFolder = Annotated[Path, typer.Argument(metavar="SAE", help="SAE folder.")]
ActivationsFolder = Annotated[Path, typer.Argument(metavar="ACTS", help="Activation folder.")]
StudyId = Annotated[str, typer.Option("--study", help="Study id.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the record, as JSON, and the page, as HTML.")
]
Where = Annotated[str, typer.Option(help="all, prompt or generated.")]
ViewOption = Annotated[str | None, typer.Option(help="Only patches of frontal, lateral, prior.")]
BoxOption = Annotated[
    str | None, typer.Option(help="Only patches in a box: x0,y0,x1,y1 as fractions.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        help="Base URL of an OpenAI-compatible server; without it, word statistics.",
        rich_help_panel=LANGUAGE_MODEL,
    ),
]
Llm = Annotated[
    str | None,
    typer.Option(help="Model name at the endpoint.", rich_help_panel=LANGUAGE_MODEL),
]
AllowRemote = Annotated[
    str | None,
    typer.Option(help="Host that report text may be sent to.", rich_help_panel=LANGUAGE_MODEL),
]
LabelsFolder = Annotated[
    Path | None, typer.Option("--labels", help="Labels folder: latents are shown by their names.")
]
Dtype = Annotated[str, typer.Option(help="Dtype the model runs in: auto, float32, bfloat16 …")]


def finish(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    if text:
        typer.echo(text)
    if as_json:
        typer.echo(json.dumps(result))


def load_studies(folder: Path, strict: bool = False) -> StudyList:
    """All studies of a folder; how many were skipped goes to standard error.

    Raises :class:`hooks.files.StudyError` at the first that has to be, if ``strict``.
    """
    from hooks.readers import collect_studies

    found = collect_studies(folder, strict)
    if n := len(found.skipped):
        name, reason = found.skipped[0]
        first = f"{name} ({reason})"
        which = f"one study, {first}" if n == 1 else f"{n:,} studies, the first {first}"
        typer.echo(
            f"maira-sae: skipped {which}; `maira-sae studies {folder}` counts them", err=True
        )
    return found


def endpoint_of(endpoint: str | None, llm: str | None, allow_remote: str | None) -> Any:
    """Where a language model answers, or None when none is asked for."""
    from autointerp import EndpointConfig

    if endpoint is None and llm is None:
        return None
    if endpoint is None or llm is None:
        raise MairaSaeError("--endpoint and --llm go together; give both, or neither")
    return EndpointConfig(endpoint, llm, allow_remote)


def numbers(text: str, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        example = "0.5,1" if kind is float else "12,77"
        raise MairaSaeError(f"{option} is {text!r}; write numbers like {example}") from None


def names_of(labels: Path | None, site: str) -> dict[int, str]:
    """Labels by latent, of a labels folder that must be of a dictionary at ``site``."""
    from autointerp import read_labels
    from hooks.files import read_json

    if labels is None:
        return {}
    found = read_labels(labels)
    said = read_json(labels / "config.json")["site"]
    if said != site:
        raise MairaSaeError(
            f"{labels} names latents at {said}, and these are at {site}; give theirs"
        )
    return {one.latent: one.label for one in found if one.label is not None}


def study_of(folder: Path, study: str) -> Any:
    """One study of a folder."""
    from hooks.files import StudyError, nearest

    ids = []
    for record in load_studies(folder):
        if record.id == study:
            return record
        ids.append(record.id)
    raise StudyError(
        f"{folder} has no study {study!r}{nearest(study, ids)}; choose one of its {len(ids)}, such "
        f"as {ids[0]!r}"
    )


def positions(
    where: str,
    view: str | None = None,
    box: str | None = None,
    sections: str = "",
    sentences: str = "",
    window: str | None = None,
) -> Any:
    """Where edits act, from the flags."""
    from dataclasses import replace

    from hooks.files import nearest
    from hooks.grounding import Box
    from hooks.roles import View
    from steering import Positions

    places = Positions.of(where)
    if view is not None:
        names = [one.name.lower() for one in View]
        if view not in names:
            raise MairaSaeError(f"unknown view {view!r}{nearest(view, names)}; choose from {names}")
        places = replace(places, view=View[view.upper()])
    if box is not None:
        corners = numbers(box, "--box", float)
        if len(corners) != 4:
            raise MairaSaeError(f"--box is {box!r}; write four fractions like 0.5,0.5,1,1")
        places = replace(places, box=Box(*corners))
    if sections:
        places = replace(places, sections=tuple(sections.split(",")))  # pyright: ignore
    if sentences:
        places = replace(places, sentences=numbers(sentences, "--sentences", int))
    if window is not None:
        ends = numbers(window, "--window", int)
        if len(ends) != 2:
            raise MairaSaeError(f"--window is {window!r}; write two positions like 0,64")
        places = replace(places, window=ends)
    return places


def warned(untrained: tuple[str, ...]) -> list[str]:
    """What is said above everything else, of a model with untrained parts."""
    from hooks.provenance import warning_of

    warning = warning_of(untrained)
    return [warning] if warning else []


def own_device() -> Any:
    """The device of one process among several on a machine."""
    import torch

    return {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None


def device_map() -> str | None:
    import torch

    return "auto" if torch.cuda.is_available() else None


def finish_reading(
    result: dict[str, Any],
    untrained: tuple[str, ...],
    as_json: bool,
    text: str,
    out: Path | None = None,
    name: str = "",
) -> None:
    """Print the result, with what it must not be taken for; write it beside its page."""
    warnings = warned(untrained)
    result = {**result, "notice": RESEARCH, "warnings": warnings}
    if out is not None:
        write_json(out / f"{name}.json", result)
        result["page"] = str(out / f"{name}.html")
        text = f"{text}\n{result['page']}"
    finish(result, as_json, "\n".join([*warnings, text, RESEARCH]))


def reading_page(
    title: str, facts: Mapping[str, object], warnings: Sequence[str], lead: str = ""
) -> Any:
    from hooks.pages import Page

    return Page(title, lead, facts, warnings)


def load_both(model: str, dtype: str) -> tuple[Any, Any]:
    from hooks.maira2 import load_model
    from hooks.processor import load_processor

    return load_model(model, dtype=dtype, device_map=device_map()), load_processor(model)
