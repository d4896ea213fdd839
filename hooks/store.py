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
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8
from safetensors.torch import load_file
from torch import Tensor

from hooks.activation_writer import ActivationWriter
from hooks.files import MANIFEST, FolderError, nearest, open_sealed, verify
from hooks.html import bars, facts
from hooks.parts import DTYPES, FORMAT_VERSION, KIND, SKIPPED, StudyRows, part_files
from hooks.policies import check_roles
from hooks.roles import Role
from hooks.studies import Skipped, split_of
from hooks.tensor_files import read_rows, tensor_layout

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DTYPES", "KIND", "ActivationFolder", "ActivationWriter", "Moments", "StudyRows"]

REMEDY = "run `maira-sae harvest` to make it"


class Moments(NamedTuple):
    """First two moments of a site's rows."""

    count: int
    mean: Float[Tensor, " d"]
    mean_squared_norm: float


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
                read_rows(self.folder / part_files(part)[0], layout, start - low, rows)
                start = high
            part += 1

    def _layout_of(self, part: int) -> Mapping[str, Any]:
        path = self.folder / part_files(part)[0]
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
            pq.read_table(self.folder / part_files(i)[1], columns=columns)
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
            table = pq.read_table(self.folder / part_files(part)[1], columns=[column])
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
            _, tokens, stats = (self.folder / name for name in part_files(part))
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
            sums = load_file(self.folder / part_files(index)[2])
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
