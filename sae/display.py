"""What training shows while it runs: speed, quality and time left, in terminals and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class TrainingDisplay:
    """A line per dictionary with tokens/s, FVU, L0 and dead latents; silent outside terminals.

    Use as a context manager.
    """

    def __init__(self, start: int, steps: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        visible = shown and (console.is_terminal or console.is_jupyter)
        self._start, self._steps, self._tasks = start, steps, {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not visible,
        )

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, name: str, line: Mapping[str, Any]) -> None:
        """Show a line of ``metrics.jsonl``."""
        if name not in self._tasks:
            label = f"train {name}".strip()
            self._tasks[name] = self._progress.add_task(label, total=self._steps, figures="")
        self._progress.update(
            self._tasks[name], completed=line["step"], figures=figures(line, self._start)
        )


def figures(line: Mapping[str, Any], start: int = 0) -> str:
    """The numbers of a metrics line that a person watches.

    >>> figures({"tokens": 4096, "step": 2, "seconds": 2.0, "batch_fvu": 0.25, "batch_l0": 32.0,
    ...          "dead": 7})
    '2,048 tok/s  FVU 0.2500  L0 32.0  dead 7'
    """
    per_step = line["tokens"] / line["step"]
    rate = per_step * (line["step"] - start) / max(line["seconds"], 1e-9)
    return (
        f"{rate:,.0f} tok/s  FVU {line['batch_fvu']:.4f}  L0 {line['batch_l0']:.1f}  "
        f"dead {line['dead']:,}"
    )
