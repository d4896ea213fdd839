"""The page of a steering run: dose and response, reports side by side, films with their patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hooks.files import atomic_path
from hooks.html import changed_words, facts, marked, picture
from steering.effects import Dose, Effect

NOTICE = "For research, not for diagnosis."
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    ".pair{display:flex;gap:1.5em;flex-wrap:wrap;border-top:1px solid #ccc;padding:1em 0}"
    ".text{flex:1;min-width:240px}mark{background:#fd8}"
)


def heat(film: Image.Image, patches: np.ndarray) -> Image.Image:
    """The film's centre square under a latent's patches ``[rows, columns]``, in red."""
    grey = film.convert("L")
    side = min(grey.size)
    left, top = (grey.width - side) // 2, (grey.height - side) // 2
    square = grey.crop((left, top, left + side, top + side)).resize((448, 448))
    most = float(patches.max())
    share = np.uint8(255 * patches / most) if most > 0 else np.zeros(patches.shape, np.uint8)
    mask = Image.fromarray(share).resize(square.size, Image.Resampling.NEAREST)
    red = Image.new("RGB", square.size, (255, 60, 0))
    return Image.composite(red, square.convert("RGB"), mask.point(lambda v: v * 0.55))


def dose_figure(doses: Sequence[Dose]) -> Any:
    """On-target changes and side effects by strength, each arm with its intervals."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for arm in dict.fromkeys(dose.arm for dose in doses):
        own = [dose for dose in doses if dose.arm == arm]
        for what, dash in (("on_target", "solid"), ("side_effects", "dot")):
            points = [getattr(dose, what) for dose in own]
            known = all(point.low == point.low for point in points)  # NaN without two patients
            error = {
                "type": "data",
                "array": [p.high - p.value for p in points],
                "arrayminus": [p.value - p.low for p in points],
            }
            figure.add_scatter(
                x=[dose.strength for dose in own],
                y=[point.value for point in points],
                error_y=error if known else None,
                name=f"{arm}, {what.replace('_', ' ')}",
                line={"dash": dash},
            )
    figure.update_layout(
        title="Dose and response, 95 % intervals over patients",
        xaxis_title="strength, in reference activations",
        yaxis_title="share",
        yaxis_range=[-0.02, 1.02],
    )
    return figure


def write_report(
    path: Path,
    title: str,
    settings: Mapping[str, object],
    doses: Sequence[Dose],
    effects: Sequence[Effect],
    films: Mapping[str, Sequence[tuple[Image.Image, str]]],
) -> Path:
    """Write one HTML file that asks nothing of the network; returns ``path``.

    Parameters
    ----------
    films
        Pictures with captions that stand beside a study's reports.
    """
    parts = [facts(title, settings), f"<p>{NOTICE}</p>"]
    parts.append(dose_figure(doses).to_html(full_html=False, include_plotlyjs=True))
    for one in effects:
        before, after = changed_words(one.before, one.after)
        shown = "".join(picture(image, caption) for image, caption in films.get(one.study, ()))
        parts.append(
            f"<h2>{escape(one.study)}, {escape(one.arm)}, strength {one.strength:g}</h2>"
            f'<div class="pair"><div>{shown}</div>'
            f'<div class="text"><h3>plain</h3><p>{marked(before)}</p></div>'
            f'<div class="text"><h3>{escape(one.arm)}</h3><p>{marked(after)}</p>'
            f"<p>about the target: {_list(one.on_target)}<br>"
            f"side effects: {_list(one.side_effects)}</p></div></div>"
        )
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _list(sentences: Sequence[str]) -> str:
    return escape("; ".join(sentences)) or "none"
