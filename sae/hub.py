"""Publishing a dictionary as a Hub repository, and fetching one whole.

The repository holds our own files at its root, SAELens' in ``sae_lens/``, others where asked, and
``README.md``. ``manifest.json`` goes up in a commit of its own, last; where an older one lies
there, the commit before takes it away: no reader finds a manifest beside other files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hooks.files import (
    MANIFEST,
    DisclosureError,
    FolderError,
    HubError,
    UploadError,
    file_record,
    is_sealed,
    nearest,
    read_json,
    seal,
    verify,
)
from sae.disclosure import IMAGES, PATHS, TEXT, Disclosure, disclosures
from sae.formats import WRITERS
from sae.model import FORMAT_VERSION, KIND, MatryoshkaSAE
from sae.model_card import model_card

OWN = ("config.json", "sae.safetensors", "metrics.json")
LABEL_FILES = ("labels.jsonl",)
"""What a label folder gives unless more is named; its ledger quotes reports."""
SCORE_FILES = ("scores.jsonl",)


@dataclass(frozen=True)
class Publication:
    """What is published, and what the card must say that no file says."""

    sae: Path
    """SAE folder."""
    data: str
    """What it was trained on and under which terms."""
    license: str
    """Identifier that the Hub knows, such as ``mit`` or ``other``."""
    base_model: str = ""
    """Hub id of the model; it replaces a local path in the configuration."""
    labels: Path | None = None
    scores: Path | None = None
    """Folder of ``maira-sae score``."""
    evaluation: Path | None = None
    """Folder of ``maira-sae eval --out``."""
    explorer: Path | None = None
    """Page of ``maira-sae dashboard``."""
    formats: tuple[str, ...] = ("sae_lens",)
    include_text: tuple[str, ...] = ()
    """Files, by their names in the repository, that may hold patient text."""
    include_images: tuple[str, ...] = ()
    """Files, by their names in the repository, that may hold films."""
    forbidden: tuple[str, ...] = field(default=(), repr=False)
    """Studies, patients and sentences to look for in every file."""

    def __post_init__(self) -> None:
        known = [name for name in WRITERS if name != "maira_sae"]
        for name in self.formats:
            if name not in known:
                raise HubError(f"no format {name!r}{nearest(name, known)}; there are {known}")
        for name in ("data", "license"):
            if not getattr(self, name).strip():
                raise HubError(f"{name} is empty; the model card must state it")


class Staged(NamedTuple):
    """A repository on disk, complete and sealed."""

    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    """Bytes and sha256 by name, the manifest included."""
    card: str
    found: Mapping[str, list[Disclosure]]
    """Files that were included by name, with what they hold."""
    withheld: Sequence[str]
    """Files of the given folders that are not sent."""


def stage(publication: Publication, repo: str, folder: Path) -> Staged:
    """Write the repository into the empty ``folder``. Nothing leaves the machine.

    Raises
    ------
    DisclosureError
        If a file holds text, images or local paths and was not named.
    HubError
        If ``repo`` is no name of a repository.
    """
    if repo.count("/") != 1:
        raise HubError(f"the repository is {repo!r}; name it owner/name")
    sae = MatryoshkaSAE.load(publication.sae)
    named = str(sae.config.model.get("id", ""))
    base_model = publication.base_model
    if not base_model and named and not _is_local(named):
        base_model = named
    if base_model:
        sae.config = replace(sae.config, model={**sae.config.model, "id": base_model})
    elif named:
        raise DisclosureError(
            f"{publication.sae}/config.json names the model by a path of this machine; give the "
            "name it is known by with --base-model"
        )
    metrics = read_json(publication.sae / "metrics.json")
    sae.save(folder, metrics)
    for name in publication.formats:
        (folder / name).mkdir()
        WRITERS[name](sae, folder / name)
    withheld = _copy_extras(publication, folder)
    found = _check(publication, folder)
    evaluation = folder / "evaluation.json"
    training = publication.sae / "train.json"
    card = model_card(
        repo,
        sae.config,
        metrics,
        data=publication.data,
        license=publication.license,
        base_model=base_model,
        formats=publication.formats,
        evaluation=read_json(evaluation) if evaluation.is_file() else None,
        training=read_json(training).get("train") if training.is_file() else None,
        n_labels=_named(folder / LABEL_FILES[0]),
        scored=(folder / SCORE_FILES[0]).is_file(),
        disclosed=list(found),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / MANIFEST).unlink()
    files = _records(folder)
    rest = {name: record for name, record in files.items() if name not in OWN}
    seal(folder, KIND, FORMAT_VERSION, {name: files[name] for name in OWN}, published=rest)
    return Staged(folder, _records(folder), card, found, withheld)


def publish(
    publication: Publication, repo: str, *, private: bool = True, revision: str | None = None
) -> str:
    """Send a dictionary to the repository ``owner/name`` at ``HF_ENDPOINT``; returns its address.

    Run again after an interruption: what the Hub has already is not sent again.

    Raises
    ------
    DisclosureError
        Before anything is sent, see :func:`stage`.
    HubError
        If the repository is public and ``private`` is asked, or access is refused.
    UploadError
        If the connection breaks; run again.
    """
    with tempfile.TemporaryDirectory(prefix="maira-sae-publish-") as temporary:
        staged = stage(publication, repo, Path(temporary))
        with _hub_errors(repo):
            return _send(staged, repo, private, revision)


def pull(repo: str, folder: Path, *, revision: str | None = None) -> Path:
    """Fetch a published repository whole, and compare every file with its manifest."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        snapshot_download(repo, revision=revision, local_dir=folder)
    verify_published(folder)
    return folder


def verify_published(folder: Path) -> int:
    """Compare every file of a fetched repository with the manifest; returns how many."""
    count = verify(folder)
    others = read_json(folder / MANIFEST).get("published", {})
    for name, expected in others.items():
        path = folder / name
        if not path.is_file() or file_record(path) != expected:
            raise FolderError(f"{path} is missing or differs from {MANIFEST}; fetch it again")
    return count + len(others)


def _send(staged: Staged, repo: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    address = str(api.create_repo(repo, private=private, exist_ok=True))
    if private and api.repo_info(repo).private is False:
        raise HubError(f"{repo} is public; ask for that with --public, or make it private there")
    there = set(api.list_repo_files(repo, revision=revision))
    removed: list[str] = []
    if MANIFEST in there:
        old = Path(api.hf_hub_download(repo, MANIFEST, revision=revision))
        if old.read_bytes() == (staged.folder / MANIFEST).read_bytes():
            return address
        listed = read_json(old)
        before = {*listed.get("files", {}), *listed.get("published", {})}
        removed = sorted({MANIFEST, *(before - set(staged.files))} & there)
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(staged.folder / name))
        for name in staged.files
        if name != MANIFEST
    ]
    gone = [CommitOperationDelete(path_in_repo=name) for name in removed]
    message = "Dictionary, card and records"
    api.create_commit(repo, [*added, *gone], commit_message=message, revision=revision)
    last = CommitOperationAdd(path_in_repo=MANIFEST, path_or_fileobj=str(staged.folder / MANIFEST))
    api.create_commit(repo, [last], commit_message="Manifest", revision=revision)
    return address


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        kind = HubError if code in (400, 401, 403, 404) else UploadError
        advice = (
            "log in with `hf auth login` or set HF_TOKEN, and check the name"
            if kind is HubError
            else "run the same command again to go on"
        )
        raise kind(f"{constants.ENDPOINT} answered {code} for {repo}; {advice}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UploadError(
            f"{constants.ENDPOINT} did not take or give {repo} ({reason}); run the same command "
            "again to go on"
        ) from error


def _named(labels: Path) -> int | None:
    """Latents that have a label; ``None`` without a file, or with one that is no record of labels
    and was included by name."""
    if not labels.is_file():
        return None
    try:
        records = [json.loads(line) for line in labels.read_text().splitlines()]
        return sum(record["label"] is not None for record in records)
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _copy_extras(publication: Publication, folder: Path) -> list[str]:
    """Copy what stands beside the dictionary; returns what lies there and is left out."""
    withheld = []
    named = {*publication.include_text, *publication.include_images}
    sources = (
        (publication.labels, LABEL_FILES),
        (publication.scores, SCORE_FILES),
        (publication.evaluation, None),
    )
    for source, usual in sources:
        if source is None:
            continue
        if not source.is_dir():
            raise FolderError(f"no folder {source}; check its path")
        if usual is not None and not is_sealed(source):
            raise FolderError(f"{source} has no {MANIFEST}, so it is unfinished; finish it first")
        wanted = {*(usual or ("evaluation.json", "evaluation.html")), *named}
        for path in sorted(path for path in source.iterdir() if path.is_file()):
            if path.name in wanted:
                shutil.copyfile(path, folder / path.name)
            elif path.name not in (MANIFEST, "config.json"):
                withheld.append(path.name)
    if publication.explorer is not None:
        if not publication.explorer.is_file():
            raise FolderError(f"no file {publication.explorer}; `maira-sae dashboard` makes it")
        shutil.copyfile(publication.explorer, folder / "explorer.html")
    absent = sorted(name for name in named if not (folder / name).is_file())
    if absent:
        raise HubError(f"{absent[0]} is named to be included and is in none of the given folders")
    return withheld


def _check(publication: Publication, folder: Path) -> dict[str, list[Disclosure]]:
    """What files hold that were included by name; anything else is refused."""
    allowed = {TEXT: publication.include_text, IMAGES: publication.include_images, PATHS: ()}
    found = {}
    for name in _records(folder):
        if name == MANIFEST:
            continue
        holds = disclosures(folder / name, publication.forbidden)
        for one in holds:
            if name not in allowed[one.kind]:
                advice = (
                    "write it again without them"
                    if one.kind == PATHS
                    else f"leave it out, or name it with --include-{one.kind} {name}"
                )
                raise DisclosureError(f"{name} holds {one.what} ({one.kind}); {advice}")
        if holds:
            found[name] = holds
    return found


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_record(path) for path in paths}


def _is_local(name: str) -> bool:
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name
