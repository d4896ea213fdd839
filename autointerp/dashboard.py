"""A page that shows latents on the films and reports they fire on: one HTML file, no network."""

from __future__ import annotations

import base64
import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from hooks.files import atomic_path


@dataclass(frozen=True)
class FilmView:
    """A film under the patch activations of one latent."""

    film: str
    """PNG as a data URL."""
    heat: list[list[float]]
    """``[rows, columns]``, as shares of the latent's reference activation."""
    caption: str
    box: tuple[float, float, float, float] | None = None
    """Where the finding is known to be: corners as fractions, origin top left."""


@dataclass(frozen=True)
class TextView:
    """A stretch of a report with the activation of one latent on every token."""

    study: str
    tokens: list[str]
    activations: list[float]
    """As shares of the latent's reference activation."""


@dataclass(frozen=True)
class ConceptView:
    """A concept with the latents that stand for it."""

    name: str
    figures: dict[str, float | int | str | None]
    """Shown as a row of the table, in this order; every concept has the same keys."""
    films: list[FilmView] = field(default_factory=list)
    texts: list[TextView] = field(default_factory=list)


@dataclass(frozen=True)
class SteeringView:
    """One report before and after an edit."""

    title: str
    film: str
    """PNG as a data URL."""
    before: str
    after: str


@dataclass(frozen=True)
class Page:
    """Everything a page shows."""

    title: str
    subtitle: str
    facts: dict[str, str]
    """Figures about the model and its dictionaries."""
    concepts: list[ConceptView]
    steering: list[SteeringView]


def data_url(film: Image.Image) -> str:
    """The film as a PNG inside a URL; its pixels are unchanged."""
    buffer = io.BytesIO()
    film.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat(activations: Float[np.ndarray, "rows columns"], reference: float) -> list[list[float]]:
    """Patch activations as shares of ``reference``, three decimals; zero if it never fires."""
    shares = activations / reference if reference > 0 else np.zeros_like(activations)
    return np.round(shares.astype(float), 3).tolist()


def changed_words(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of two texts, each with whether the other text lacks it at that place.

    >>> changed_words("no effusion .", "left effusion .")[1]
    [('left', True), ('effusion', False), ('.', False)]
    """
    one, two = before.split(), after.split()
    new_one, new_two = [True] * len(one), [True] * len(two)
    for i, j, n in difflib.SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks():
        new_one[i : i + n] = [False] * n
        new_two[j : j + n] = [False] * n
    return list(zip(one, new_one, strict=True)), list(zip(two, new_two, strict=True))


def write_page(page: Page, path: Path) -> Path:
    """Write ``page`` as one HTML file that asks nothing of the network; returns ``path``."""
    content: dict[str, Any] = asdict(page)
    for view in content["steering"]:
        view["before"], view["after"] = changed_words(view["before"], view["after"])
    # A "<" could end the script element that holds the data.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    html = _template().render(title=page.title, data=data)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(files("autointerp").joinpath("dashboard.html").read_text())


def strongest(values: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Places of the largest values, descending, ties in order."""
    return np.argsort(-np.asarray(values), kind="stable")[:count].tolist()
