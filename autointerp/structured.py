"""Replies that follow a schema: what is asked for, how it is read, and the one repair."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from autointerp.limits import Messages


def response_format(schema: type[BaseModel]) -> dict[str, Any]:
    """The ``response_format`` of a request whose reply must be a ``schema``."""
    return {
        "type": "json_schema",
        "json_schema": {"name": schema.__name__, "strict": True, "schema": _strict(schema)},
    }


def _strict(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema as strict endpoints want it: every key required, and no other."""
    tree = schema.model_json_schema()
    for part in (tree, *tree.get("$defs", {}).values()):
        if part.get("type") == "object":
            part["additionalProperties"] = False
            part["required"] = list(part.get("properties", {}))
    return tree


def in_words(messages: Messages, schema: type[BaseModel]) -> list[dict[str, Any]]:
    """The schema as part of the prompt, for endpoints without ``response_format``."""
    asked = [dict(message) for message in messages]
    text = json.dumps(_strict(schema))
    text = f"\n\nAnswer with one JSON object of this schema, nothing else:\n{text}"
    content = asked[-1]["content"]
    parts = isinstance(content, list)
    asked[-1]["content"] = content + ([{"type": "text", "text": text}] if parts else text)
    return asked


def read(text: str, schema: type[BaseModel]) -> BaseModel | str:
    """The object in a reply, in a code fence or not; or what is wrong with it."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, flags=re.DOTALL)
    try:
        return schema.model_validate_json(fenced[1] if fenced else text.strip())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]


def repair_messages(messages: Messages, reply: str, problem: str) -> list[dict[str, Any]]:
    """The conversation so far, and what was wrong with the reply."""
    complaint = f"That is not what was asked for ({problem}). Answer with the JSON object only."
    return [
        *(dict(message) for message in messages),
        {"role": "assistant", "content": reply},
        {"role": "user", "content": complaint},
    ]
