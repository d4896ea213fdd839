"""Requests to an OpenAI-compatible endpoint, each paid for once."""

from __future__ import annotations

import ipaddress
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hooks.files import EndpointError, fingerprint

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class EndpointConfig:
    """Where requests go."""

    base_url: str
    """For example ``http://127.0.0.1:8000/v1``."""
    model: str
    """Model name as the endpoint knows it."""
    allow_remote: str | None = None
    """Host name of a machine that report text may be sent to; loopback needs no leave."""
    timeout: float = 120.0
    """Seconds a request may take."""
    max_retries: int = 3
    """Of connection failures, rate limits and server errors, with growing pauses."""

    def __post_init__(self) -> None:
        host = urlsplit(self.base_url).hostname
        if host is None:
            raise EndpointError(
                f"endpoint {self.base_url!r} is not a URL; write http://HOST:PORT/v1"
            )
        if not _is_loopback(host) and host != self.allow_remote:
            raise EndpointError(
                f"endpoint host {host!r} is not this machine, and report text would be sent to it; "
                f"if your data agreement allows that, pass --allow-remote {host}"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Ledger:
    """Answers by request, in a JSON-lines file that survives a kill at any instant.

    An answer is appended and flushed before it is used. A torn last line is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            text = path.read_text()
            complete = text[: text.rfind("\n") + 1]
            if complete != text:
                path.write_text(complete)
            for line in complete.splitlines():
                entry = json.loads(line)
                self._answers[entry["request"]] = entry["answer"]

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        """The answer to a request, if it was ever given."""
        return self._answers.get(key)

    def put(self, key: str, answer: str) -> None:
        """Record an answer."""
        with self._lock:
            with self.path.open("a") as handle:
                handle.write(json.dumps({"request": key, "answer": answer}) + "\n")
                handle.flush()
            self._answers[key] = answer


class Client:
    """Asks an endpoint, through a ledger; greedy decoding, so that an answer can be reused."""

    def __init__(self, config: EndpointConfig, ledger: Ledger) -> None:
        from openai import OpenAI

        self.config, self.ledger = config, ledger
        self._openai = OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=config.timeout,
            max_retries=config.max_retries,
        )

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """The endpoint's reply to ``messages``, or the recorded one.

        Raises
        ------
        EndpointError
            If the endpoint cannot be reached or refuses, after retries.
        """
        request = {
            "model": self.config.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        key = fingerprint(request)
        answer = self.ledger.get(key)
        if answer is None:
            answer = self._send(request)
            self.ledger.put(key, answer)
        return answer

    def _send(self, request: Mapping[str, Any]) -> str:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            reply = self._openai.chat.completions.create(**request)
        except APITimeoutError:
            raise self._error(
                f"did not answer within {self.config.timeout:.0f} s; give it more time"
            ) from None
        except APIConnectionError as error:
            raise self._error(f"cannot be reached ({error.__cause__ or error}); start it") from None
        except APIStatusError as error:
            detail = " ".join(str(error.message).split())[:200]
            raise self._error(
                f"refused with status {error.status_code}: {detail}; check the model name and key"
            ) from None
        return reply.choices[0].message.content or ""

    def _error(self, what: str) -> EndpointError:
        error = EndpointError(
            f"endpoint {self.config.base_url} {what}, then run again: {len(self.ledger)} finished "
            "requests are kept"
        )
        error.resumable = len(self.ledger) > 0
        return error
