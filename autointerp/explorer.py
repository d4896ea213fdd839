"""The explorer: latents, films and reports in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.film_budget import FilmSet, store
from autointerp.views import (
    ExplorerData,
    HeatView,
    LatentLink,
    LatentView,
    SteeringView,
    TextView,
)
from hooks.files import ConfigError, atomic_path
from hooks.html import changed_words
from hooks.pages import STEPS, asset, packed, page_json, plotly, steps

SCRIPTS = ("store", "films", "charts", "list", "latent", "overview", "app")
CHUNK = 16
"""Latents packed together: enough to see what they share, few enough to be quick."""
FEWEST_FILM_BYTES = 0.3
"""Share of the page that films may claim before further examples of a latent."""


@dataclass(frozen=True)
class ExplorerConfig:
    """How much a page holds."""

    text: bool = True
    """Hold words of reports, and the names of studies."""
    films: bool = True
    """Hold films. Without them heat is drawn on black."""
    films_per_latent: int = 8
    texts_per_latent: int = 8
    """Of each kind of example at most this many; fewer where the page would grow too large."""
    max_bytes: int = 20_000_000
    """Largest size of the file."""

    def __post_init__(self) -> None:
        if self.films_per_latent < 1 or self.texts_per_latent < 1:
            raise ConfigError("films_per_latent and texts_per_latent start at 1; use films=False")


class Explorer:
    """A page of latents: :meth:`write` makes a file, and a notebook shows the object itself.

    Parameters
    ----------
    data
        What there is to show.
    config
        What of it the page holds.

    Raises
    ------
    ConfigError
        When made into a page that cannot fit ``config.max_bytes``.
    """

    def __init__(self, data: ExplorerData, config: ExplorerConfig | None = None) -> None:
        self.data = data
        self.config = config or ExplorerConfig()
        self._page: str | None = None

    def html(self) -> str:
        """The page."""
        if self._page is None:
            self._page = _render(self.data, self.config)
        return self._page

    def write(self, path: Path) -> Path:
        """Write the page as one file; returns ``path``."""
        page = self.html()
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return path

    def __repr__(self) -> str:
        return f"Explorer({self.data.title!r}, {len(self.data.latents):,} latents)"

    def _repr_html_(self) -> str:
        """The page in a frame of its own: no script of it reaches the notebook."""
        return (
            '<iframe sandbox="allow-scripts" style="width:100%;height:780px;border:1px solid #8884;'
            f'border-radius:8px" title="{html.escape(self.data.title, quote=True)}" '
            f'srcdoc="{html.escape(self.html(), quote=True)}"></iframe>'
        )


def _render(data: ExplorerData, config: ExplorerConfig) -> str:
    plotly, style, script = _assets()
    fixed = len(plotly) + len(style) + len(script) + 100_000
    # Examples give way first, in steps, until films have a fair share; then films fill the rest.
    per_latent = max(config.films_per_latent, config.texts_per_latent)
    while True:
        chosen = _Chosen(
            data,
            config,
            min(per_latent, config.films_per_latent),
            min(per_latent, config.texts_per_latent),
        )
        # Every wanted film counts as shown here, so that the page can only become smaller.
        bound = fixed + sum(map(len, chosen.chunks(None))) + len(chosen.index(None))
        room = config.max_bytes - bound
        least = FEWEST_FILM_BYTES * config.max_bytes if config.films and data.films else 0
        if room >= least or per_latent == 1:
            break
        per_latent -= 1
    if room < 0:
        raise ConfigError(
            f"a page of {len(data.latents):,} latents needs {bound:,} bytes without films, more "
            f"than the {config.max_bytes:,} it may have; choose fewer latents or raise the limit"
        )
    stored = store(data.films, chosen.wanted() if config.films else [], room)
    page = _template().render(
        title=data.title,
        style=style,
        script=script,
        plotly=plotly,
        index=chosen.index(stored),
        chunks=chosen.chunks(stored),
        films=[film.url for film in stored.films.values()],
    )
    if (size := len(page.encode())) > config.max_bytes:
        raise ConfigError(
            f"the page is {size:,} bytes, over {config.max_bytes:,}; choose fewer latents"
        )
    return page


class _Chosen:
    """The examples that a page shows of each latent, before it is known which films fit."""

    def __init__(
        self, data: ExplorerData, config: ExplorerConfig, n_films: int, n_texts: int
    ) -> None:
        self.data, self.config = data, config
        self.heats = [_firsts(latent.heats, n_films) for latent in data.latents]
        self.texts = [
            _firsts(latent.texts, n_texts) if config.text else [] for latent in data.latents
        ]
        self.places = {name: i for i, name in enumerate(data.films)}

    def wanted(self) -> list[list[str]]:
        """Films by latent, and those of steering, which count as a latent of one film each."""
        steered = [*self.data.steering, *(v for one in self.data.latents for v in one.steering)]
        ahead = [[view.film] for view in steered if view.film and self.config.text]
        return ahead + [[heat.film for heat in heats] for heats in self.heats]

    def chunks(self, stored: FilmSet | None) -> list[str]:
        """Latents as packed text, :data:`CHUNK` together."""
        details = [
            self._detail(latent, heats, texts, stored)
            for latent, heats, texts in zip(self.data.latents, self.heats, self.texts, strict=True)
        ]
        return [
            packed(page_json(details[start : start + CHUNK]).encode())
            for start in range(0, len(details), CHUNK)
        ]

    def _detail(
        self,
        latent: LatentView,
        heats: Sequence[HeatView],
        texts: Sequence[TextView],
        stored: FilmSet | None,
    ) -> dict[str, Any]:
        if stored is not None and self.config.films:
            # A film that did not fit takes its heat along; one not at hand never had a picture.
            heats = [
                heat
                for heat in heats
                if heat.film in stored.films or self.data.films[heat.film].image is None
            ]
        heat_top = max((float(heat.values.max()) for heat in heats), default=0.0)
        text_top = max((max(text.values, default=0.0) for text in texts), default=0.0)
        return {
            "explainer": latent.explainer,
            "confidence": latent.confidence,
            "scores": [asdict(score) for score in latent.scores],
            "modalities": [asdict(stats) for stats in latent.modalities],
            "heat_top": heat_top,
            "n_heats": len(latent.heats),
            "heats": [
                {
                    **{"film": self.places[heat.film], "kind": heat.kind},
                    **{"modality": heat.modality, "peak": float(heat.values.max())},
                    **{"rows": heat.values.shape[0], "columns": heat.values.shape[1]},
                    "bytes": base64.b64encode(steps(heat.values, heat_top).tobytes()).decode(),
                }
                for heat in heats
            ],
            "text_top": text_top,
            "n_texts": len(latent.texts),
            "texts": [
                {
                    **{"study": text.study, "kind": text.kind, "modality": text.modality},
                    **{"tokens": text.tokens, "peak": max(text.values, default=0.0)},
                    "bytes": steps(np.array(text.values), text_top).tolist(),
                }
                for text in texts
            ],
            "promoted": latent.promoted,
            "suppressed": latent.suppressed,
            "neighbours": [
                (f"{latent.site} {number}".strip(), cosine) for number, cosine in latent.neighbours
            ],
            "doses": [asdict(dose) for dose in latent.doses],
            "steering": self._steering(latent.steering),
        }

    def _steering(self, views: Sequence[SteeringView]) -> list[dict[str, Any]]:
        if not self.config.text:
            return []
        shown = []
        for view in views:
            before, after = changed_words(view.before, view.after)
            film = None if view.film is None else self.places[view.film]
            shown.append({"title": view.title, "film": film, "before": before, "after": after})
        return shown

    def index(self, stored: FilmSet | None) -> str:
        """What the page reads at once: columns of the list, the findings, what it holds."""
        data, latents = self.data, self.data.latents
        modalities = list(dict.fromkeys(m.modality for one in latents for m in one.modalities))
        rates = {
            name: [
                next((m.rate for m in one.modalities if m.modality == name), 0.0) for one in latents
            ]
            for name in modalities
        }
        main = [max(one.modalities, key=lambda m: m.rate, default=None) for one in latents]
        first = [one.scores[0] if one.scores else None for one in latents]
        columns = {
            "key": [one.key for one in latents],
            "label": [one.label for one in latents],
            "asked": [one.asked for one in latents],
            "finding": [one.finding for one in latents],
            "dense": [one.dense for one in latents],
            "score": [_short(score and score.value) for score in first],
            "baseline": [_short(score and score.baseline) for score in first],
            "modality": [modalities.index(m.modality) if m else None for m in main],
            "rate": [_short(m.rate) if m else None for m in main],
            "rates": [[_short(rate) for rate in rates[name]] for name in modalities],
            "peak": [
                _short(max((m.maximum for m in one.modalities), default=0.0)) for one in latents
            ],
            "tokens": [" ".join(t for t, _ in one.promoted[:4]) for one in latents],
        }
        encoded = {} if stored is None else stored.films
        order = {name: i for i, name in enumerate(encoded)}
        films = []
        for i, (name, film) in enumerate(data.films.items()):
            one = encoded.get(name)
            films.append(
                {
                    "caption": film.caption if self.config.text else f"film {i + 1}",
                    **{"boxes": film.boxes, "grid": film.grid, "stored": order.get(name)},
                    **{"width": one.width if one else 1, "height": one.height if one else 1},
                    "shown": one.shown if one else None,
                }
            )
        scorers = {score.scorer for score in first if score}
        content = {
            **{"subtitle": data.subtitle, "origin": data.origin, "facts": data.facts},
            **{"latents": columns, "modalities": modalities, "chunk": CHUNK},
            "baseline": data.baseline,
            "scorer": scorers.pop() if len(scorers) == 1 else "score",
            "films": films,
            "findings": [
                {k: asdict(v) if isinstance(v, LatentLink) else v for k, v in row.items()}
                for row in data.findings
            ],
            "steering": self._steering(data.steering),
            "doses": [asdict(dose) for dose in data.doses],
            "holds": self._holds(stored),
        }
        return page_json(content)

    def _holds(self, stored: FilmSet | None) -> dict[str, Any]:
        """What the page holds, in words, for whoever is about to pass it on."""
        n_films = 0 if stored is None else len(stored.films)
        studies = {text.study for texts in self.texts for text in texts}
        data, config = self.data, self.config
        steered = len(data.steering) + sum(len(one.steering) for one in data.latents)
        words = bool(studies or (steered and config.text))
        parts = [f"{n_films:,} film{'s' * (n_films != 1)}"] if n_films else []
        if words:
            parts.append(
                f"text from {len(studies):,} stud{'y' if len(studies) == 1 else 'ies'}"
                if studies
                else "generated reports"
            )
        held = f"This page holds {' and '.join(parts) if parts else 'no films and no report text'}."
        lines = [f"{len(data.latents):,} latents, with labels, scores and activation counts."]
        if n_films and stored is not None:
            left = f" {stored.left_out:,} more did not fit." if stored.left_out else ""
            lines.append(f"{n_films:,} films at {stored.rung.words}.{left}")
        elif not config.films:
            lines.append("Films were left out on request; heat is drawn on black.")
        if words:
            lines.append("Words of reports, with the names of their studies.")
        elif not config.text:
            lines.append("Report text and the names of studies were left out on request.")
        lines.append(
            f"Activations in {STEPS} steps of each latent's largest; the file asks nothing of the "
            "network."
        )
        withheld = {"films_withheld": not config.films, "text_withheld": not config.text}
        return {"banner": held, "lines": lines, **withheld}


def _firsts(items: Sequence[Any], count: int) -> list[Any]:
    """The first ``count`` items of every kind, in order."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.kind] = seen.get(item.kind, 0) + 1
        if seen[item.kind] <= count:
            kept.append(item)
    return kept


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


@lru_cache(maxsize=1)
def _assets() -> tuple[str, str, str]:
    """Packed plotly.js, the style and the script."""
    style = asset("hooks", "theme.css") + asset("autointerp", "explorer.css")
    parts = [asset("hooks", "kit.js"), *(asset("autointerp", f"{name}.js") for name in SCRIPTS)]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();"
    return plotly(), style, script


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(asset("autointerp", "explorer.html"))
