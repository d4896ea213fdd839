"""Options that several subcommands share, and what is done with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from hooks.files import MairaSaeError

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
Dtype = Annotated[str, typer.Option(help="Dtype the model runs in: auto, float32, bfloat16 …")]


def finish(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    if text:
        typer.echo(text)
    if as_json:
        typer.echo(json.dumps(result))


def load_studies(folder: Path) -> list[Any]:
    """All studies of a folder; how many were skipped goes to standard error."""
    from hooks.readers import collect_studies

    found = collect_studies(folder)
    if found.skipped:
        name, reason = found.skipped[0]
        typer.echo(
            f"maira-sae: skipped {len(found.skipped)} studies, the first {name} ({reason}); "
            f"`maira-sae studies {folder}` counts them",
            err=True,
        )
    return found.studies


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
        raise MairaSaeError(f"{option} is {text!r}; write numbers like 12,77") from None


def own_device() -> Any:
    """The device of one process among several on a machine."""
    import torch

    return {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None


def device_map() -> str | None:
    import torch

    return "auto" if torch.cuda.is_available() else None
