"""What was asked, answered and sent: a ledger of answers and a log of everything that left."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hooks.files import FolderError

_SCHEMAS = (
    """
CREATE TABLE IF NOT EXISTS answers (
    request TEXT PRIMARY KEY,
    answer TEXT NOT NULL,
    refused INTEGER NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    time REAL NOT NULL
) WITHOUT ROWID
""",
    # A table of its own, so that a ledger from before it was known is read, and stays readable.
    """
CREATE TABLE IF NOT EXISTS logprobs (
    request TEXT PRIMARY KEY,
    tokens TEXT NOT NULL
) WITHOUT ROWID
""",
    # Which answers came by a batch, at its price.
    "CREATE TABLE IF NOT EXISTS batched (request TEXT PRIMARY KEY) WITHOUT ROWID",
    """
CREATE TABLE IF NOT EXISTS plans (
    hash TEXT PRIMARY KEY,
    keys TEXT NOT NULL,
    batch TEXT,
    ended INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
""",
)


Logprobs = list[dict[str, float]]
"""For each token, the likeliest tokens with their log-probabilities."""


class Answer(NamedTuple):
    """A reply that was paid for."""

    text: str
    refused: bool = False
    """Whether the model declined; its words, if any, are the text."""
    tokens_in: int = 0
    tokens_out: int = 0
    logprobs: Logprobs | None = None
    """Of each token of the text, where they were asked for and came."""


class Plan(NamedTuple):
    """Requests that are submitted as one batch."""

    hash: str
    keys: tuple[str, ...]
    batch: str | None
    """The provider's id, once it is known."""


class Ledger:
    """Answers by fingerprint of the request, in an SQLite file that survives a kill at any instant.

    Write-ahead log, and ``synchronous=FULL``: an answer is on the disk when :meth:`put` returns, so
    that it is committed before it is used. A torn transaction is rolled back by SQLite.

    Raises
    ------
    FolderError
        If ``path`` is not an SQLite file, or another process labels with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._claims, self._claim = 0, -1
        self._held: sqlite3.Connection | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as db:
            db.execute("PRAGMA journal_mode=WAL")
            for schema in _SCHEMAS:
                db.execute(schema)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The job's connection, or one of this call alone."""
        with self._lock:
            db = self._held or sqlite3.connect(self.path, timeout=30, check_same_thread=False)
            db.isolation_level = None
            try:
                db.execute("PRAGMA synchronous=FULL")
                yield db
            except sqlite3.DatabaseError as error:
                raise FolderError(
                    f"{self.path} cannot be used as a ledger ({error}); move it away, or give "
                    "another folder"
                ) from error
            finally:
                if db is not self._held:
                    db.close()

    def __len__(self) -> int:
        with self._connection() as db:
            return db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def get(self, key: str) -> str | None:
        """The answer to a request, if it was ever given; empty where the model declined."""
        answer = self.find([key]).get(key)
        return None if answer is None else "" if answer.refused else answer.text

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that are kept among those to ``keys``."""
        found = {}
        with self._connection() as db:
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                rows = db.execute(
                    "SELECT request, answer, refused, tokens_in, tokens_out, tokens FROM answers "
                    "LEFT JOIN logprobs USING (request) "
                    f"WHERE request IN ({','.join('?' * len(some))})",
                    some,
                )
                for key, text, refused, tokens_in, tokens_out, tokens in rows:
                    logprobs = None if tokens is None else json.loads(tokens)
                    found[key] = Answer(text, bool(refused), tokens_in, tokens_out, logprobs)
        return found

    def put(self, key: str, answer: str) -> None:
        """Record an answer."""
        self.commit({key: Answer(answer)})

    def commit(self, answers: dict[str, Answer], batched: bool = False) -> None:
        """Record several answers in one transaction; one that is there already stays.

        Parameters
        ----------
        batched
            Whether they came by a batch.
        """
        now = time.time()
        rows = [
            (key, one.text, int(one.refused), one.tokens_in, one.tokens_out, now)
            for key, one in answers.items()
        ]
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            if batched:
                db.executemany(
                    "INSERT OR IGNORE INTO batched SELECT ? WHERE NOT EXISTS "
                    "(SELECT 1 FROM answers WHERE request = ?)",
                    [(key, key) for key in answers],
                )
            db.executemany(
                "INSERT OR IGNORE INTO logprobs SELECT ?1, ?2 WHERE NOT EXISTS "
                "(SELECT 1 FROM answers WHERE request = ?1)",
                [
                    (key, json.dumps(one.logprobs))
                    for key, one in answers.items()
                    if one.logprobs is not None
                ],
            )
            db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)
            db.execute("COMMIT")

    def tokens(self, batched: bool | None = None) -> tuple[int, int]:
        """Tokens in and out of everything that is kept, or of what came by a batch, or did not."""
        sums = "SELECT coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) FROM answers"
        if batched is not None:
            sums += f" WHERE request {'' if batched else 'NOT '}IN (SELECT request FROM batched)"
        with self._connection() as db:
            return db.execute(sums).fetchone()

    def plans(self) -> list[Plan]:
        """Batches that are not over, as far as is known."""
        with self._connection() as db:
            rows = db.execute("SELECT hash, keys, batch FROM plans WHERE NOT ended").fetchall()
        return [Plan(name, tuple(keys.split()), batch) for name, keys, batch in rows]

    def n_plans_of(self, key: str) -> int:
        """How many plans a request was ever part of."""
        with self._connection() as db:
            count = "SELECT count(*) FROM plans WHERE instr(keys, ?)"
            return db.execute(count, (key,)).fetchone()[0]

    def plan(self, plan: Plan) -> None:
        """Record a batch before it is submitted."""
        with self._connection() as db:
            row = (plan.hash, " ".join(plan.keys), plan.batch)
            db.execute("INSERT INTO plans (hash, keys, batch) VALUES (?, ?, ?)", row)

    def submitted(self, plan: str, batch: str) -> None:
        """Record the provider's id of a batch."""
        with self._connection() as db:
            db.execute("UPDATE plans SET batch = ? WHERE hash = ?", (batch, plan))

    def ended(self, plan: str) -> None:
        """Record that a batch is over and its answers are kept."""
        with self._connection() as db:
            db.execute("UPDATE plans SET ended = 1 WHERE hash = ?", (plan,))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from sending what this one is about to send."""
        with self._lock:
            if self._claims == 0:
                path = self.path.with_name(self.path.name + ".lock")
                self._claim = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(self._claim)
                    raise FolderError(
                        f"another job is sending requests for {self.path}; wait until it ends, or "
                        "give another folder"
                    ) from None
                self._held = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
            self._claims += 1
        try:
            yield
        finally:
            with self._lock:
                self._claims -= 1
                if self._claims == 0:
                    if self._held is not None:
                        self._held.close()
                    self._held = None
                    os.close(self._claim)


class EgressLog:
    """One line for each request that leaves, written before it does: time, host, bytes, request.

    Retries and repairs have lines of their own. Bytes are the body's; of the rest, only the URL,
    the key and the client's version are sent. A line is one ``write`` to a file opened for
    appending, so it survives a kill of the process.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, host: str, n_bytes: int, request: str) -> None:
        """Record that a request is about to leave."""
        line = {"time": round(time.time(), 3), "host": host, "bytes": n_bytes, "request": request}
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
