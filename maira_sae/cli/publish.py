"""Dictionaries → the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from maira_sae.cli.app import app
from maira_sae.cli.options import Json, SaeFolder, finish


@app.command(
    epilog="Example: `maira-sae publish sae/ --repo me/my-sae --data 'MIMIC-CXR-JPG 2.1.0, "
    "under its "
    "data use agreement' --license other --labels labels/ --evaluation eval/ --dry-run`"
)
def publish(
    sae_folder: SaeFolder,
    repo: Annotated[str, typer.Option(help="Repository owner/name; there is no default.")],
    data: Annotated[str, typer.Option(help="Training data and their terms, for the card.")],
    license: Annotated[str, typer.Option(help="Licence, as the Hub writes it.")],
    base_model: Annotated[str, typer.Option(help="Hub id of the model it was trained on.")] = "",
    labels: Annotated[Path | None, typer.Option(help="Label folder.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Folder of `score`.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Folder of `eval --out`.")] = None,
    explorer: Annotated[Path | None, typer.Option(help="Page of `dashboard`.")] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="Another format besides SAELens': dictionary_learning, sparsify."
        ),
    ] = None,
    include_text: Annotated[
        list[str] | None, typer.Option(help="File that may hold patient text. Repeatable.")
    ] = None,
    include_images: Annotated[
        list[str] | None, typer.Option(help="File that may hold films. Repeatable.")
    ] = None,
    check_against: Annotated[
        Path | None,
        typer.Option(help="Activation folder or studies whose names must not be in any file."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For everyone to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent.")] = False,
    as_json: Json = False,
) -> None:
    """Publish an SAE with records and a model card, private unless --public.

    Run again to resume. Files with report text, study names or films are refused unless each is
    named.
    """
    from sae.hub import Publication, stage
    from sae.hub import publish as run

    publication = Publication(
        sae_folder,
        data,
        license,
        base_model,
        labels,
        scores,
        evaluation,
        explorer,
        ("sae_lens", *(extra or ())),
        tuple(include_text or ()),
        tuple(include_images or ()),
        _names_of(check_against) if check_against else (),
    )
    if not dry_run:
        address = run(publication, repo, private=not public)
        finish({"url": address, "repo": repo, "private": not public}, as_json, address)
        return
    with tempfile.TemporaryDirectory(prefix="maira-sae-publish-") as temporary:
        staged = stage(publication, repo, Path(temporary))
    lines = [
        f"{name}  {one['bytes']:,} bytes  sha256 {one['sha256']}"
        for name, one in staged.files.items()
    ]
    lines += [f"{name}  not sent" for name in staged.withheld]
    lines += [
        f"{name}  INCLUDED BY NAME: {', '.join(one.what for one in holds)}"
        for name, holds in staged.found.items()
    ]
    from huggingface_hub import constants

    kind = "public" if public else "private"
    lines.append(
        f"would go to {constants.ENDPOINT}/{repo} ({kind}); nothing was sent\n\n{staged.card}"
    )
    result = {
        "repo": repo,
        "endpoint": constants.ENDPOINT,
        "private": not public,
        "files": staged.files,
        "withheld": list(staged.withheld),
        "card": staged.card,
    }
    finish(json.loads(json.dumps(result)), as_json, "\n".join(lines))


def _names_of(folder: Path) -> tuple[str, ...]:
    """Studies and patients of a folder, and the longer sentences of its reports."""
    from hooks.files import is_sealed, read_json
    from hooks.store import KIND, ActivationFolder

    if is_sealed(folder) and read_json(folder / "manifest.json").get("kind") == KIND:
        acts = ActivationFolder(folder)
        return tuple({*map(str, acts.column("study")), *map(str, acts.column("patient"))})
    from maira_sae.cli.options import load_studies

    names: set[str] = set()
    for study in load_studies(folder):
        names |= {study.id, study.patient or study.id}
        text = " ".join(filter(None, (study.report, study.indication, study.prior_report)))
        names |= {part.strip() for part in text.split(".") if len(part.split()) >= 5}
    return tuple(names)
