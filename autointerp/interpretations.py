"""Labels that somebody else made, in a file whose layout nobody has told us.

The interpretations shipped with ``microsoft/maira-2-sae`` are such files. What is known of them is
that a language model wrote one a latent and that they were scored by detection; names of files and
fields are not. So the file is looked into, and anything that leaves a doubt is an error that lists
what is there. Recognised are JSON, JSON lines, CSV, TSV and parquet that hold

- records, or columns, with a latent's number and its text, under any usual name;
- a mapping of numbers to texts, or to such records;
- a list of such mappings, or of texts, which then count from 0;

each also one level deeper, under a key such as ``features``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hooks.files import FolderError, FormatError
from sae.formats.repository import from_hub, names_in

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
LATENT = (
    *("latent", "latent_id", "latent_idx", "latent_index", "feature", "feature_id", "feature_idx"),
    *("feature_index", "feature_num", "neuron", "neuron_id", "index", "idx", "id"),
)
"""Names of the latent's number, most telling first."""
TEXT = (
    *("interpretation", "label", "explanation", "description", "concept", "name", "summary"),
    *("title", "text"),
)
"""Names of its text, most telling first."""
SCORE = re.compile(
    r"score|accuracy|auroc|auc|f1|precision|recall|correlation|confidence|detection", re.IGNORECASE
)
NONE = re.compile(
    r"\s*(?:none|null|nan|n/?a|no (?:clear )?(?:concept|interpretation|label|pattern)|unknown|"
    r"unclear|uninterpretable|)\s*\.?\s*",
    re.IGNORECASE,
)
"""Texts that say there is no concept."""


@dataclass(frozen=True)
class Columns:
    """Fields of a record, where they are not to be guessed."""

    latent: str | None = None
    text: str | None = None


class Interpretations(NamedTuple):
    """What a file says of latents."""

    texts: dict[int, str | None]
    """By latent; ``None`` where the file says that there is no concept."""
    scores: dict[int, dict[str, float]]
    """Numbers beside a text, by their own names: what they measure, the file does not say."""
    file: str
    layout: str
    """How the file was read, for records and errors."""


def read_interpretations(
    where: Path | str,
    columns: Columns | None = None,
    *,
    revision: str | None = None,
    n_latents: int | None = None,
) -> Interpretations:
    """The interpretations in a file, a folder with one such file, or a Hub repository.

    Parameters
    ----------
    where
        A path, or ``owner/name[/path of the file in it]``.
    columns
        The fields, where their names are unusual or several could be meant.
    n_latents
        Of the dictionary: a number beyond it is an error.

    Raises
    ------
    FolderError
        If there is no such file, several, or the Hub does not give it.
    FormatError
        If the layout is not understood; the error lists what was found.
    """
    path = _located(where, revision)
    found = _read(path, columns or Columns())
    beyond = [n for n in found.texts if not 0 <= n < (n_latents or float("inf"))]
    if beyond:
        raise FormatError(
            f"{path} has an interpretation of latent {beyond[0]}, and the dictionary has 0–"
            f"{(n_latents or 0) - 1}; give the file of this dictionary"
        )
    return found


def candidates(names: Iterable[str]) -> list[str]:
    """Files that may hold interpretations, by name: those whose path says so, else all tables.

    >>> candidates(["layer15/ae.pt", "layer15/config.json", "layer15/interpretations.json"])
    ['layer15/interpretations.json']
    """
    tables = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    tables = [n for n in tables if Path(n).name not in ("config.json", "cfg.json", "manifest.json")]
    telling = re.compile(r"interp|explan|label|descri|concept", re.IGNORECASE)
    return [name for name in tables if telling.search(name)] or tables


def _located(where: Path | str, revision: str | None) -> Path:
    path = Path(where)
    if path.is_file():
        return path
    if path.is_dir():
        names = [str(p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
        return path / _only(names, str(path))
    text = str(where)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/.+)?", text) is None:
        raise FolderError(f"{text} is no file, no folder and no Hub repository; give one of them")
    owner, name, *inside = text.split("/")
    return _from_hub(f"{owner}/{name}", "/".join(inside), revision)


def _only(names: Sequence[str], where: str) -> str:
    found = candidates(names)
    if len(found) == 1:
        return found[0]
    if not found:
        raise FolderError(
            f"{where} has no {', '.join(SUFFIXES)} that could hold interpretations, but "
            f"{sorted(names)[:40] or 'nothing'}; give the path of the file"
        )
    raise FolderError(
        f"{where} has {len(found)} files that could hold interpretations: {found[:40]}; give the "
        "path of one"
    )


def _from_hub(repo: str, inside: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with from_hub(repo):
        if Path(inside).suffix.lower() not in SUFFIXES:
            below = f"{inside.rstrip('/')}/" if inside else ""
            inside = below + _only(names_in(repo, revision, below), f"{repo}/{below}")
        return Path(hf_hub_download(repo, inside, revision=revision))


def _read(path: Path, columns: Columns) -> Interpretations:
    content = _content(path)
    tried: list[str] = []
    for prefix, value in _levels(content):
        found = _of(value, columns, path)
        if not isinstance(found, str):
            texts, scores, layout = found
            return Interpretations(texts, scores, path.name, f"{prefix}{layout}")
        tried.append(f"{prefix or 'the file'}: {found}")
    raise FormatError(
        f"{path} is not understood as interpretations ({'; '.join(tried[:6])}); name the fields "
        "of its records, or write a CSV with the columns latent and label"
    )


def _content(path: Path) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
    except (ValueError, csv.Error, OSError) as error:
        raise FormatError(f"{path} cannot be read as {suffix} ({error}); get it anew") from None
    raise FormatError(f"{path} is no file of {', '.join(SUFFIXES)}; convert it to one of them")


def _levels(content: Any) -> Iterable[tuple[str, Any]]:
    """The content, then what is under each of its keys."""
    yield "", content
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Mapping | list):
                yield f"under {key!r}, ", value


_Found = tuple[dict[int, str | None], dict[int, dict[str, float]], str]


def _of(value: Any, columns: Columns, path: Path) -> _Found | str:
    """Texts and scores, or why there are none."""
    if isinstance(value, Mapping):
        return _of_mapping(value, columns, path)
    if not isinstance(value, list) or not value:
        return f"a {type(value).__name__} with nothing in it"
    if all(isinstance(one, str) or one is None for one in value):
        return {i: _said(one) for i, one in enumerate(value)}, {}, "texts in order, from 0"
    if not all(isinstance(one, Mapping) for one in value):
        return f"a list of {sorted({type(one).__name__ for one in value})}"
    merged = {key: one[key] for one in value for key in one}
    n_keys = sum(len(one) for one in value)
    if n_keys == len(merged) and all(_number(key) is not None for key in merged):
        return _of_mapping(merged, columns, path)
    return _of_records(value, columns, path)


def _of_mapping(value: Mapping[str, Any], columns: Columns, path: Path) -> _Found | str:
    numbers = {key: _number(key) for key in value}
    if not value or any(n is None for n in numbers.values()):
        return f"a mapping with the keys {sorted(map(str, value))[:8]}"
    if all(isinstance(one, str) or one is None for one in value.values()):
        texts = {n: _said(value[key]) for key, n in numbers.items() if n is not None}
        return texts, {}, "numbers to texts"
    if not all(isinstance(one, Mapping) for one in value.values()):
        return f"numbers to {sorted({type(one).__name__ for one in value.values()})}"
    records = [{**value[key], "latent": n} for key, n in numbers.items()]
    return _of_records(records, Columns("latent", columns.text), path)


def _of_records(records: Sequence[Mapping[str, Any]], columns: Columns, path: Path) -> _Found | str:
    names = list(dict.fromkeys(key for one in records for key in one))
    latent = _column(names, columns.latent, LATENT)
    text = _column([n for n in names if n != latent], columns.text, TEXT)
    if latent is None or text is None:
        lacking = "the latent's number" if latent is None else "its text"
        return f"records with the fields {names[:20]}, none of which is known for {lacking}"
    texts: dict[int, str | None] = {}
    scores: dict[int, dict[str, float]] = {}
    for record in records:
        number = _number(record.get(latent))
        said = record.get(text)
        if number is None or not (said is None or isinstance(said, str)):
            return f"a record whose {latent} is {record.get(latent)!r} and {text} {said!r:.60}"
        if number in texts:
            raise FormatError(
                f"{path} has two interpretations of latent {number}; keep one of each, such as "
                "those of one model"
            )
        texts[number] = _said(said)
        beside = {
            name: value
            for name in names
            if name not in (latent, text) and SCORE.search(name)
            if (value := _float(record.get(name))) is not None
        }
        if beside:
            scores[number] = beside
    return texts, scores, f"records, {latent} and {text}"


def _column(names: Sequence[str], given: str | None, known: Sequence[str]) -> str | None:
    if given is not None:
        return given if given in names else None
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in names}
    return next((plain[name] for name in known if name in plain), None)


def _number(value: Any) -> int | None:
    """A latent's number, also in words such as ``latent_12``.

    >>> _number("12"), _number("feature_12"), _number(12.0), _number("layer15/f3"), _number(True)
    (12, 12, 12, None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    found = re.fullmatch(r"(?:latent|feature|neuron|f)?[\s_-]*(\d+)(?:\.0)?", str(value).strip())
    return int(found[1]) if found else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _said(text: str | None) -> str | None:
    return None if text is None or NONE.fullmatch(text) else " ".join(text.split())
