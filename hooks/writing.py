"""A thread that writes parts while the model computes the next ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

AHEAD = 1
"""Parts that may wait for the disk: with the one being written and the one being computed, three
are in memory, however slow the disk is."""


class BackgroundWriter:
    """Runs calls one after another in a thread of its own.

    As a context manager it finishes what was put before it leaves, also when the block failed:
    what was computed is kept. The first error of a call ends the thread's work and is raised by the
    next :meth:`put`, or on leaving.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, call: Callable[[], None]) -> None:
        """Hand over a call; waits while :data:`AHEAD` others wait."""
        self._raise()
        self._calls.put(call)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    call()
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
