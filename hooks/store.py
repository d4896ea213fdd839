"""The activation folder: residual streams on disk, with a row of the token table per token.

Part *i* is three files, and ``part-{i}.json`` written after them commits it:

``part-{i}.safetensors``
    one tensor ``[rows, d]`` per site, the same rows in the same order
``tokens-{i}.parquet``
    one table row per tensor row
``stats-{i}.safetensors``
    float64 sums per site and role, from which means and norms follow

``manifest.json`` seals the folder after the last part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.files import (
    FolderError,
    atomic_path,
    file_record,
    nearest,
    open_sealed,
    read_json,
    seal,
    write_json,
)
from hooks.roles import NONE, Role, Tokens, View
from hooks.studies import split_of

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "activations"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REMEDY = "run `maira-sae harvest` to make it"


class StudyRows(NamedTuple):
    """Kept tokens of one study and their activations ``[rows, d]`` by site."""

    study: str
    patient: str
    sequence: int
    positions: np.ndarray
    tokens: Tokens
    activations: Mapping[str, Tensor]


class Moments(NamedTuple):
    """First two moments of a site's rows."""

    count: int
    mean: Float[Tensor, " d"]
    mean_squared_norm: float


def _part_files(index: int) -> tuple[str, str, str]:
    return (
        f"part-{index:05d}.safetensors",
        f"tokens-{index:05d}.parquet",
        f"stats-{index:05d}.safetensors",
    )


def _table(rows: Sequence[StudyRows]) -> pa.Table:
    import pyarrow as pa

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(study.tokens, name) for study in rows])

    def optional(name: str) -> pa.Array:
        values = joined(name)
        return pa.array(values, type=pa.int16(), mask=values == NONE)

    def named(values: np.ndarray, names: list[str]) -> pa.Array:
        codes = pa.array(values.astype(np.int8), mask=values == NONE)
        return pa.DictionaryArray.from_arrays(codes, pa.array(names))

    lengths = [len(study.tokens) for study in rows]

    def owner(names: list[str]) -> pa.Array:
        # dictionary_encode makes values unique; Parquet pages of repeated ones hold stray bytes.
        repeated = np.repeat(np.array(names, dtype=object), lengths)
        return pa.array(repeated, type=pa.string()).dictionary_encode()

    return pa.table(
        {
            "study": owner([study.study for study in rows]),
            "patient": owner([study.patient for study in rows]),
            "sequence": np.repeat([study.sequence for study in rows], lengths).astype(np.int32),
            "position": np.concatenate([study.positions for study in rows]).astype(np.int32),
            "token_id": joined("ids").astype(np.int32),
            "role": named(joined("role"), [role.name.lower() for role in Role]),
            "view": named(joined("view"), [view.name.lower() for view in View]),
            "patch_row": optional("row"),
            "patch_column": optional("column"),
            "sentence": optional("sentence"),
            # Null where the forward pass stopped before the language-model head.
            "loss": pa.nulls(sum(lengths), type=pa.float32()),
        }
    )


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
        if path.is_file() and (found := read_json(path)) != dict(config):
            differs = next(k for k in {**found, **config} if found.get(k) != config.get(k))
            raise FolderError(
                f"{folder} holds another harvest: {differs} is {_brief(found.get(differs))}, asked "
                f"was {_brief(config.get(differs))}; give a new folder, or delete this one"
            )
        if not path.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise FolderError(f"{folder} is not empty and is no harvest; give a new folder")
            write_json(path, dict(config))

    def has(self, index: int) -> bool:
        """Whether part ``index`` is committed."""
        return (self.folder / f"part-{index:05d}.json").is_file()

    def write(self, index: int, rows: Sequence[StudyRows], sites: Sequence[str]) -> None:
        """Write and commit part ``index``; ``rows`` may be empty of tokens but not of studies."""
        import pyarrow.parquet as pq

        tensors = {
            site: torch.cat([study.activations[site] for study in rows]).contiguous()
            for site in sites
        }
        roles = torch.from_numpy(np.concatenate([study.tokens.role for study in rows]))
        part, tokens, stats = _part_files(index)
        with atomic_path(self.folder / part) as temporary:
            save_file(tensors, temporary)
        with atomic_path(self.folder / tokens) as temporary:
            pq.write_table(_table(rows), temporary)
        with atomic_path(self.folder / stats) as temporary:
            save_file(_sums(tensors, roles), temporary)
        commit = {
            "rows": len(roles),
            "studies": len(rows),
            "widths": {site: values.shape[1] for site, values in tensors.items()},
            "files": {name: file_record(self.folder / name) for name in (part, tokens, stats)},
        }
        write_json(self.folder / f"part-{index:05d}.json", commit)

    def seal(self, n_parts: int, **record: Any) -> None:
        """Write the manifest over parts ``0 … n_parts - 1``, all of which must be committed."""
        commits = [read_json(self.folder / f"part-{i:05d}.json") for i in range(n_parts)]
        files = {name: sums for commit in commits for name, sums in commit["files"].items()}
        seal(
            self.folder,
            KIND,
            FORMAT_VERSION,
            {**files, "config.json": file_record(self.folder / "config.json")},
            n_tokens=sum(commit["rows"] for commit in commits),
            n_studies=sum(commit["studies"] for commit in commits),
            part_rows=[commit["rows"] for commit in commits],
            widths=commits[0]["widths"],
            **record,
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _sums(tensors: Mapping[str, Tensor], roles: Tensor) -> dict[str, Tensor]:
    """Per site and role: count, sum and sum of squared norms, in float64."""
    sums = {}
    for site, values in tensors.items():
        for role in Role:
            chosen = values[roles == int(role)].double()
            key = f"{site}|{role.name.lower()}"
            sums[f"{key}|count"] = torch.tensor(len(chosen))
            sums[f"{key}|sum"] = chosen.sum(0)
            sums[f"{key}|squared"] = chosen.square().sum()
    return sums


class ActivationFolder:
    """A finished activation folder, read through memory maps.

    Raises
    ------
    FolderError
        If the folder is missing, unfinished, damaged, or of another format version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = open_sealed(self.folder, KIND, FORMAT_VERSION, REMEDY)
        self.n_tokens: int = self.manifest["n_tokens"]
        self.sites: list[str] = self.manifest["sites"]
        self._starts = np.concatenate([[0], np.cumsum(self.manifest["part_rows"])])
        self._open: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"ActivationFolder({self.folder}, {self.n_tokens:,} tokens, sites {self.sites})"

    def check_site(self, site: str) -> str:
        """``site`` itself if the folder has it."""
        if site not in self.sites:
            raise FolderError(
                f"{self.folder} has no site {site!r}{nearest(site, self.sites)}; "
                f"it has {self.sites}"
            )
        return site

    def width(self, site: str) -> int:
        """Width ``d`` of a site."""
        return self.manifest["widths"][self.check_site(site)]

    def rows(self, site: str, start: int, stop: int) -> Float[Tensor, "rows d"]:
        """Rows ``start:stop`` of a site, in the dtype on disk."""
        self.check_site(site)
        if not 0 <= start <= stop <= self.n_tokens:
            raise FolderError(f"rows {start}:{stop} are outside 0:{self.n_tokens} of {self.folder}")
        pieces = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for part in range(first, len(self._starts) - 1):
            low, high = int(self._starts[part]), int(self._starts[part + 1])
            if low >= stop:
                break
            piece = self._part(part).get_slice(site)
            pieces.append(piece[max(start, low) - low : min(stop, high) - low])
        if not pieces:
            return torch.empty(0, self.width(site))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _part(self, index: int) -> Any:
        if index not in self._open:
            path = self.folder / _part_files(index)[0]
            self._open[index] = safe_open(path, framework="pt")
        return self._open[index]

    def tokens(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The token table, all parts in order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = [
            pq.read_table(self.folder / _part_files(i)[1], columns=columns)
            for i in range(len(self._starts) - 1)
        ]
        return pa.concat_tables(tables).unify_dictionaries()

    def column(self, name: str) -> np.ndarray:
        """One column of the token table as a plain array ``[n_tokens]``."""
        column = self.tokens([name])[name].combine_chunks()
        if hasattr(column, "dictionary"):
            codes = column.indices.fill_null(0).to_numpy(zero_copy_only=False)
            return np.asarray(column.dictionary.to_pylist(), dtype=object)[codes]
        return column.to_numpy(zero_copy_only=False)

    def heldout(self, fraction: float) -> np.ndarray:
        """Mask ``[n_tokens]`` of the rows whose patient is held out, see :func:`split_of`."""
        patients = self.column("patient")
        sides = {patient: split_of(patient, fraction) == "heldout" for patient in set(patients)}
        return np.fromiter((sides[patient] for patient in patients), dtype=bool)

    def moments(self, site: str, role: Role | None = None) -> Moments:
        """Mean and mean squared norm of a site's rows, of one role or of all."""
        self.check_site(site)
        roles = [role] if role is not None else list(Role)
        count, total, squared = 0, torch.zeros(self.width(site), dtype=torch.float64), 0.0
        for index in range(len(self._starts) - 1):
            sums = load_file(self.folder / _part_files(index)[2])
            for one in roles:
                key = f"{site}|{one.name.lower()}"
                count += int(sums[f"{key}|count"])
                total += sums[f"{key}|sum"]
                squared += float(sums[f"{key}|squared"])
        if count == 0:
            raise FolderError(f"{self.folder} has no rows of role {role and role.name.lower()}")
        return Moments(count, total / count, squared / count)
