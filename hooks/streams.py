"""Work that several threads share: one forward pass each, rather than all in one pass.

On a processor the small pieces of a pass are divided among its cores badly, and reading, choosing
and writing leave cores idle. Two passes at a time, half the cores each, do not wait for each other.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 4
"""Passes at a time, where nothing is asked; each holds its part in memory."""
STATEFUL_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the longest sequence seen: one pass at a time."""


def default_streams(model: Any) -> int:
    """Passes at a time that suit a model where it is.

    One on an accelerator, and where a pass changes the model or the caller's autocast, which other
    threads do not see, decides its values.
    """
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1
    text = getattr(model.config, "text_config", None) or model.config
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") in STATEFUL_ROPE:
        return 1
    return min(torch.get_num_threads(), MOST)


@contextmanager
def shared_cores(streams: int) -> Iterator[None]:
    """Divide torch's threads among so many streams while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // streams))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(items: Iterable[T], work: Callable[[T], None], streams: int) -> Iterator[T]:
    """Each item once ``work(item)`` is done, as soon as it is; so many threads share the items.

    The first error of a thread is raised here; before it is, and before a consumer that leaves
    goes on, the others finish what they have in hand.
    """
    todo = deque(items)
    done: queue.SimpleQueue[tuple[T, BaseException | None]] = queue.SimpleQueue()

    def loop() -> None:
        while True:
            try:
                item = todo.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:
                done.put((item, error))
                return
            done.put((item, None))

    count = len(todo)
    threads = [
        threading.Thread(target=loop, name=f"stream-{i}", daemon=True) for i in range(streams)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(count):
            item, error = done.get()
            if error is not None:
                raise error
            yield item
    finally:
        todo.clear()
        for thread in threads:
            thread.join()
