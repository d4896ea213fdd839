"""Small pieces of HTML that objects show themselves with in a notebook."""

from __future__ import annotations

import base64
import difflib
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_CELL = "text-align:left;vertical-align:top;padding:1px 10px 1px 0"


def facts(title: str, rows: Mapping[str, object]) -> str:
    """A title and a row for each fact; empty ones are left out.

    >>> "<th" in facts("Folder", {"tokens": 12, "none": None}), "none" in facts("", {"none": ""})
    (True, False)
    """
    lines = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(_shown(value))}</td></tr>'
        for name, value in rows.items()
        if value not in (None, "", (), [])
    )
    return f"<div><strong>{escape(title)}</strong><table>{lines}</table></div>"


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def picture(image: Image.Image, caption: str, width: int = 160) -> str:
    """An image inside the page, never larger than it is wide, with a caption."""
    small = image.copy()
    small.thumbnail((2 * width, 4 * width))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return (
        '<figure style="display:inline-block;margin:0 8px 4px 0">'
        f'<img src="data:image/png;base64,{data}" width="{width}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def bars(values: Sequence[float], labels: Sequence[str], title: str) -> str:
    """A histogram of few bars, as lines of text blocks that need no script."""
    most = max(values, default=0) or 1
    rows = "".join(
        f'<tr><td style="{_CELL}">{escape(label)}</td><td style="{_CELL};width:160px">'
        f'<div style="background:#4477aa;height:9px;width:{100 * value / most:.0f}%"></div></td>'
        f'<td style="{_CELL}">{value:g}</td></tr>'
        for label, value in zip(labels, values, strict=True)
    )
    return f"<div>{escape(title)}<table>{rows}</table></div>"


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


def marked(words: Sequence[tuple[str, bool]]) -> str:
    """Words as a paragraph, those that changed in ``<mark>``."""
    return " ".join(f"<mark>{escape(w)}</mark>" if new else escape(w) for w, new in words)
