"""What training shows while it runs: speed, quality and time left, in terminals and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooks.progress import Bars


class TrainingDisplay(Bars):
    """A line per dictionary with tokens/s, FVU, L0 and dead latents."""

    def __init__(self, start: int, steps: int, shown: bool = True) -> None:
        super().__init__(shown)
        self._start, self._steps = start, steps

    def update(self, name: str, line: Mapping[str, Any]) -> None:
        """Show a line of ``metrics.jsonl``."""
        label = f"train {name}".strip()
        self.show(label, line["step"], self._steps, figures(line, self._start))


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
