"""Finding a dictionary in a folder, a file or a Hub repository, and reading it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hooks.files import FolderError, FormatError, nearest, open_sealed, verify
from sae.formats import dictionary_learning, gemma_scope, inspected, sae_lens, sparsify
from sae.formats.given import Given
from sae.formats.repository import from_hub, names_in
from sae.formats.tensors import SUFFIXES, read_config
from sae.model import FORMAT_VERSION, KIND, MatryoshkaSAE

FORMATS = (
    "maira_sae",
    "dictionary_learning",
    "sae_lens",
    "sparsify",
    "gemma_scope",
    "inspected",
)
LOOKED_FOR = (
    "manifest.json with sae.safetensors (maira_sae), ae.pt (dictionary_learning), cfg.json with "
    "sae_weights.safetensors (sae_lens) or sae.safetensors (sparsify), params.npz (gemma_scope), "
    f"or one {', '.join(SUFFIXES)} file"
)


class Candidate(NamedTuple):
    """One dictionary among file names, relative to the root that was listed."""

    format: str
    weights: PurePosixPath
    config: PurePosixPath | None


def candidates(names: Iterable[str]) -> list[Candidate]:
    """Every dictionary that file names tell of; a folder's own hide those in folders below it.

    >>> [c.format for c in candidates(["a/cfg.json", "a/sae.safetensors", "README.md"])]
    ['sparsify']
    """
    folders: dict[PurePosixPath, set[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(path.parent, set()).add(path.name)
    found: list[Candidate] = []
    for folder in sorted(folders, key=lambda path: (len(path.parts), str(path))):
        if any(folder.is_relative_to(one.weights.parent) for one in found):
            continue
        if not any(part in ("checkpoints", ".cache") for part in folder.parts):
            found += _in_folder(folder, folders[folder])
    return found


def _in_folder(folder: PurePosixPath, names: set[str]) -> list[Candidate]:
    known = (
        ("maira_sae", "sae.safetensors", "manifest.json"),
        ("sae_lens", "sae_weights.safetensors", "cfg.json"),
        ("sparsify", "sae.safetensors", "cfg.json"),
        ("dictionary_learning", "ae.pt", "config.json"),
    )
    for kind, weights, config in known:
        if weights in names and config in names:
            return [Candidate(kind, folder / weights, folder / config)]
    files = [name for name in names if name.endswith(SUFFIXES)]
    config = next((folder / name for name in ("config.json", "cfg.json") if name in names), None)
    found = []
    for name in sorted(files):
        kind = "gemma_scope" if name.endswith(".npz") else "inspected"
        found.append(Candidate(kind, folder / name, config))
    return found


def read(
    source: Path | str,
    given: Given | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    format: str | None = None,
) -> MatryoshkaSAE:
    """Read the dictionary at ``source``; see :meth:`sae.MatryoshkaSAE.from_pretrained`."""
    given = given or Given()
    if format is not None and format not in FORMATS:
        known = ", ".join(FORMATS)
        raise FormatError(f"no format {format!r}{nearest(format, FORMATS)} to read; of {known}")
    path = Path(source)
    if path.is_file():
        root, choice = _of_file(path)
    elif path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        root = path / subfolder if subfolder else path
        choice = _of_folder(root)
    else:
        root, choice = _from_hub(str(source), revision, subfolder)
    weights = root / choice.weights
    config = root / choice.config if choice.config else None
    kind = format or choice.format
    if kind == "inspected" and format is None and "norm_scale" in read_config(config):
        kind = "maira_sae"  # a folder of ours without its manifest: unfinished
    if kind == "maira_sae":
        given.refuse(weights.parent, "k", "group_sizes", "threshold", "norm_scale")
        sae = MatryoshkaSAE.load(weights.parent)
        labels = {name: getattr(given, name) for name in ("site", "policy", "activation")}
        said = {name: value for name, value in labels.items() if value is not None}
        sae.config = replace(sae.config, **said)
        return sae
    if kind == "dictionary_learning" and format is None and "trainer" not in read_config(config):
        kind = "inspected"  # another library's ae.pt
    if kind == "gemma_scope":
        return gemma_scope.read(weights, given)
    if kind == "inspected":
        return inspected.read(weights, config, given)
    if config is None:
        raise FormatError(f"{weights} has no configuration beside it, which {kind} needs; add it")
    readers = {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens}
    return readers.get(kind, sparsify).read(weights, config, given)


def _of_file(path: Path) -> tuple[Path, Candidate]:
    folder = path.parent
    above = folder.parent / "config.json"
    if folder.name == "checkpoints" and above.is_file():  # dictionary_learning's ae_{step}.pt
        relative = PurePosixPath("checkpoints") / path.name
        config = PurePosixPath("config.json")
        return above.parent, Candidate("dictionary_learning", relative, config)
    siblings = [item.name for item in folder.iterdir() if item.is_file()]
    for one in _in_folder(PurePosixPath(), set(siblings)):
        if one.weights.name == path.name:
            return folder, one
    return folder, Candidate("inspected", PurePosixPath(path.name), None)


def _of_folder(root: Path) -> Candidate:
    if not root.is_dir():
        raise FolderError(f"no folder {root}; run `maira-sae train` to make it, or check its path")
    manifest = root / "manifest.json"
    if manifest.is_file() and {"kind", "format_version"} <= set(read_config(manifest)):
        weights, config = PurePosixPath("sae.safetensors"), PurePosixPath("config.json")
        return Candidate("maira_sae", weights, config)  # ours, if perhaps of another stage
    names = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
    found = candidates(name for name in names if not PurePosixPath(name).name.startswith("."))
    if not found and (root / "train.json").is_file():
        open_sealed(root, KIND, FORMAT_VERSION, "run `maira-sae train` again to finish it")
    return _only(found, names, str(root))


def _only(found: list[Candidate], names: list[str], where: str) -> Candidate:
    if not found:
        shown = ", ".join(sorted(names)[:40]) or "nothing"
        raise FormatError(f"{where} holds no dictionary: found {shown}; looked for {LOOKED_FOR}")
    if len(found) > 1:
        places = ", ".join(str(one.weights) for one in found[:40])
        raise FormatError(
            f"{where} holds {len(found)} dictionaries: {places}; give the subfolder of one, or "
            "the path of one file"
        )
    return found[0]


def _from_hub(repo: str, revision: str | None, subfolder: str | None) -> tuple[Path, Candidate]:
    from huggingface_hub import snapshot_download

    below = f"{subfolder.strip('/')}/" if subfolder else ""
    with from_hub(repo):
        inside = names_in(repo, revision, below)
        choice = _only(candidates(inside), inside, f"{repo}{'/' * bool(below)}{below}")
        wanted = [choice.weights, choice.config]
        if choice.format == "maira_sae":
            own = ("config.json", "manifest.json", "metrics.json")
            wanted = [choice.weights, *(choice.weights.with_name(name) for name in own)]
        files = [f"{below}{name}" for name in wanted if name is not None]
        folder = snapshot_download(repo, revision=revision, allow_patterns=files)
    root = Path(folder) / below
    if choice.format == "maira_sae":
        verify(root / choice.weights.parent)
    return root, choice
