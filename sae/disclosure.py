"""What a file would tell about patients, looked for before it leaves the machine.

It knows file types, field names, identifiers and encoded images. A file it cannot look into counts
as holding both text and images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TEXT, IMAGES, PATHS = "text", "images", "paths"
IMAGE_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
FIELDS = (
    *("accession", "comparison", "example", "examples", "findings", "history", "impression"),
    *("indication", "messages", "patient", "patients", "prior_report", "prompt", "quote", "quotes"),
    *("report", "reports", "sentence", "sentences", "studies", "study", "study_id", "subject_id"),
    *("text", "texts", "token_ids", "tokens_text", "before", "after", "caption"),
)
"""Fields of JSON that hold, or name the source of, a patient's words."""
LONGEST = 200
"""Characters of a value; a longer one is taken for a report's text."""
WEIGHTS = (".safetensors", ".pt")
_ENCODED_IMAGE = re.compile(
    r"data:image/(?!svg)|iVBORw0KGgo|/9j/4[A-Za-z0-9+/]{20}|UklGR[A-Za-z0-9+/]{20}"
)
_OPAQUE = re.compile(r"[A-Za-z0-9+/]{4096}")
_IDENTIFIER = re.compile(
    r"\b[ps]\d{8}\b|\b1\.2\.840\.[\d.]{10,}\b|\b\d{3}-\d{2}-\d{4}\b|\b(?:MRN|mrn)\W{0,2}\d{4,}\b"
)
_LOCAL = re.compile(r"^(?:/(?:[\w.-]+/)+[\w.-]*|~/.*|[A-Za-z]:\\.*)$")
_KEYS = re.compile(rf'\\?"({"|".join(FIELDS)})\\?"\s*:')


class Disclosure(NamedTuple):
    """One thing found in a file."""

    kind: str
    """``text``, ``images`` or ``paths``."""
    what: str
    """Which rule found it, without quoting what it found."""


def disclosures(path: Path, names: Iterable[str] = ()) -> list[Disclosure]:
    """What the file would tell; empty if nothing was found.

    Parameters
    ----------
    names
        Studies, patients and sentences that must not be in it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.jsonl"
    ...     _ = path.write_text('{"latent": 1, "label": "effusion", "study": "s12345678"}')
    ...     [one.what for one in disclosures(path)]
    ["field 'study'", 'an identifier']
    """
    if path.suffix in WEIGHTS:
        return []
    data = path.read_bytes()
    if data.startswith(IMAGE_BYTES) or data[128:132] == b"DICM":
        return [Disclosure(IMAGES, "an image file")]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        what = "a binary file that cannot be looked into"
        return [Disclosure(TEXT, what), Disclosure(IMAGES, what)]
    found = list(dict.fromkeys(_in_json(text, path) if _is_json(path) else _in_page(text)))
    if _IDENTIFIER.search(text):
        found.append(Disclosure(TEXT, "an identifier"))
    folded = text.casefold()
    if hits := sum(name.casefold() in folded for name in set(names) if len(name) >= 4):
        found.append(Disclosure(TEXT, f"{hits} names or sentences of the studies"))
    return found


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl")


def _in_json(text: str, path: Path) -> Iterator[Disclosure]:
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    for line in filter(str.strip, lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            yield Disclosure(TEXT, "lines that are not JSON")
            return
        yield from _in_value(value)
    yield from _images(text)


def _in_value(value: Any) -> Iterator[Disclosure]:
    if isinstance(value, dict):
        for key, one in value.items():
            # Figures under the name of a role tell nothing; a list of token ids is a text.
            if key.lower() in FIELDS and one and (isinstance(one, (str, list)) or _words(one)):
                yield Disclosure(TEXT, f"field {key!r}")
            yield from _in_value(key)
            yield from _in_value(one)
    elif isinstance(value, list):
        for one in value:
            yield from _in_value(one)
    elif isinstance(value, str):
        if len(value) > LONGEST:
            yield Disclosure(TEXT, f"a value of more than {LONGEST} characters")
        if _LOCAL.match(value):
            yield Disclosure(PATHS, "a path of this machine")


def _words(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_words, value.values()))
    return isinstance(value, str) or (isinstance(value, list) and any(map(_words, value)))


def _in_page(text: str) -> Iterator[Disclosure]:
    yield from _images(text)
    for key in _KEYS.findall(text):
        yield Disclosure(TEXT, f"field {key!r}")
    if _OPAQUE.search(text):
        what = "an encoded block that cannot be looked into"
        yield Disclosure(TEXT, what)
        yield Disclosure(IMAGES, what)


def _images(text: str) -> Iterator[Disclosure]:
    if _ENCODED_IMAGE.search(text):
        yield Disclosure(IMAGES, "embedded images")
