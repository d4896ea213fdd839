"""The evaluation's one page: every figure with its interval, in a file that needs no network."""

from __future__ import annotations

import html
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.files import atomic_path

if TYPE_CHECKING:
    import plotly.graph_objects as go

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def write_report(record: Mapping[str, Any], path: Path, title: str) -> None:
    """Write the page of a record of :func:`sae.evaluate.evaluate` to ``path``."""
    parts = [
        f"<p>{record['n_tokens']:,} held-out tokens of {record['n_patients']:,} patients at "
        f"{html.escape(record['site'])}. Intervals: {html.escape(record['interval'])}.</p>",
        "<h2>Reconstruction at one L0</h2>",
        _reconstruction(record["dictionaries"]),
    ]
    figures = [_by_role(record["dictionaries"]), _densities(record["dictionaries"])]
    if record.get("cross_entropy_recovered"):
        parts += ["<h2>Cross-entropy recovered</h2>", _recovered(record["cross_entropy_recovered"])]
    if record.get("stability"):
        parts += [
            "<h2>The same directions elsewhere</h2>",
            "<p>Latents that fire, matched one to one by the cosine of their decoder directions; "
            "random directions show what chance gives.</p>",
            _stability(record["stability"]),
        ]
    if record.get("probing", {}).get("labels"):
        figures.append(_probes(record["probing"]["labels"]))
    for i, figure in enumerate(figures):
        parts.append(figure.to_html(full_html=False, include_plotlyjs=i == 0))
    body = "\n".join(parts)
    name = html.escape(title)
    with atomic_path(path) as temporary:
        temporary.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n"
        )


def shown(figure: Mapping[str, Any]) -> str:
    """A figure's record as text.

    >>> shown({"value": 0.25, "low": 0.2, "high": None, "n": 1200})
    '0.250 (0.200 to ?, n=1,200)'
    """
    if figure["value"] is None:
        return "not defined"
    low, high = (
        "?" if figure[bound] is None else f"{figure[bound]:.3f}" for bound in ("low", "high")
    )
    return f"{figure['value']:.3f} ({low} to {high}, n={figure['n']:,})"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [[*header], *rows]
    tag = ["th", *["td"] * len(rows)]
    return (
        "<table>"
        + "".join(
            "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in line) + "</tr>"
            for kind, line in zip(tag, lines, strict=True)
        )
        + "</table>"
    )


def _reconstruction(dictionaries: Mapping[str, Any]) -> str:
    rows = []
    for name, one in dictionaries.items():
        dead = shown(one["dead_fraction"]) if "dead_fraction" in one else ""
        cells = [shown(one[key]) for key in ("fvu", "l0", "cosine")]
        rows.append([html.escape(name), *cells, dead])
    return _table(("", "FVU", "L0", "cosine", "dead latents"), rows)


def _recovered(found: Mapping[str, Any]) -> str:
    rows = [
        [html.escape(name), shown(one["recovered_zero"]), shown(one["recovered_mean"])]
        for name, one in found.items()
    ]
    return _table(("", "against zero ablation", "against mean ablation"), rows)


def _stability(found: Mapping[str, Any]) -> str:
    rows = [
        [html.escape(name), shown(one["mean_cosine"]), shown(one["shared"])]
        for name, one in found.items()
    ]
    return _table(("", "mean cosine", "share of pairs at 0.7 or above"), rows)


def _bars(figures: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Heights and error bars of a trace."""
    values = [one["value"] for one in figures]
    known = [
        one if None not in (one["value"], one["low"], one["high"]) else dict.fromkeys(one, 0)
        for one in figures
    ]
    return {
        "y": values,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [one["high"] - one["value"] for one in known],
            "arrayminus": [one["value"] - one["low"] for one in known],
        },
    }


def _by_role(dictionaries: Mapping[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, one in dictionaries.items():
        groups = {"overall": one, **one["roles"]}
        bars = _bars([group["fvu"] for group in groups.values()])
        figure.add_bar(name=name, x=list(groups), **bars)
    figure.update_layout(
        title="Fraction of variance unexplained, about each role's own mean",
        yaxis_title="FVU",
        barmode="group",
    )
    return figure


def _densities(dictionaries: Mapping[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, one in dictionaries.items():
        groups = {name: one}
        if name == "sae":
            groups |= {f"{name}, {role}": found for role, found in one["roles"].items()}
        for label, group in groups.items():
            if "density" in group:
                edges, counts = group["density"]["log10_edges"], group["density"]["counts"]
                middle = [(a + b) / 2 for a, b in pairwise(edges)]
                label = f"{label} (never: {group['density']['never']})"
                figure.add_scatter(name=label, x=middle, y=counts, line_shape="hvh")
    figure.update_layout(
        title="How often latents fire",
        xaxis_title="log10 of the share of tokens",
        yaxis_title="latents",
    )
    return figure


def _probes(labels: Mapping[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    first = next(iter(labels.values()))
    for name, by_k in first.items():
        for k in by_k:
            bars = _bars([labels[label][name][k]["auroc"] for label in labels])
            visible = True if k == next(iter(by_k)) else "legendonly"
            figure.add_bar(name=f"{name}, k={k}", x=list(labels), visible=visible, **bars)
    figure.update_layout(
        title="Probes on k latents, AUROC on held-out studies",
        yaxis={"title": "AUROC", "range": [0.3, 1]},
        barmode="group",
    )
    return figure
