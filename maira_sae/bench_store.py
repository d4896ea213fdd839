"""`maira-sae bench store`: reading an activation folder beside plain reading of the same bytes.

Three ways take turns over one folder: ``readinto`` through its files from end to end, row ranges in
order, and shuffled training batches (:class:`sae.stream.FolderRows`) as float32. Each once with the
page cache dropped, when the disk decides, and once with the files in memory, when copies do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hooks.progress import track
from hooks.roles import NONE, Role, Tokens
from hooks.store import ActivationFolder, ActivationWriter, StudyRows
from maira_sae.peers import Peer
from sae.mixing import mixing
from sae.stream import BUFFER_ROWS, FolderRows

SITE = "llm.0.resid_post"
PART_STUDIES = 64
BLOCK = 16 << 20
"""Bytes of one plain read."""


@dataclass(frozen=True)
class StoreBench:
    """Sizes of the measurement."""

    rows: int = 1 << 19
    d_model: int = 512
    rows_per_study: int = 150
    batch: int = 4096
    buffer_rows: int = BUFFER_ROWS
    rounds: int = 3
    threads: int = 2

    def quick(self) -> StoreBench:
        """Small enough for a test."""
        return StoreBench(20_000, 32, 40, 256, 8192, 1, self.threads)


def make_folder(out: Path, config: StoreBench) -> ActivationFolder:
    """A folder of normal bf16 rows, in studies of about equal length."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    writer = ActivationWriter(out, {"bench": asdict(config)})
    made = part = study = 0
    while made < config.rows:
        rows = []
        while made < config.rows and len(rows) < PART_STUDIES:
            n = int(rng.integers(config.rows_per_study // 2, config.rows_per_study * 3 // 2))
            n = min(n, config.rows - made)
            none = np.full(n, NONE)
            report = np.full(n, int(Role.REPORT))
            x = torch.randn(n, config.d_model, generator=generator).bfloat16()
            tokens = Tokens(np.zeros(n, dtype=np.int64), report, none, none, none, none)
            name = f"s{study}"
            rows.append(StudyRows(name, name, study, np.arange(n), tokens, {SITE: x}))
            made, study = made + n, study + 1
        writer.write(part, rows, [SITE])
        part += 1
    writer.seal(
        part,
        sites=[SITE],
        harvest={"policy": "report"},
        model={"id": "random rows", "config_sha256": ""},
    )
    return ActivationFolder(out)


def drop_cache(folder: Path) -> bool:
    """Ask the system to forget a folder's files; whether it knows how."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("part-*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def plain(folder: ActivationFolder) -> int:
    """Read the tensor files from end to end into one block of memory."""
    block = memoryview(bytearray(BLOCK))
    read = 0
    for path in sorted(folder.folder.glob("part-*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(block):
                read += got
    return read


def sequential(folder: ActivationFolder, site: str) -> int:
    """Read all rows in order, in ranges of about a block, in the dtype on disk."""
    row = folder.width(site) * folder.dtype(site).itemsize
    step = max(1, BLOCK // row)
    out = torch.empty(min(step, folder.n_tokens), folder.width(site), dtype=folder.dtype(site))
    for start in range(0, folder.n_tokens, step):
        stop = min(start + step, folder.n_tokens)
        folder.read_into(site, start, out[: stop - start])
    return folder.n_tokens * row


class Shuffled:
    """Training batches in their steady state: one stream goes on from turn to turn.

    A turn begins with a buffer in memory that was read before it, and ends having read one that
    the next turn takes.
    """

    def __init__(self, folder: ActivationFolder, site: str, config: StoreBench) -> None:
        self.rows = FolderRows(folder, heldout=0, buffer_rows=config.buffer_rows)
        self._row = folder.width(site) * folder.dtype(site).itemsize
        self._batch = config.batch
        self._batches = self.rows.batches([site], config.batch, 0, {})
        self.turn()  # touches both buffers

    def turn(self) -> int:
        """Take the batches of two epochs."""
        count = max(1, 2 * self.rows.n_training // self._batch)
        for _ in range(count):
            next(self._batches)
        return count * self._batch * self._row


def run(
    folder: ActivationFolder, config: StoreBench, peers_python: Path, scratch: Path
) -> dict[str, Any]:
    """Figures of one folder; ratios are medians over rounds of turns."""
    site = folder.sites[0]
    batches = Shuffled(folder, site, config)
    ways: dict[str, Callable[[], int]] = {
        "plain": lambda: plain(folder),
        "sequential": lambda: sequential(folder, site),
        "shuffled": batches.turn,
    }
    settings = {
        "rows": folder.n_tokens,
        "d_model": folder.width(site),
        "context": 64,
        "batch": config.batch,
        "buffer_rows": min(config.buffer_rows, folder.n_tokens // 4),
        "threads": config.threads,
        "folder": str(scratch / "sae-lens"),
    }
    peer = Peer(peers_python, "store", settings)
    rates: dict[str, dict[str, list[float]]] = {state: {} for state in ("cold", "warm")}
    theirs: dict[str, list[float]] = {"cold": [], "warm": []}
    try:
        for _ in track(range(config.rounds), "bench store", total=config.rounds):
            for state, found in rates.items():
                for name, way in ways.items():
                    if state == "cold" and not drop_cache(folder.folder):
                        continue
                    began = time.perf_counter()
                    size = way()
                    rate = size / (time.perf_counter() - began)
                    found.setdefault(name, []).append(rate)
            answer = peer.ask()
            for state, one in (answer or {}).items():
                theirs[state].append(one["rows"] / one["seconds"])
    finally:
        peer.close()
    row = folder.width(site) * folder.dtype(site).itemsize
    result: dict[str, Any] = {}
    for state, found in rates.items():
        if not found:
            continue
        ratio = {
            name: median(a / b for a, b in zip(found[name], found["plain"], strict=True))
            for name in ("sequential", "shuffled")
        }
        ours = median(found["shuffled"]) / row
        result[state] = {
            "mb_per_s": {name: round(median(values) / 1e6) for name, values in found.items()},
            "sequential_ratio": round(ratio["sequential"], 3),
            "shuffled_ratio": round(ratio["shuffled"], 3),
            "shuffled_rows_per_s": round(ours),
            "sae_lens_rows_per_s": round(median(theirs[state])) if theirs[state] else None,
            "sae_lens_ratio": round(ours / median(theirs[state]), 2) if theirs[state] else None,
        }
    mixed = mixing(batches.rows, config.batch)
    headline = result.get("cold", result["warm"])
    keys = ("sequential_ratio", "shuffled_ratio", "sae_lens_ratio")
    return {
        **{key: headline[key] for key in keys},
        "sae_lens_reason": peer.reason,
        "batch_entropy": round(mixed.ratio, 4),
        "coverage": round(mixed.coverage, 4),
        "entropy_nats": round(mixed.entropy, 4),
        "ideal_entropy_nats": round(mixed.ideal, 4),
        **result,
        "config": {**asdict(config), "rows": folder.n_tokens, "d_model": folder.width(site)},
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for state in ("cold", "warm"):
        if state in result:
            one = result[state]
            speed = one["mb_per_s"]
            lines.append(
                f"{state}: plain {speed['plain']:,} MB/s, in order {speed['sequential']:,} "
                f"({one['sequential_ratio']:.2f}), shuffled {speed['shuffled']:,} "
                f"({one['shuffled_ratio']:.2f}), {one['shuffled_rows_per_s']:,} rows/s"
            )
            if one["sae_lens_ratio"] is not None:
                lines.append(
                    f"      SAELens {one['sae_lens_rows_per_s']:,} rows/s (float32, as it stores "
                    f"them); ours is {one['sae_lens_ratio']:.2f}×"
                )
    if result["sae_lens_reason"]:
        lines.append(f"SAELens did not run: {result['sae_lens_reason']}")
    lines.append(
        f"entropy over studies {result['entropy_nats']:.3f} of {result['ideal_entropy_nats']:.3f} "
        f"nats ({result['batch_entropy']:.3f}), coverage {result['coverage']:.3f}"
    )
    return "\n".join(lines)
