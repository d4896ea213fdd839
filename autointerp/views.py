"""What the explorer shows, as plain records: latents, films, texts, findings, steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from hooks.files import ConfigError
from hooks.images import Corners

Cell = str | int | float | None


@dataclass(frozen=True)
class FilmView:
    """A film that latents are shown on; stored once, however many latents fire on it."""

    image: Path | Image.Image | None
    """A path is read when the page is made, as the model reads it; ``None`` where the film is not
    at hand."""
    caption: str
    boxes: tuple[tuple[str, Corners], ...] = ()
    """Where findings are known to be, each with its name."""
    grid: Corners = (0.0, 0.0, 1.0, 1.0)
    """The part of the film that the patch grid covers: the model may crop."""


@dataclass(frozen=True)
class HeatView:
    """One latent on the patches of one film."""

    film: str
    """Key of the film in :attr:`ExplorerData.films`."""
    values: Float[np.ndarray, "rows columns"]
    modality: str = "frontal"
    kind: str = "top"
    """Why the example is shown: ``top``, ``quantile`` or a kind of contrast."""


@dataclass(frozen=True)
class TextView:
    """A stretch of a report with the activation of one latent on every token."""

    study: str
    tokens: tuple[str, ...]
    """Blanks included, so that joining them gives the text."""
    values: tuple[float, ...]
    modality: str = "report"
    kind: str = "top"

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ConfigError(
                f"a text of {self.study} has {len(self.tokens)} tokens and {len(self.values)} "
                "activations; give one activation a token"
            )


@dataclass(frozen=True)
class ScoreView:
    """How well a latent or its label does, beside the same measure of one that knows nothing."""

    scorer: str
    modality: str
    value: float
    standard_error: float | None = None
    baseline: float | None = None
    """The same measure of something that knows nothing: see :attr:`ExplorerData.baseline`."""
    n: int | None = None


@dataclass(frozen=True)
class ModalityView:
    """How a latent fires on one kind of row."""

    modality: str
    n_rows: int
    n_fired: int
    maximum: float = 0.0
    quantiles: Mapping[str, float] = field(default_factory=dict)
    """Of the activations where it fires, by name: ``p50``, ``p90``, ``p99``."""
    edges: tuple[float, ...] = ()
    """Edges of the histogram's bins, ascending; empty without a histogram."""
    counts: tuple[int, ...] = ()
    """Rows in each bin, of those on which the latent fires."""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + bool(self.counts):
            raise ConfigError(
                f"a histogram of {self.modality} has {len(self.counts)} counts and "
                f"{len(self.edges)} edges; give one edge more than counts"
            )

    @property
    def rate(self) -> float:
        """Share of rows on which it fires."""
        return self.n_fired / self.n_rows if self.n_rows else 0.0


@dataclass(frozen=True)
class DoseView:
    """What an edit does as its strength grows."""

    outcome: str
    """What is measured, as ``reports that state an effusion``."""
    strengths: tuple[float, ...]
    values: tuple[float, ...]
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    """Ends of the interval at each strength, where known."""


@dataclass(frozen=True)
class SteeringView:
    """One report before and after an edit."""

    title: str
    before: str
    after: str
    film: str | None = None
    """Key of the film in :attr:`ExplorerData.films`."""


@dataclass(frozen=True)
class LatentView:
    """Everything the page knows of one latent."""

    latent: int
    site: str = ""
    """Which dictionary it is of, where a page holds latents of several."""
    label: str | None = None
    """``None`` is "no clear concept", or nobody was asked: see ``asked``."""
    asked: bool = True
    """Whether an explainer was asked for a label."""
    confidence: float | None = None
    explainer: str = ""
    finding: str | None = None
    """A finding it stands for, where one is known."""
    dense: bool = False
    """It fires nearly everywhere."""
    scores: tuple[ScoreView, ...] = ()
    """The first is the one that the list shows and sorts by."""
    modalities: tuple[ModalityView, ...] = ()
    heats: tuple[HeatView, ...] = ()
    """Strongest first."""
    texts: tuple[TextView, ...] = ()
    """Strongest first."""
    promoted: tuple[tuple[str, float], ...] = ()
    """Tokens whose logits its decoder direction raises most, with the change of the logit."""
    suppressed: tuple[tuple[str, float], ...] = ()
    neighbours: tuple[tuple[int, float], ...] = ()
    """Latents of the same dictionary with the cosine of their decoder directions."""
    doses: tuple[DoseView, ...] = ()
    steering: tuple[SteeringView, ...] = ()

    @property
    def key(self) -> str:
        """Names the latent on the page: its number, after its dictionary if that is named."""
        return f"{self.site} {self.latent}".strip()


@dataclass(frozen=True)
class LatentLink:
    """A cell of the findings' table that opens a latent."""

    key: str
    """:attr:`LatentView.key`."""
    text: str


@dataclass(frozen=True)
class ExplorerData:
    """A page: its words, its latents, and the films they are shown on."""

    title: str
    subtitle: str
    origin: str
    """Whose films and reports these are, for the banner; as ``Procedural films, of nobody.``"""
    latents: tuple[LatentView, ...]
    films: Mapping[str, FilmView] = field(default_factory=dict)
    baseline: str = "a shuffled label"
    """What the baselines of the scores are of."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Figures about the model and its dictionaries."""
    findings: tuple[Mapping[str, Cell | LatentLink], ...] = ()
    """Rows of a table; every row has the keys of the first."""
    steering: tuple[SteeringView, ...] = ()
    doses: tuple[DoseView, ...] = ()

    def __post_init__(self) -> None:
        keys = [latent.key for latent in self.latents]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"latent {twice!r} is there twice; name dictionaries by site")
        for latent in self.latents:
            used = [heat.film for heat in latent.heats] + [view.film for view in latent.steering]
            self._check_films(f"latent {latent.key}", used)
        self._check_films("steering", [view.film for view in self.steering])
        for row in self.findings:
            if list(row) != list(self.findings[0]):
                raise ConfigError(
                    f"a row of findings has the columns {list(row)}; the first has "
                    f"{list(self.findings[0])}"
                )

    def _check_films(self, owner: str, used: list[str | None]) -> None:
        for film in used:
            if film is not None and film not in self.films:
                raise ConfigError(
                    f"{owner} is shown on film {film!r}, which is not among the films"
                )


def histogram(
    values: Float[np.ndarray, " n"], bins: int = 32
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of the positive values, in ``bins`` equal bins from 0 to their maximum.

    >>> histogram(np.array([0.0, 1.0, 2.0, 4.0]), bins=2)
    ((0.0, 2.0, 4.0), (1, 2))
    """
    fired = values[values > 0]
    if len(fired) == 0:
        return (), ()
    counts: Int[np.ndarray, " bins"]
    counts, edges = np.histogram(fired, bins=bins, range=(0.0, float(fired.max())))
    return tuple(edges.tolist()), tuple(counts.tolist())
