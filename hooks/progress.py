"""Progress bars on standard error: in terminals and notebooks, silent everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar with the time left."""
    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    yield from rich_track(items, description, total=total, console=console, disable=not shown)


class Bars:
    """A line for each name with its progress, figures and time left. Use as a context manager."""

    def __init__(self, shown: bool = True) -> None:
        console = Console(stderr=True)
        visible = shown and (console.is_terminal or console.is_jupyter)
        self._tasks = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not visible,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, total: int, figures: str = "") -> None:
        """Show how far ``name`` is."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, figures="")
        self._progress.update(self._tasks[name], completed=done, figures=figures)
