"""index, search, history: studies by what their latents do. For research, not for diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    Dtype,
    Json,
    LabelsFolder,
    Out,
    SaeFolder,
    StudyId,
    finish_reading,
    load_both,
    load_studies,
    names_of,
    numbers,
    reading_page,
    study_of,
    warned,
)

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.")]
Films = Annotated[
    Path | None, typer.Option("--studies", help="Folder of studies, for the films on the page.")
]
HeatSae = Annotated[
    Path | None, typer.Option("--sae", help="SAE folder that made the index; with --acts, heat.")
]
HeatActs = Annotated[
    Path | None, typer.Option("--acts", help="Activation folder of the index; with --sae, heat.")
]


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
    result = {"out": str(out), "rows": len(made.rows), "kinds": made.kinds}
    finish_reading(result, made.untrained, as_json, f"{out}: {len(made.rows)} rows of {made.kinds}")


@app.command(
    epilog='Example: `maira-sae search index/ --label "pleural effusion" --labels labels/ '
    "--studies mimic/ --sae sae/ --acts acts/ --out search/`"
)
def search(
    index_folder: IndexFolder,
    latents: Annotated[str | None, typer.Option(help="Comma-separated latents.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Words of a label in --labels; all latents that say them.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Id of a study in the index.")] = None,
    film: Annotated[
        Path | None, typer.Option(help="A film (PNG, JPEG, DICOM); needs --sae and --model.")
    ] = None,
    kind: Annotated[str, typer.Option(help="frontal, lateral, prior, report …")] = "frontal",
    top: Annotated[int, typer.Option(help="Studies to name.")] = 10,
    labels: LabelsFolder = None,
    studies: Films = None,
    sae_folder: HeatSae = None,
    activations: HeatActs = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint that reads --film.")] = None,
    dtype: Dtype = "auto",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Name the studies in which latents are strongest, or that are most like a study or a film."""
    from steering.pages import name_of
    from steering.search import Index, latents_named

    given = [option for option in (latents, label, like, film) if option is not None]
    if len(given) != 1:
        raise MairaSaeError("give --latents, --label, --like or --film, one of them")
    if label is not None and labels is None:
        raise MairaSaeError("--label is looked up among names; give --labels")
    if film is not None and (sae_folder is None or model is None):
        raise MairaSaeError("--film is read by the model and the SAE; give --model and --sae")
    found = Index(index_folder)
    names = names_of(labels, found.site)
    query = None
    if film is not None:
        assert sae_folder is not None and model is not None
        values, query = _read_film(film, sae_folder, model, dtype, found, kind)
        hits, asked = found.near(values, top, kind), f"films like {film.name}"
    elif like is not None:
        hits, asked = found.like(like, top, kind), f"studies like {like}"
    else:
        chosen = (
            numbers(latents, "--latents", int)
            if latents is not None
            else tuple(latents_named(names, label or ""))
        )
        hits = found.by_latents(chosen, top, kind)
        asked = "studies with " + " or ".join(name_of(one, names) for one in chosen)
    warnings = warned(found.untrained)
    result = {
        "asked": asked,
        "kind": kind,
        "hits": [
            {
                **{"study": hit.study, "patient": hit.patient, "score": hit.score},
                "latents": [
                    {"latent": one, "name": names.get(one), "share": share}
                    for one, share in hit.latents
                ],
            }
            for hit in hits
        ],
    }
    if out is not None:
        from steering.pages import write_search

        by_latents = film is None and like is None
        records = {one.id: one for one in load_studies(studies)} if studies else {}
        heat = _heat(
            sae_folder, activations, {hit.study: [n for n, _ in hit.latents] for hit in hits}
        )
        shown = None
        if query is not None and film is not None:
            wanted = {n for hit in hits[:1] for n, _ in hit.latents}
            shown = (film, film.name, {n: grid for n, grid in query.items() if n in wanted})
        write_search(
            out / "search.html",
            reading_page(f"Search: {asked}", {"index": index_folder, "tokens": kind}, warnings),
            hits,
            records,
            kind=kind,
            names=names,
            meaning="A score is the strongest of the latents, as a share of its largest activation "
            "in the index."
            if by_latents
            else "A score is the cosine of latents, each in units of its largest activation; the "
            "shares say which latents make it up.",
            heat=heat,
            query=shown,
        )
    text = "\n".join(
        f"{hit.score:.3f}  {hit.study}  {', '.join(name_of(n, names) for n, _ in hit.latents[:3])}"
        for hit in hits
    )
    finish_reading(
        result,
        found.untrained,
        as_json,
        text or "no study: the latents fire on none",
        out,
        "search",
    )


@app.command(
    epilog="Example: `maira-sae history index/ --study s50 --labels labels/ --studies mimic/ "
    "--sae sae/ --acts acts/ --out history/`"
)
def history(
    index_folder: IndexFolder,
    study: StudyId,
    top: Annotated[int, typer.Option(help="Latents to name.")] = 10,
    labels: LabelsFolder = None,
    named: Annotated[
        bool, typer.Option("--named", help="Only latents with a label in --labels.")
    ] = False,
    studies: Films = None,
    sae_folder: HeatSae = None,
    activations: HeatActs = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Name the latents that appear, vanish or change between the prior and the current film."""
    from steering.history import film_pairs
    from steering.pages import name_of
    from steering.search import Index

    if out is not None and studies is None:
        raise MairaSaeError("--out shows the two films; give --studies")
    if named and labels is None:
        raise MairaSaeError("--named keeps latents with a label; give --labels")
    place = Index(index_folder)
    names = names_of(labels, place.site)
    found = film_pairs(place).highlights(study, top, names if named else None)
    if out is not None and studies is not None:
        from steering.pages import write_history

        heat = _heat(sae_folder, activations, {study: [one.latent for one in found]})
        write_history(
            out / "history.html",
            reading_page(
                f"History of {study}",
                {"index": index_folder, "site": place.site},
                warned(place.untrained),
                "Latents that appear, vanish or change between the prior film and this one.",
            ),
            study_of(studies, study),
            found,
            names=names,
            heat=heat.get(study),
        )
    lines = [f"{name_of(h.latent, names)} {h.kind}: {h.before:.3g} to {h.now:.3g}" for h in found]
    highlights = [{**h._asdict(), "name": names.get(h.latent)} for h in found]
    result = {"study": study, "highlights": highlights}
    text = "\n".join(lines or ["no latent changes"])
    finish_reading(result, place.untrained, as_json, text, out, "history")


def _heat(
    sae_folder: Path | None, activations: Path | None, wanted: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Patches by study and latent, from a folder of activations; empty where none was named."""
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE
    from steering.patches import StoredPatches

    if activations is None:
        return {}
    if sae_folder is None:
        raise MairaSaeError("--acts holds activations, and --sae their latents; give both")
    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    stored = StoredPatches(sae, ActivationFolder(activations))
    return {study: stored.heat(study, latents) for study, latents in wanted.items()}


def _read_film(
    film: Path, sae_folder: Path, model: str, dtype: str, found: Any, kind: str
) -> tuple[Any, dict[int, Any]]:
    """What a film's latents do at their largest, and the patches of those that fire."""
    from hooks.studies import Study
    from sae import MatryoshkaSAE
    from steering.evidence import film_summary
    from steering.patches import study_heat

    sae = MatryoshkaSAE.from_pretrained(sae_folder)
    if sae.config.site != found.site:
        raise MairaSaeError(
            f"{sae_folder} is of {sae.config.site}, the index of {found.site}; give its SAE"
        )
    loaded, processor = load_both(model, dtype)
    values = film_summary(loaded, processor, sae, film)
    fired = values.nonzero().flatten().tolist()
    heat = study_heat(loaded, processor, sae, Study(id="film", frontal=film), fired)
    return values, {n: {kind: grids["frontal"]} for n, grids in heat.items()}
