"""An OpenAI-compatible server that follows a script: replies by rule, late, or not at all.

For tests and measurements of what asks a language model. It speaks HTTP/1.1 over a real socket and
counts what it was asked. As a process of its own it prints its port::

    python -m maira_sae.scripted_server '{"latency": 0.1, "faults": 0.1}'

``GET /counts`` tells what was asked, as :attr:`ScriptedServer.counts`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from autointerp.limits import count_tokens
from hooks.files import ConfigError, fingerprint, reject_unknown_keys
from maira_sae.scripted_batches import Batches

FAULTS = ("rate_limit", "server_error", "malformed", "truncated", "drop")
"""What may come instead of an answer; all but a refusal deserve a retry."""
_REASONS = {
    200: "OK",
    307: "Moved",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    429: "Too Many",
    500: "Error",
}


@dataclass(frozen=True)
class Script:
    """How the server behaves."""

    latency: float = 0.0
    """Seconds before every reply, faults included."""
    faults: float = 0.0
    """Share of requests that meet a fault, by chance fixed by the seed, request and attempt."""
    kinds: tuple[str, ...] = FAULTS
    """Faults that occur by chance, equally often."""
    first: tuple[str, ...] = ()
    """What the first requests meet, in order: faults, ``ok``, ``refusal``, ``redirect``,
    ``unauthorized``."""
    retry_after_ms: int | None = 100
    """What a rate limit says; ``None`` leaves it out."""
    retry_after: str | None = None
    """The same in seconds or as an HTTP date, as the standard has it."""
    schemas: bool = True
    """Whether ``response_format`` is known."""
    logprobs: str = "ignored"
    """What becomes of a wish for log-probabilities: ``ignored``, ``told`` or ``refused``."""
    usage: bool = True
    """Whether replies count tokens."""
    seed: int = 0
    batch_seconds: float = 0.0
    """From the creation of a batch to its end."""
    batch_ends: tuple[str, ...] = ()
    """How the first batches end (:mod:`maira_sae.scripted_batches`); later ones are completed."""


class Sure(str):
    """A reply of yes or no with how sure the server says it is."""

    probability: float

    def __new__(cls, text: str, probability: float) -> Sure:
        made = super().__new__(cls, text)
        made.probability = probability
        return made


def echo(body: Mapping[str, Any]) -> str:
    """A reply that tells requests apart."""
    return f"answer {fingerprint(dict(body))[:12]}"


@dataclass
class ScriptedServer:
    """A server with its counts; each request is known by its ``Idempotency-Key`` or its body."""

    script: Script
    reply: Callable[[Mapping[str, Any]], str] = echo
    asked: Counter[str] = field(default_factory=Counter)
    """Times each request came."""
    answered: Counter[str] = field(default_factory=Counter)
    """Times each request was answered while its client still listened."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    n_bytes: int = 0
    """Of all bodies."""
    port: int = 0
    most_open: int = 0
    """Most requests under way at once."""
    _under_way: int = 0

    def __post_init__(self) -> None:
        script = self.script
        self.batches = Batches(self.batch_line, script.batch_seconds, script.batch_ends)

    def batch_line(self, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and reply for a line of a batch; by chance it meets a server error."""
        self.asked[key] += 1
        action = self.action(key)
        if unknown := self.unknown(body):
            return 400, _error(f"unknown field {unknown}")
        if action not in ("ok", "refusal"):
            return 500, _error("scripted")
        self.answered[key] += 1
        return 200, self.completion(action, body)

    def unknown(self, body: Mapping[str, Any]) -> str | None:
        """A part of a request that this server does not know."""
        if not self.script.schemas and "response_format" in body:
            return "response_format"
        if self.script.logprobs == "refused" and "logprobs" in body:
            return "logprobs"
        return None

    @property
    def url(self) -> str:
        """Base URL for a client on this machine."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def counts(self) -> dict[str, Any]:
        """``{"asked", "answered", "repeated", "most_open", "bytes", "keys", "uploads",
        "batches"}``; a line of a batch counts as a request."""
        return {
            "asked": self.asked.total(),
            "answered": self.answered.total(),
            "repeated": self.answered.total() - len(self.answered),
            "most_open": self.most_open,
            "bytes": self.n_bytes,
            "keys": dict(self.answered),
            "uploads": self.batches.uploads,
            "batches": len(self.batches.batches),
        }

    def action(self, key: str) -> str:
        """What a request meets, now that it has come."""
        n = self.asked.total()
        if n <= len(self.script.first):
            return self.script.first[n - 1]
        digest = hashlib.sha256(f"{self.script.seed} {key} {self.asked[key]}".encode()).digest()
        chance = random.Random(digest)
        return chance.choice(self.script.kinds) if chance.random() < self.script.faults else "ok"

    def completion(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": "I decline."}
        logprobs = None
        if action == "ok":
            text = self.reply(body)
            message = {"role": "assistant", "content": text}
            if body.get("logprobs") and self.script.logprobs == "told":
                logprobs = {"content": [_alternatives(text)]}
        reply: dict[str, Any] = {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
            ],
        }
        if self.script.usage:
            n = count_tokens(body["messages"])
            reply["usage"] = {"prompt_tokens": n, "completion_tokens": 4, "total_tokens": n + 4}
        return reply

    async def start(self) -> asyncio.Server:
        """Listen on loopback, at any free port."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        return server


class _Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self.server, self._buffer = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        method, path, _ = first.split(" ", 2)
        if path.startswith(("/v1/files", "/v1/batches")):
            self._later(method, path.removeprefix("/v1/"), headers, rest[:length])
            return
        if method == "GET":
            self._send(200, self.server.counts)
            return
        server, body = self.server, json.loads(rest[:length])
        key = headers.get("idempotency-key") or fingerprint(body)
        server.asked[key] += 1
        server.bodies.append(body)
        server.n_bytes += length
        server._under_way += 1
        server.most_open = max(server.most_open, server._under_way)
        loop = asyncio.get_running_loop()
        loop.call_later(server.script.latency, self._answer, server.action(key), key, body)

    def _later(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self.server.n_bytes += len(body)
        status, reply = self.server.batches.handle(method, path, headers, body)
        payload = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        delay = self.server.script.latency
        asyncio.get_running_loop().call_later(delay, self._write, status, payload)

    def _answer(self, action: str, key: str, body: dict[str, Any]) -> None:
        server, script = self.server, self.server.script
        server._under_way -= 1
        if self.transport.is_closing():
            return
        if action == "rate_limit":
            extra = {}
            if script.retry_after_ms is not None:
                extra["retry-after-ms"] = str(script.retry_after_ms)
            if script.retry_after is not None:
                extra["retry-after"] = script.retry_after
            self._send(429, _error("too many requests"), extra)
        elif action == "server_error":
            self._send(500, _error("scripted"))
        elif action == "unauthorized":
            self._send(401, _error("wrong key"))
        elif action == "redirect":
            self._send(307, _error("moved"), {"Location": f"{server.url}/elsewhere"})
        elif action == "drop":
            self.transport.abort()
        elif action == "malformed":
            self._write(200, b'{"choices": [{"mess')
        elif unknown := server.unknown(body):
            self._send(400, _error(f"unknown field {unknown}"))
        elif action == "truncated":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
            self.transport.close()
        elif action in ("ok", "refusal"):
            server.answered[key] += 1
            self._send(200, server.completion(action, body))
        else:
            raise ConfigError(f"unknown action {action!r} in a script")

    def _send(self, status: int, reply: Any, extra: Mapping[str, str] | None = None) -> None:
        self._write(status, json.dumps(reply).encode(), extra)

    def _write(self, status: int, payload: bytes, extra: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
        lines = "".join(
            f"{name}: {value}\r\n" for name, value in {**headers, **(extra or {})}.items()
        )
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\n{lines}\r\n"
        self.transport.write(head.encode() + payload)


def _alternatives(text: str) -> dict[str, Any]:
    """A reply of one token, with yes and no where it is one of them."""
    told = [{"token": text, "logprob": 0.0}]
    if isinstance(text, Sure):
        other = {"yes": "no", "no": "yes"}[text]
        shares = {text: text.probability, other: 1 - text.probability}
        told = [{"token": token, "logprob": math.log(p)} for token, p in shares.items() if p > 0]
    return {**told[0], "top_logprobs": told}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "scripted", "code": None}}


@contextmanager
def serving(
    script: Script | None = None, reply: Callable[[Mapping[str, Any]], str] = echo
) -> Iterator[ScriptedServer]:
    """A server in a thread of this process while the context lasts."""
    server = ScriptedServer(script or Script(), reply)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        listener = await server.start()
        ready.set()
        await stop.wait()
        listener.close()

    def target() -> None:
        loop.run_until_complete(run())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _main(script: Script) -> None:
    server = ScriptedServer(script)
    listener = await server.start()
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    # Ends with the process that started it, also when that one is killed.
    await asyncio.to_thread(sys.stdin.read)
    listener.close()


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    reject_unknown_keys(given, Script.__dataclass_fields__, "script")
    lists = {name: tuple(given[name]) for name in ("kinds", "first", "batch_ends") if name in given}
    asyncio.run(_main(Script(**{**given, **lists})))
