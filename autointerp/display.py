"""What a labelling job shows while it runs, in terminals and notebooks."""

from __future__ import annotations

from hooks.progress import Bars


class JobDisplay(Bars):
    """A line with requests done and failed, cost and time left."""

    def __init__(self, name: str, total: int, kept: int, shown: bool = True) -> None:
        super().__init__(shown)
        self._name, self._total = name, total
        self.show(name, kept, total)

    def update(self, done: int, failed: int, retries: int, cost: float | None) -> None:
        """Show the state of the job."""
        self.show(self._name, done, self._total, figures(failed, retries, cost))


def figures(failed: int, retries: int, cost: float | None) -> str:
    """The numbers beside the bar.

    >>> figures(2, 31, 1.25), figures(0, 0, None)
    ('failed 2  retries 31  cost 1.2500', 'failed 0  retries 0')
    """
    money = "" if cost is None else f"  cost {cost:.4f}"
    return f"failed {failed:,}  retries {retries:,}{money}"
