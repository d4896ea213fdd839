"""The pages of review, search, history and draft, each of one study or one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hooks.pages import Page
from hooks.studies import Study
from steering.draft import Draft
from steering.history import Highlight
from steering.patches import FilmHeat, film_paths
from steering.review import SentenceReview
from steering.search import Hit

Names = Mapping[int, str]
KINDS = (
    ("appears", "Appears"),
    ("vanishes", "Vanishes"),
    ("grows", "Grows"),
    ("shrinks", "Shrinks"),
)


def name_of(latent: int, names: Names) -> str:
    """A latent in words.

    >>> name_of(3, {3: "left effusion"}), name_of(4, {})
    ('left effusion (3)', 'latent 4')
    """
    return f"{names[latent]} ({latent})" if latent in names else f"latent {latent}"


def add_films(
    page: Page, study: Study, size: int | None, views: Sequence[str] | None = None
) -> dict[str, str]:
    """Put a study's films on a page; returns the key of each view."""
    paths = film_paths(study)
    wanted = [view for view in views or paths if view in paths]
    return {view: page.film(paths[view], f"{view} film, {study.id}", size) for view in wanted}


def add_heat(page: Page, name: str, keys: Mapping[str, str], heat: FilmHeat) -> int:
    """Put the patches of one latent over films already there; returns the layer."""
    return page.layer(name, {keys[view]: grid for view, grid in heat.items() if view in keys})


def write_review(
    path: Path,
    page: Page,
    study: Study,
    found: Sequence[SentenceReview],
    *,
    least_support: float,
    size: int | None = None,
) -> Path:
    """Sentences beside the films, with the latents behind each and their patches.

    Parameters
    ----------
    page
        Empty, with its title, facts and warnings.
    size
        Side of the square that the processor crops to.
    """
    keys = add_films(page, study, size)
    sentences = []
    for one in found:
        latents = []
        for evidence in one.image:
            name = name_of(
                evidence.latent, {evidence.latent: evidence.name} if evidence.name else {}
            )
            heat = {view: np.array(grid) for view, grid in evidence.patches.items()}
            layer = add_heat(page, f"{name}: {one.text}", keys, heat)
            latents.append((evidence, layer))
        sentences.append({"review": one, "latents": latents})
    return page.write(
        path,
        "review.html",
        "steering",
        sentences=sentences,
        n_unsupported=sum(not one.supported for one in found),
        least_support=least_support,
        keys=list(keys.values()),
    )


def write_search(
    path: Path,
    page: Page,
    hits: Sequence[Hit],
    studies: Mapping[str, Study],
    *,
    kind: str,
    names: Names,
    meaning: str,
    heat: Mapping[str, Mapping[int, FilmHeat]] | None = None,
    query: tuple[Path | Image.Image, str, Mapping[int, FilmHeat]] | None = None,
    size: int | None = None,
) -> Path:
    """The films of the studies that were found, the latents that found them over each.

    Parameters
    ----------
    studies
        By id; a hit without one shows no film.
    kind
        Of the rows that were searched; of text, the frontal film is shown.
    meaning
        What a score is, in a sentence.
    heat
        By study and latent.
    query
        The film that was asked with, its caption, and heat by latent.
    """
    view = kind if kind in ("frontal", "lateral", "prior") else "frontal"
    shown_query: dict[str, Any] | None = None
    if query is not None:
        key = page.film(query[0], query[1], size)
        layers = [
            (latent, names.get(latent), add_heat(page, name_of(latent, names), {view: key}, grids))
            for latent, grids in query[2].items()
        ]
        shown_query = {"key": key, "latents": layers}
    shown = []
    for hit in hits:
        study = studies.get(hit.study)
        keys = add_films(page, study, size, (view,)) if study else {}
        own = (heat or {}).get(hit.study, {})
        latents = [
            (
                latent,
                names.get(latent),
                share,
                add_heat(page, name_of(latent, names), keys, own[latent])
                if keys and latent in own
                else None,
            )
            for latent, share in hit.latents
        ]
        shown.append(
            {
                "hit": hit,
                "key": keys.get(view),
                "latents": latents,
                "labels": study.labels if study else (),
                "report": study.report if study else None,
            }
        )
    return page.write(
        path, "search.html", "steering", hits=shown, query=shown_query, meaning=meaning
    )


def write_history(
    path: Path,
    page: Page,
    study: Study,
    highlights: Sequence[Highlight],
    *,
    names: Names,
    heat: Mapping[int, FilmHeat] | None = None,
    size: int | None = None,
) -> Path:
    """Prior and current film side by side, with the latents that changed between them."""
    keys = add_films(page, study, size, ("prior", "frontal"))
    shown = []
    for one in highlights:
        layer = None
        if heat is not None and one.latent in heat:
            layer = add_heat(page, name_of(one.latent, names), keys, heat[one.latent])
        largest = abs(one.now - one.before) / abs(one.share) if one.share else 1.0
        shown.append(
            {
                "highlight": one,
                "name": names.get(one.latent),
                "layer": layer,
                **{"before": min(1.0, one.before / largest), "now": min(1.0, one.now / largest)},
            }
        )
    return page.write(
        path,
        "history.html",
        "steering",
        highlights=shown,
        kinds=KINDS,
        keys=list(keys.values()),
        changes=study.changes,
        report=study.report,
        prior_report=study.prior_report,
    )


def write_draft(
    path: Path,
    page: Page,
    study: Study,
    made: Draft,
    *,
    heat: Mapping[int, FilmHeat] | None = None,
    size: int | None = None,
) -> Path:
    """The draft under its edits, beside the films and the report without edits."""
    keys = add_films(page, study, size)
    edits = []
    for edit in made.edits:
        latent = int(edit["latent"])
        layer = None
        if heat is not None and latent in heat:
            name = name_of(latent, {latent: edit["name"]} if edit["name"] else {})
            layer = add_heat(page, name, keys, heat[latent])
        edits.append((edit, layer))
    return page.write(
        path, "draft.html", "steering", draft=made, edits=edits, keys=list(keys.values())
    )
