"""Durable files: atomic writes, sealed folders, and the family of errors everyone raises.

A *sealed* folder is one whose ``manifest.json`` exists. The manifest is written last, so its
presence proves that every file it lists was complete and on disk before it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

MANIFEST = "manifest.json"


class MairaSaeError(Exception):
    """Base of every error this library raises on purpose.

    The text is one line: what was asked, what was found, what to do next.
    """

    resumable = False
    """Whether work was kept, so that running again continues."""


class CheckpointError(MairaSaeError):
    """A model checkpoint is incomplete or does not fit its configuration."""


class StudyError(MairaSaeError):
    """A study, its images or its text cannot be read."""


class SiteError(MairaSaeError):
    """A named place in a model does not exist or cannot be harvested as asked."""


class FolderError(MairaSaeError):
    """A stage folder is missing, incomplete, damaged, or of another format version."""


class WriteError(MairaSaeError):
    """A file could not be written, as on a full disk; what was there before is still there."""

    resumable = True


class ConfigError(MairaSaeError):
    """A configuration value is unknown or out of range."""


class FormatError(MairaSaeError):
    """A dictionary of another library is unreadable, incomplete or ambiguous."""


class DisclosureError(MairaSaeError):
    """What was to leave the machine holds patient text, films, identifiers or local paths."""


class HubError(MairaSaeError):
    """A Hub repository cannot be read or written as asked."""


class UploadError(HubError):
    """An upload broke off; what the Hub has already is not sent again."""

    resumable = True


class EndpointError(MairaSaeError):
    """A language-model endpoint is down, refuses, or may not be used."""


def nearest(asked: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest known name, or an empty string.

    >>> nearest("llm.15.resid_pst", ["llm.15.resid_post", "projector"])
    " (did you mean 'llm.15.resid_post'?)"
    """
    close = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def reject_unknown_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise :class:`ConfigError` for the first given key that is not known."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no key {key!r}{nearest(key, known)}")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it is fsynced and renamed over ``path``.

    A crash or an exception leaves ``path`` as it was. Works for a file of any writer that takes
    a path.

    Raises
    ------
    WriteError
        If the operating system refuses, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} could not be written ({error}); make room, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling; on success its files are fsynced and it becomes ``folder``.

    A crash or an exception leaves no ``folder``. One that already has these very files is kept.

    Raises
    ------
    FolderError
        If ``folder`` exists and holds anything else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists() and _files(folder) != {}:
            if _files(folder) != _files(temporary):
                raise FolderError(f"{folder} exists and holds something else; give a new folder")
            return
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as handle:
                    os.fsync(handle.fileno())
            else:
                _fsync_folder(path)
        _fsync_folder(temporary)
        temporary.rename(folder)
        _fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files(folder: Path) -> dict[str, dict[str, Any]] | None:
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): file_record(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a :class:`FolderError` that names it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist; check the folder's path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} is not valid JSON ({error}); write it again") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """``{"bytes", "sha256"}`` of a file, as manifests list it."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def versions() -> dict[str, str]:
    """Versions of the libraries that decide results, for manifests."""
    found = {}
    for name in ("maira-sae", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def seal(
    folder: Path,
    kind: str,
    format_version: int,
    files: Mapping[str, Mapping[str, Any]],
    **record: Any,
) -> None:
    """Write ``folder``'s manifest, last.

    Parameters
    ----------
    files
        :func:`file_record` of every file the folder is made of, by name.
    record
        What else a reader needs; any JSON value.
    """
    manifest = {
        "kind": kind,
        "format_version": format_version,
        "versions": versions(),
        **record,
        "files": {name: files[name] for name in sorted(files)},
    }
    write_json(folder / MANIFEST, manifest)


def is_sealed(folder: Path) -> bool:
    """Whether ``folder`` carries a manifest, that is: whether its stage finished."""
    return (folder / MANIFEST).is_file()


def open_sealed(folder: Path, kind: str, format_version: int, remedy: str) -> Mapping[str, Any]:
    """Read and check a sealed folder's manifest, and that every listed file has its size.

    Parameters
    ----------
    remedy
        What the user should run to make such a folder; it ends the error text.

    Raises
    ------
    FolderError
        If the folder is missing, unfinished, of another kind or format version, or if a listed
        file is missing or has another size.
    """
    if not folder.is_dir():
        raise FolderError(f"no folder {folder}; {remedy}")
    if not is_sealed(folder):
        raise FolderError(f"{folder} has no {MANIFEST}, so it is unfinished; {remedy}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind:
        found = manifest.get("kind")
        raise FolderError(f"{folder} holds {found!r}, expected {kind!r}; {remedy}")
    found_version = manifest.get("format_version")
    if found_version != format_version:
        raise FolderError(
            f"{folder} has format version {found_version}, this library reads {format_version}; "
            f"{remedy} into a new folder, or install the release that wrote it"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            _damaged(path, f"{expected['bytes']} bytes", size and f"{size} bytes", remedy)
    return manifest


def verify(folder: Path) -> int:
    """Compare every file a manifest lists with its recorded size and SHA-256.

    Returns
    -------
    int
        The number of files checked.
    """
    if not folder.is_dir():
        raise FolderError(f"no folder {folder}; give a finished folder")
    if not is_sealed(folder):
        raise FolderError(f"{folder} has no {MANIFEST}; only finished folders can be verified")
    files = read_json(folder / MANIFEST)["files"]
    for name, expected in files.items():
        path = folder / name
        found = file_record(path) if path.is_file() else None
        if found != expected:
            shown = f"sha256 {found['sha256']}" if found else None
            _damaged(path, f"sha256 {expected['sha256']}", shown)
    return len(files)


def _damaged(path: Path, expected: str, found: str | None, remedy: str = "") -> NoReturn:
    state = f"has {found}" if found else "is missing"
    advice = f"delete {path.parent} and {remedy}" if remedy else f"delete {path.parent} and redo it"
    raise FolderError(f"{path} {state}, its manifest says {expected}; {advice}")
