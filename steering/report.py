"""The folder of a steering run: records, figures of dose and response, reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hooks.files import versions, write_json
from hooks.pages import Page
from hooks.studies import Study
from sae.intervals import Figure
from steering.effects import Dose, Effect, dose_response, records
from steering.measures import UNSTEERED, MeasuredDose, Measures, measured_doses
from steering.pages import Names, add_films, add_heat, name_of
from steering.patches import FilmHeat

COLOURS = ("#2b8cc4", "#c98500", "#3a9d74", "#b0568b", "#8a8f98")
"""Of arms, readable on light and dark ground."""
AXES = {"kl": "KL, nats a token", "perplexity": "perplexity"}
Row = TypeVar("Row", Dose, MeasuredDose)
Series = Sequence[tuple[float, Figure | None]]


@dataclass(frozen=True)
class SteeringRun:
    """What was run, and what came of it."""

    title: str
    settings: Mapping[str, Any]
    studies: Sequence[Study]
    effects: Sequence[Effect]
    measures: Sequence[Measures]
    """One for each effect."""
    arms: Mapping[str, int]
    """The latent of each arm."""
    names: Names = field(default_factory=dict)
    heat: Mapping[str, Mapping[int, FilmHeat]] = field(default_factory=dict)
    """By study and latent."""
    size: int | None = None
    """Side of the square that the processor crops films to."""
    warnings: Sequence[str] = ()
    has_target: bool = True
    """Whether words of a target were given; without them nothing is on target."""

    @property
    def doses(self) -> list[Dose]:
        """By arm and strength."""
        return self._in_order(dose_response(self.effects))

    @property
    def measured(self) -> list[MeasuredDose]:
        """The unsteered model, then by arm and strength."""
        return self._in_order(measured_doses(self.effects, self.measures))

    def _in_order(self, rows: list[Row]) -> list[Row]:
        """What belongs to no arm first, then the arms as they were given."""
        place = {arm: i for i, arm in enumerate(self.arms)}
        return sorted(rows, key=lambda row: place.get(row.arm, -1))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "doses": records(self.doses) if self.has_target else [],
            "measured": [row.record() for row in self.measured],
            "effects": [
                {**one.record(), "measures": measured.record()}
                for one, measured in zip(self.effects, self.measures, strict=True)
            ],
            "versions": versions(),
        }

    def write(self, out: Path) -> None:
        """Write ``effects.json`` and ``report.html`` into ``out``."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "effects.json", self.record())
        write_report(self, out / "report.html")


def dose_figure(series: Mapping[str, Series], y: str, plain: float | None = None) -> Any:
    """A line for each series of (strength, figure) with its intervals; ``plain`` is dashed."""
    import plotly.graph_objects as go

    figure = go.Figure()
    arms = list(dict.fromkeys(name.split(",")[0] for name in series))
    for name, points in series.items():
        known = [(x, point) for x, point in points if point is not None]
        colour = COLOURS[arms.index(name.split(",")[0]) % len(COLOURS)]
        whole = all(point.low == point.low for _, point in known)  # NaN without two patients
        error = {
            "type": "data",
            "array": [point.high - point.value for _, point in known],
            "arrayminus": [point.value - point.low for _, point in known],
        }
        figure.add_scatter(
            x=[x for x, _ in known],
            y=[point.value for _, point in known],
            customdata=[point.n for _, point in known],
            hovertemplate="strength %{x}: %{y:.3g}, n=%{customdata}<extra>" + name + "</extra>",
            error_y=error if whole else None,
            name=name,
            mode="lines+markers",
            line={"dash": "dot" if "," in name and "side" in name else "solid", "color": colour},
        )
    if plain is not None:
        figure.add_hline(y=plain, line={"dash": "dash", "color": COLOURS[-1]})
    figure.update_layout(
        xaxis={"title": {"text": "strength, in reference activations"}, "rangemode": "tozero"},
        yaxis={"title": {"text": y}, "rangemode": "tozero"},
        showlegend=True,
        legend={"orientation": "h", "y": 1.14},
        margin={"l": 56, "r": 12, "t": 40, "b": 52},
    )
    return figure


def write_report(run: SteeringRun, path: Path) -> Path:
    """Write one HTML file that asks nothing of the network; returns ``path``."""
    page = Page(
        run.title,
        "Reports of the same films without and under an edit, and under the same edit of a random "
        "latent that fires as often.",
        run.settings,
        run.warnings,
    )
    doses = {(dose.arm, dose.strength): dose for dose in run.doses} if run.has_target else {}
    rows = [
        {
            "measured": row,
            "dose": doses.get((row.arm, row.strength)),
            "strength": "–" if row.arm == UNSTEERED else _strength(run, row.strength),
        }
        for row in run.measured
    ]
    by_effect: dict[str, list[int]] = {}
    for i, one in enumerate(run.effects):
        by_effect.setdefault(one.study, []).append(i)
    return page.write(
        path,
        "steer.html",
        "steering",
        figures=_figures(page, run, doses),
        rows=rows,
        studies=[_study(page, run, s, by_effect[s.id]) for s in run.studies if s.id in by_effect],
        has_target=run.has_target,
        entailed=any(one.entailment for one in run.measures),
        boxes=any(one.boxes for one in run.measures),
    )


def _strength(run: SteeringRun, strength: float) -> str:
    mode = str(run.settings.get("mode", ""))
    return mode if mode == "ablate" else f"{mode} {strength:g}".strip()


def _figures(
    page: Page, run: SteeringRun, doses: Mapping[tuple[str, float], Dose]
) -> list[tuple[int, str]]:
    """Numbers and captions; nothing where there is a single strength."""
    if len({one.strength for one in run.effects}) < 2:
        return []
    out = []
    if doses:
        series: dict[str, list[tuple[float, Figure | None]]] = {}
        for (arm, strength), dose in doses.items():
            series.setdefault(f"{arm}, on target", []).append((strength, dose.on_target))
            series.setdefault(f"{arm}, side effects", []).append((strength, dose.side_effects))
        text = "Share of studies with a change on target, and side effects a sentence."
        out.append((page.figure(dose_figure(series, "share")), text))
    for name, text in (
        ("kl", "KL between the plain and the edited model, nats a token."),
        ("perplexity", "Perplexity of the text under the model without edits; dashed: its own."),
    ):
        lines: dict[str, list[tuple[float, Figure | None]]] = {}
        plain = None
        for row in run.measured:
            if row.arm == UNSTEERED:
                plain = getattr(row, name)
            else:
                lines.setdefault(row.arm, []).append((row.strength, getattr(row, name)))
        figure = dose_figure(lines, AXES[name], plain.value if plain and name != "kl" else None)
        out.append((page.figure(figure), text))
    return out


def _study(page: Page, run: SteeringRun, study: Study, own: Sequence[int]) -> dict[str, Any]:
    keys = add_films(page, study, run.size)
    heat = run.heat.get(study.id, {})
    layers = [
        (latent, run.names.get(latent), arm, add_heat(page, name, keys, heat[latent]))
        for arm, latent in run.arms.items()
        if latent in heat
        for name in [f"{name_of(latent, run.names)}, {arm}"]
    ]
    by_strength: dict[float, list[tuple[Effect, Measures]]] = {}
    for i in own:
        by_strength.setdefault(run.effects[i].strength, []).append(
            (run.effects[i], run.measures[i])
        )
    return {
        "study": study.id,
        "film_keys": list(keys.values()),
        "layers": layers,
        "plain": run.effects[own[0]].before,
        "doses": [(_strength(run, s), pairs) for s, pairs in sorted(by_strength.items())],
    }
