"""What a Hub repository holds, by network or from the cache, and what to say where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hooks.files import FolderError


@contextmanager
def from_hub(repo: str) -> Iterator[None]:
    """Turn errors of the Hub, the network and the cache into one that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FolderError(
            f"{repo} is no folder here, and the Hub does not give it ({reason}); check the name, "
            "the network and access to it"
        ) from None


def names_in(repo: str, revision: str | None, below: str = "") -> list[str]:
    """Paths of the files below a folder of the repository, relative to it.

    With ``HF_HUB_OFFLINE`` those that an earlier call fetched. Errors are for :func:`from_hub`.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        names = _cached(repo, revision)
    else:
        names = HfApi().list_repo_files(repo, revision=revision)
    return [name.removeprefix(below) for name in names if name.startswith(below)]


def _cached(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    base = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    asked = revision or constants.DEFAULT_REVISION
    reference = base / "refs" / asked
    commit = reference.read_text().strip() if reference.is_file() else asked
    snapshot = base / "snapshots" / commit
    if not snapshot.is_dir():
        raise LocalEntryNotFoundError("HF_HUB_OFFLINE is set and it is not in the cache")
    return [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]
