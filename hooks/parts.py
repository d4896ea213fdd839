"""Parts of an activation folder: the rows of some studies, as tensors, token table and sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.roles import NONE, Role, Tokens, View

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "activations"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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


def part_files(index: int) -> tuple[str, str, str]:
    """Tensors, token table and sums of part ``index``."""
    return (
        f"part-{index:05d}.safetensors",
        f"tokens-{index:05d}.parquet",
        f"stats-{index:05d}.safetensors",
    )


def token_table(rows: Sequence[StudyRows]) -> pa.Table:
    """A row per kept token, in the order of the tensors' rows."""
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


def role_sums(tensors: Mapping[str, Tensor], roles: np.ndarray) -> dict[str, Tensor]:
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
