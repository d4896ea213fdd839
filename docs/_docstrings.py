"""How the reference reads docstrings: examples as code, Sphinx roles as names."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:[a-z]+:)?(?:func|class|data|meth|mod|attr|exc):`~?([^`]+)`")


def shown(text: str) -> str:
    """A docstring whose runnable lines stand in a section of their own."""
    kept: list[str] = []
    examples: list[str] = []
    running = False
    for line in ROLE.sub(r"`\1`", text).splitlines():
        running = line.startswith(">>>") or (running and bool(line.strip()))
        (examples if running else kept).append(line)
        if examples and not running and examples[-1]:
            examples.append("")
    if not examples:
        return "\n".join(kept)
    return "\n".join([*kept, "", "Examples", "--------", *examples])


class Readable(griffe.Extension):
    """Rewrites every docstring once."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
