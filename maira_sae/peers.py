"""One side of a benchmark in a process, and perhaps an environment, of its own."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("bench_peer.py")


class Worker:
    """A process that answers each line with a JSON object, or ends; then :attr:`said` says why."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._said: list[str] = []
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        # Read as it comes: a full pipe would stop the process.
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """The last lines of its standard error."""
        return " | ".join(self._said[-3:]) or "it ended without a word"

    def ask(self, line: str = "") -> dict[str, Any] | None:
        """Send a line and wait for the answer; ``None`` if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed; what it said is the reason
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._reader.join()
            return None
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was still to be written to a dead process
                    pipe.close()
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            self._said.extend(line.strip() for line in stream if line.strip())


class Peer:
    """Another library's side of a benchmark, or the reason why there is none.

    Parameters
    ----------
    python
        Interpreter of the environment that `make peers` builds.
    task, settings
        What `bench_peer.py` is to do.
    """

    def __init__(self, python: Path, task: str, settings: dict[str, Any]) -> None:
        self.reason: str | None = None
        self._worker: Worker | None = None
        if not python.is_file():
            self.reason = f"there is no environment at {python}; build it with `make peers`"
            return
        command = [str(python), "-W", "ignore", str(WORKER), task, json.dumps(settings)]
        self._worker = Worker(
            command, {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        )

    def ask(self) -> dict[str, Any] | None:
        """Run one turn; None, and a :attr:`reason`, if it cannot."""
        if self._worker is None or self.reason is not None:
            return None
        answer = self._worker.ask()
        if answer is None:
            self.reason = self._worker.said
        return answer

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
