"""Pages of films and reports to read: one HTML file each, that asks nothing of the network.

A page is a template that extends ``hooks/page/reading.html``. What it draws by script is given to
:class:`Page` first: films, layers of heat over them, figures.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from hooks.files import atomic_path
from hooks.film_files import encode_all
from hooks.html import changed_words
from hooks.images import Corners, grid_of, read_image

RESEARCH = "For research, not for diagnosis."
CAREFUL = "They may be of patients: keep to the terms of the data set, and do not pass them on."
STEPS = 255
"""Heat is kept as this many shares of the largest of its layer."""


@dataclass(frozen=True)
class _Film:
    image: Image.Image
    caption: str
    grid: Corners


class Page:
    """One page in the making.

    Parameters
    ----------
    title, lead
        What it is, in a line and in a sentence.
    facts
        Shown below; empty ones are left out.
    warnings
        Stand above everything else.
    max_film_bytes
        Films are stored as finely as this allows.
    """

    def __init__(
        self,
        title: str,
        lead: str = "",
        facts: Mapping[str, object] | None = None,
        warnings: Sequence[str] = (),
        max_film_bytes: int = 12_000_000,
    ) -> None:
        self.title, self.lead, self.warnings = title, lead, list(warnings)
        self.facts = {k: _shown(v) for k, v in (facts or {}).items() if v not in (None, "", (), [])}
        self._films: dict[str, _Film] = {}
        self._layers: list[dict[str, Any]] = []
        self._figures: list[dict[str, Any]] = []
        self._max_film_bytes = max_film_bytes

    def film(self, image: Path | Image.Image, caption: str, size: int | None = None) -> str:
        """Add a film; returns its key.

        Parameters
        ----------
        image
            A path is read as the model reads it; grey values are left as they are.
        size
            Side of the square that the model's processor crops to; without it, heat lies on the
            centre square, which is the same but for roundings.
        """
        picture = read_image(image) if isinstance(image, Path) else image
        grid = grid_of(*picture.size, size or min(picture.size))
        key = str(len(self._films))
        self._films[key] = _Film(picture, caption, grid)
        return key

    def layer(self, name: str, heat: Mapping[str, Float[np.ndarray, "rows columns"]]) -> int:
        """Add what is drawn over films at one time, by the film's key; returns its number.

        Values below 0 and unknown ones (NaN) are shown as silent.
        """
        known = {key: np.nan_to_num(np.asarray(values, float)) for key, values in heat.items()}
        top = max((float(values.max()) for values in known.values()), default=0.0)
        films = {
            key: {
                **{"rows": values.shape[0], "columns": values.shape[1]},
                "bytes": base64.b64encode(steps(values, top).tobytes()).decode(),
            }
            for key, values in known.items()
        }
        self._layers.append({"name": name, "top": max(top, 0.0), "films": films})
        return len(self._layers) - 1

    def figure(self, figure: Any) -> int:
        """Add a Plotly figure; returns its number."""
        content = json.loads(figure.to_json())
        content["layout"].pop("template", None)  # the page has colours for light and dark
        self._figures.append(content)
        return len(self._figures) - 1

    def html(self, template: str, package: str, **content: Any) -> str:
        """The page by a template of ``package``, from the folder ``page`` of it."""
        images = {key: film.image for key, film in self._films.items()}
        stored, rung = encode_all(images, self._max_film_bytes)
        films = {
            key: {
                **{"caption": film.caption, "grid": film.grid},
                **{"url": stored[key].url, "size": film.image.size, "shown": stored[key].shown},
            }
            for key, film in self._films.items()
        }
        data = {"layers": self._layers, "figures": self._figures}
        return (
            _environment(package)
            .get_template(template)
            .render(
                **{"page": self, "films": films, "style": _style(), "script": _script()},
                **{"data": page_json(data), "plotly": plotly() if self._figures else ""},
                **{"research": RESEARCH, "careful": CAREFUL if films else ""},
                **{"stored_as": rung.words if films else "", "layers": self._layers},
                **content,
            )
        )

    def write(self, path: Path, template: str, package: str, **content: Any) -> Path:
        """Write :meth:`html` as one file; returns ``path``."""
        page = self.html(template, package, **content)
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return path


def steps(values: np.ndarray, top: float) -> np.ndarray:
    """Activations as bytes; one that fires at all is never 0.

    >>> steps(np.array([0.0, 0.001, 2.0, -1.0]), 2.0).tolist()
    [0, 1, 255, 0]
    """
    shares = np.clip(values.astype(float) / top, 0, 1) if top > 0 else np.zeros(values.shape)
    return np.where(shares > 0, np.maximum(1, np.rint(STEPS * shares)), 0).astype(np.uint8)


def page_json(content: Any) -> str:
    """JSON for a script element, which no ``<`` of a text can end."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def packed(content: bytes) -> str:
    """Gzip and base64, the same for the same bytes."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


@lru_cache(maxsize=1)
def plotly() -> str:
    """plotly.js, packed."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs().encode())


def asset(package: str, name: str) -> str:
    """A text file of a package's folder ``page``."""
    return files(package).joinpath("page", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _style() -> str:
    return asset("hooks", "theme.css") + asset("hooks", "reading.css")


@lru_cache(maxsize=1)
def _script() -> str:
    parts = (asset("hooks", "kit.js"), asset("hooks", "reading.js"))
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();"


@lru_cache(maxsize=4)
def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, "page"), PackageLoader("hooks", "page")])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True
    )
    environment.filters["short"] = _short
    environment.globals["changed_words"] = changed_words
    return environment


def _short(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
