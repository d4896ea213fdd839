"""What a labelling job shows while it runs, in terminals and notebooks."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class JobDisplay:
    """A line with requests done and failed, cost and time left; silent outside terminals.

    Use as a context manager.
    """

    def __init__(self, name: str, total: int, kept: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        visible = shown and (console.is_terminal or console.is_jupyter)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not visible,
        )
        self._task = self._progress.add_task(name, total=total, completed=kept, figures="")

    def __enter__(self) -> JobDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, done: int, failed: int, retries: int, cost: float | None) -> None:
        """Show the state of the job."""
        self._progress.update(self._task, completed=done, figures=figures(failed, retries, cost))


def figures(failed: int, retries: int, cost: float | None) -> str:
    """The numbers beside the bar.

    >>> figures(2, 31, 1.25), figures(0, 0, None)
    ('failed 2  retries 31  cost 1.2500', 'failed 0  retries 0')
    """
    money = "" if cost is None else f"  cost {cost:.4f}"
    return f"failed {failed:,}  retries {retries:,}{money}"
