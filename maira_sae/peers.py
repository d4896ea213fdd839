"""Another library's side of a benchmark, in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("bench_peer.py")


class Peer:
    """A process that answers each line with a JSON object, or the reason why there is none.

    Parameters
    ----------
    python
        Interpreter of the environment that `make peers` builds.
    task, settings
        What `bench_peer.py` is to do.
    """

    def __init__(self, python: Path, task: str, settings: dict[str, Any]) -> None:
        self.reason: str | None = None
        self._said: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        if not python.is_file():
            self.reason = f"there is no environment at {python}; build it with `make peers`"
            return
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(WORKER), task, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        )
        # Read as it comes: a full pipe would stop the process.
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def ask(self) -> dict[str, Any] | None:
        """Run one turn; None, and a :attr:`reason`, if it cannot."""
        if self._process is None or self.reason is not None:
            return None
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed; what it said is the reason
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._reader.join()
            self.reason = " | ".join(self._said[-2:]).strip() or "it ended without a word"
            return None
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as stream:
            self._said.extend(line.strip() for line in stream if line.strip())
