"""Writing an activation folder, part by part; the layout is told in :mod:`hooks.store`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hooks.files import (
    MANIFEST,
    FolderError,
    atomic_path,
    file_record,
    read_json,
    seal,
    write_json,
)
from hooks.parts import (
    FORMAT_VERSION,
    KIND,
    SKIPPED,
    StudyRows,
    part_files,
    role_sums,
    token_table,
)
from hooks.roles import Tokens
from hooks.studies import Skipped


class ActivationWriter:
    """Writes parts in any order, each atomically; knows which ones are already there.

    Parameters
    ----------
    folder
        Created if needed.
    config
        Everything that decides the contents. A folder begun with another config is refused.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / "config.json"
        if not path.is_file():
            # Temporary files may be another rank's, which begins at the same moment.
            if folder.is_dir() and any(p.name[0] != "." for p in folder.iterdir()):
                if not path.is_file():
                    raise FolderError(f"{folder} is not empty and is no harvest; give a new folder")
            else:
                write_json(path, dict(config))
        if (found := read_json(path)) != dict(config):
            differs = next(k for k in {**found, **config} if found.get(k) != config.get(k))
            raise FolderError(
                f"{folder} holds another harvest: {differs} is {_brief(found.get(differs))}, asked "
                f"was {_brief(config.get(differs))}; give a new folder, or delete this one"
            )

    def _commit(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.json"

    def has(self, index: int) -> bool:
        """Whether part ``index`` is committed."""
        return self._commit(index).is_file()

    def write(
        self,
        index: int,
        rows: Sequence[StudyRows],
        sites: Sequence[str],
        skipped: Sequence[Skipped] = (),
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """Write and commit part ``index``.

        Parameters
        ----------
        skipped
            Studies of the part that have no rows because they could not be read.
        widths
            By site; needed only where ``rows`` may be empty of studies.
        """
        import pyarrow.parquet as pq

        commit = {"studies": len(rows), "skipped": [one._asdict() for one in skipped]}
        if not rows:
            assert widths is not None
            nothing = Tokens(*(np.zeros(0, dtype=np.int64) for _ in range(6)))
            empty = {site: torch.zeros(0, widths[site]) for site in sites}
            rows = [StudyRows("", "", 0, nothing.ids, nothing, empty)]
        tensors = {
            site: torch.cat([study.activations[site] for study in rows]).contiguous()
            for site in sites
        }
        roles = np.concatenate([study.tokens.role for study in rows])
        part, tokens, stats = part_files(index)
        with atomic_path(self.folder / part) as temporary:
            save_file(tensors, temporary)
        with atomic_path(self.folder / tokens) as temporary:
            pq.write_table(token_table(rows), temporary)
        with atomic_path(self.folder / stats) as temporary:
            save_file(role_sums(tensors, roles), temporary)
        names = [part, tokens, stats]
        if written := [study.generation for study in rows if study.generation is not None]:
            names.append(f"generations-{index:05d}.jsonl")
            with atomic_path(self.folder / names[-1]) as temporary:
                lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in written)
                temporary.write_text("".join(lines))
        commit |= {
            "rows": len(roles),
            "widths": {site: values.shape[1] for site, values in tensors.items()},
            "files": {name: file_record(self.folder / name) for name in names},
        }
        write_json(self._commit(index), commit)

    def seal(self, n_parts: int, **record: Any) -> None:
        """Write the manifest over parts ``0 … n_parts - 1``, all of which must be committed."""
        commits = [read_json(self._commit(i)) for i in range(n_parts)]
        files = {name: sums for commit in commits for name, sums in commit["files"].items()}
        files["config.json"] = file_record(self.folder / "config.json")
        skipped = [one for commit in commits for one in commit.get("skipped", [])]
        if skipped:
            with atomic_path(self.folder / SKIPPED) as temporary:
                lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in skipped)
                temporary.write_text("".join(lines))
            files[SKIPPED] = file_record(self.folder / SKIPPED)
        seal(
            self.folder,
            KIND,
            FORMAT_VERSION,
            files,
            n_tokens=sum(commit["rows"] for commit in commits),
            n_studies=sum(commit["studies"] for commit in commits),
            n_skipped=len(skipped),
            part_rows=[commit["rows"] for commit in commits],
            widths=commits[0]["widths"],
            **record,
        )

    def skipped(self, n_parts: int) -> dict[int, list[Skipped]]:
        """Studies that committed parts had to leave out, by part."""
        found = {}
        for index in filter(self.has, range(n_parts)):
            if own := read_json(self._commit(index)).get("skipped"):
                found[index] = [Skipped(**one) for one in own]
        return found

    def reopen(self, parts: Sequence[int]) -> None:
        """Forget that ``parts`` are committed, so that they are computed again."""
        for path in (MANIFEST, SKIPPED):
            (self.folder / path).unlink(missing_ok=True)
        for index in parts:
            self._commit(index).unlink(missing_ok=True)

    def sweep(self, parts: Sequence[int]) -> None:
        """Delete temporary files of ``parts`` whose process was killed on this machine."""
        stems = {Path(name).stem for part in parts for name in part_files(part)}
        for path in self.folder.glob(".*.tmp"):
            name, _, number = path.name[1:].removesuffix(".tmp").rpartition(".")
            if Path(name).stem in stems and not (number.isdigit() and _alive(int(number))):
                path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process of this number runs, this one not counted: it is only beginning."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
