"""Progress bars on standard error: in terminals and notebooks, silent everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar with the time left."""
    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    yield from rich_track(items, description, total=total, console=console, disable=not shown)
