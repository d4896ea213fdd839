"""The activation folder: residual streams on disk, with a row of the token table per token.

Part *i* is three files or four, and ``part-{i}.json`` written after them commits it:

``part-{i}.safetensors``
    one tensor ``[rows, d]`` per site, the same rows in the same order
``tokens-{i}.parquet``
    one table row per tensor row
``stats-{i}.safetensors``
    float64 sums per site and role, from which means and norms follow

``generations-{i}.jsonl``
    only where the model wrote the reports itself, see :mod:`hooks.generation`

``manifest.json`` seals the folder after the last part. ``skipped.jsonl``, if there is one, names
the studies that could not be read, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.files import (
    MANIFEST,
    FolderError,
    atomic_path,
    file_record,
    is_sealed,
    nearest,
    open_sealed,
    read_json,
    seal,
    verify,
    write_json,
)
from hooks.html import bars, facts
from hooks.policies import check_roles
from hooks.roles import NONE, Role, Tokens, View
from hooks.studies import Skipped, split_of
from hooks.tensor_files import read_rows, tensor_layout

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "activations"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REMEDY = "run `maira-sae harvest` to make it"
SKIPPED = "skipped.jsonl"


class StudyRows(NamedTuple):
    """Kept tokens of one study and their activations ``[rows, d]`` by site."""

    study: str
    patient: str
    sequence: int
    positions: np.ndarray
    tokens: Tokens
    activations: Mapping[str, Tensor]
    loss: np.ndarray | None = None
    """Cross-entropy of each token, NaN where it is not known."""
    generation: Mapping[str, Any] | None = None
    """What the model wrote, where the report is its own."""


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
            "loss": _losses(rows),
        }
    )


def _losses(rows: Sequence[StudyRows]) -> pa.Array:
    """Null where the forward pass stopped before the language-model head."""
    import pyarrow as pa

    unknown = [np.full(len(study.tokens), np.nan) for study in rows]
    given = [
        u if study.loss is None else study.loss for study, u in zip(rows, unknown, strict=True)
    ]
    losses = np.concatenate(given).astype(np.float32)
    return pa.array(losses, type=pa.float32(), mask=np.isnan(losses))


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
            kind = read_json(folder / MANIFEST).get("kind") if is_sealed(folder) else KIND
            if kind != KIND:
                raise FolderError(f"{folder} holds {kind!r}, not a harvest; give a new folder")
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
        part, tokens, stats = _part_files(index)
        with atomic_path(self.folder / part) as temporary:
            save_file(tensors, temporary)
        with atomic_path(self.folder / tokens) as temporary:
            pq.write_table(_table(rows), temporary)
        with atomic_path(self.folder / stats) as temporary:
            save_file(_sums(tensors, roles), temporary)
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
        stems = {Path(name).stem for part in parts for name in _part_files(part)}
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


def _sums(tensors: Mapping[str, Tensor], roles: np.ndarray) -> dict[str, Tensor]:
    """Per site and role: count, sum and sum of squared norms, in float64."""
    sums = {}
    for site, values in tensors.items():
        for role in Role:
            chosen = values[torch.from_numpy(np.flatnonzero(roles == int(role)))]
            # numpy, because a writer thread must not start a torch thread pool of its own.
            exact = chosen.float().numpy().astype(np.float64)
            key = f"{site}|{role.name.lower()}"
            sums[f"{key}|count"] = torch.tensor(len(chosen))
            sums[f"{key}|sum"] = torch.from_numpy(exact.sum(axis=0))
            sums[f"{key}|squared"] = torch.tensor(np.square(exact).sum())
    return sums


class ActivationFolder:
    """A finished activation folder. Row ranges are read straight into tensors, part by part.

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
        self._layout = lru_cache(maxsize=None)(self._layout_of)

    def __repr__(self) -> str:
        return f"ActivationFolder({self.folder}, {self.n_tokens:,} tokens, sites {self.sites})"

    def _repr_html_(self) -> str:
        names, counts = np.unique(self.column("role"), return_counts=True)
        shown = {
            "folder": self.folder,
            "model": self.manifest.get("model", {}).get("id"),
            "policy": self.policy,
            "studies": self.manifest.get("n_studies"),
            "skipped": self.manifest.get("n_skipped") or None,
            "tokens": self.n_tokens,
            "sites": [f"{site} ({self.width(site)} wide)" for site in self.sites],
        }
        return facts("Activations", shown) + bars(counts.tolist(), names.tolist(), "tokens by role")

    @property
    def policy(self) -> str:
        """Key of :data:`hooks.policies.POLICIES`; empty where the folder does not say it."""
        return self.manifest.get("harvest", {}).get("policy", "")

    def check_trained(self, policy: str) -> None:
        """Warn of, or refuse, tokens on which a dictionary of that policy was not trained.

        See :func:`hooks.policies.check_roles`.
        """
        check_roles(policy, self.policy, str(self.folder))

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
        out = torch.empty(stop - start, self.width(site), dtype=self.dtype(site))
        self.read_into(site, start, out)
        return out

    def dtype(self, site: str) -> torch.dtype:
        """Dtype of a site on disk."""
        return self._layout(0)[self.check_site(site)].dtype

    def read_into(self, site: str, start: int, out: Float[Tensor, "rows d"]) -> None:
        """Read rows from ``start`` on into ``out``, contiguous and of the dtype on disk.

        Threads may read at the same time.
        """
        stop = start + len(out)
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            low, high = int(self._starts[part]), min(int(self._starts[part + 1]), stop)
            if high > start:
                rows = out[start + len(out) - stop : high + len(out) - stop]
                layout = self._layout(part)[site]
                read_rows(self.folder / _part_files(part)[0], layout, start - low, rows)
                start = high
            part += 1

    def _layout_of(self, part: int) -> Mapping[str, Any]:
        path = self.folder / _part_files(part)[0]
        layout = tensor_layout(path)
        for site in self.sites:
            want = (self.manifest["part_rows"][part], self.manifest["widths"][site])
            found = layout[site].shape if site in layout else None
            if found != want:
                raise FolderError(
                    f"{path} holds {found} for {site}, the manifest says {want}; delete "
                    f"{self.folder} and {REMEDY}"
                )
        return layout

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

    def roles(self) -> Int8[np.ndarray, " n_tokens"]:
        """:class:`hooks.roles.Role` of each row."""
        return self._by_name("role", lambda name: int(Role[name.upper()]), np.int8)

    def heldout(self, fraction: float) -> Bool[np.ndarray, " n_tokens"]:
        """Mask of the rows whose patient is held out, see :func:`split_of`."""
        return self._by_name("patient", lambda p: split_of(p, fraction) == "heldout", np.bool_)

    def _by_name(self, column: str, value: Any, dtype: Any) -> np.ndarray:
        """``value(name)`` of a column of names, asked once for each name of a part."""
        import pyarrow.parquet as pq

        pieces = [np.zeros(0, dtype=dtype)]
        for part in range(len(self._starts) - 1):
            table = pq.read_table(self.folder / _part_files(part)[1], columns=[column])
            for chunk in table[column].chunks:
                names = np.array([value(name) for name in chunk.dictionary.to_pylist()], dtype)
                pieces.append(names[chunk.indices.to_numpy(zero_copy_only=False)])
        return np.concatenate(pieces)

    def skipped(self) -> list[Skipped]:
        """Studies that could not be read, in their order."""
        if not self.manifest.get("n_skipped"):
            return []
        lines = (self.folder / SKIPPED).read_text().splitlines()
        return [Skipped(**json.loads(line)) for line in lines]

    def verify(self) -> int:
        """Compare checksums, then row counts of tensors, token table and sums, part by part.

        Returns
        -------
        int
            The number of files checked.

        Raises
        ------
        FolderError
            At the first file that differs from what the manifest says.
        """
        import pyarrow.parquet as pq

        count = verify(self.folder)
        studies = 0
        for part, rows in enumerate(self.manifest["part_rows"]):
            self._layout(part)
            _, tokens, stats = (self.folder / name for name in _part_files(part))
            found = pq.read_metadata(tokens).num_rows
            if found != rows:
                _wrong_rows(tokens, found, rows)
            sums = load_file(stats)
            for site in self.sites:
                found = sum(int(sums[f"{site}|{role.name.lower()}|count"]) for role in Role)
                if found != rows:
                    _wrong_rows(stats, found, rows)
            names = pq.read_table(tokens, columns=["sequence"])["sequence"]
            studies += len(names.unique())
        if sum(self.manifest["part_rows"]) != self.n_tokens:
            _wrong_rows(self.folder / MANIFEST, self.n_tokens, sum(self.manifest["part_rows"]))
        if studies > self.manifest["n_studies"]:
            raise FolderError(
                f"{self.folder} has rows of {studies} studies, its manifest says "
                f"{self.manifest['n_studies']}; delete the folder and {REMEDY}"
            )
        return count

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


def _wrong_rows(path: Path, found: int, want: int) -> NoReturn:
    raise FolderError(
        f"{path} has {found} rows, its part has {want}; delete {path.parent} and {REMEDY}"
    )
