"""The files and batches of the scripted server: uploaded, run late, in part or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

ENDS = ("completed", "expired", "failed", "enqueued", "cancelled")
"""How a batch may end; ``enqueued`` fails because too many tokens wait already."""


@dataclass
class Batches:
    """Files and batches by id, kept as long as the server lives."""

    answer: Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]]
    """Status and reply for the key and body of one line; counts what is billed."""
    seconds: float = 0.0
    """From the creation of a batch to its end."""
    ends: tuple[str, ...] = ()
    """How the first batches end; later ones are completed."""
    share: float = 0.5
    """Of the lines of a batch that expires or is cancelled, those that were answered."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: int = 0

    def handle(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, Any]:
        """Status and reply to a request whose path starts behind ``/v1/``."""
        parts = path.partition("?")[0].split("/")
        if method == "POST" and parts == ["files"]:
            return 200, self._upload(headers["content-type"], body)
        if method == "POST" and parts == ["batches"]:
            return 200, self._create(json.loads(body))
        if method == "GET" and len(parts) == 1:
            rows = self.files if parts[0] == "files" else self.batches
            listed = [self._look(one) for one in reversed(list(rows.values()))]
            return 200, {"object": "list", "data": listed, "has_more": False}
        if parts[0] == "files" and len(parts) == 3 and parts[1] in self.contents:
            return 200, self.contents[parts[1]]
        if parts[0] == "batches" and parts[1] in self.batches:
            return 200, self._look(self.batches[parts[1]])
        return 404, {"error": {"message": f"no {path}", "type": "scripted", "code": None}}

    def _store(self, name: str, content: bytes, purpose: str) -> dict[str, Any]:
        made = {
            "id": f"file-{len(self.files)}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        self.files[made["id"]] = made
        self.contents[made["id"]] = content
        return made

    def _upload(self, content_type: str, body: bytes) -> dict[str, Any]:
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        content, purpose, name = b"", "", ""
        for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():  # pyright: ignore
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            if part.get_param("name", header="content-disposition") == "purpose":
                purpose = payload.decode()
            elif given := part.get_filename():
                name, content = given, payload
        self.uploads += 1
        return self._store(name, content, purpose)

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        n = len(self.batches)
        batch = {
            "id": f"batch-{n}",
            "object": "batch",
            "endpoint": asked["endpoint"],
            "input_file_id": asked["input_file_id"],
            "completion_window": asked["completion_window"],
            "created_at": int(time.time()),
            "status": "validating",
            "metadata": asked.get("metadata"),
            "errors": None,
            "output_file_id": None,
            "error_file_id": None,
            "due": time.monotonic() + self.seconds,
            "end": self.ends[n] if n < len(self.ends) else "completed",
        }
        self.batches[batch["id"]] = batch
        return self._look(batch)

    def _look(self, one: dict[str, Any]) -> dict[str, Any]:
        if one.get("status") in ("validating", "in_progress"):
            one["status"] = "in_progress"
            if time.monotonic() >= one["due"]:
                self._finish(one)
        return {name: value for name, value in one.items() if name not in ("due", "end")}

    def _finish(self, batch: dict[str, Any]) -> None:
        end = batch["end"]
        if end in ("failed", "enqueued"):
            code = "token_limit_exceeded" if end == "enqueued" else "invalid_json_line"
            message = "Enqueued token limit reached" if end == "enqueued" else "a line is no JSON"
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": code, "message": message}]}
            return
        lines = [json.loads(x) for x in self.contents[batch["input_file_id"]].splitlines()]
        n = len(lines) if end == "completed" else int(len(lines) * self.share)
        good, bad = [], []
        for line in reversed(lines[:n]):  # the order of results is nobody's promise
            status, reply = self.answer(line["custom_id"], line["body"])
            response = {"status_code": status, "request_id": "scripted", "body": reply}
            row = {"custom_id": line["custom_id"], "response": response, "error": None}
            (good if status == 200 else bad).append(row)
        for line in lines[n:]:
            error = {"code": f"batch_{end}", "message": "not run in time"}
            bad.append({"custom_id": line["custom_id"], "response": None, "error": error})
        for name, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in rows).encode()
                batch[name] = self._store(f"{batch['id']}.jsonl", text, "batch_output")["id"]
        batch["status"] = end
