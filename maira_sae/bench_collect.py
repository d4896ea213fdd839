"""`maira-sae bench collect`: the collecting pass beside its floor, and beside delphi's cache.

The floor is one read of the rows and one sparse encode. ``pass`` is what collecting adds for each
row: counting, ranking, keeping what fired. ``collect`` is all of it: after the pass it draws and
writes the examples, which costs by the dictionary and not by the rows. delphi's `LatentCache` runs
in the environment of `make peers`, on the same rows, held in memory for it; it makes neither
statistics nor examples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from autointerp.collect import CollectConfig, collect
from autointerp.layout import FolderSource
from autointerp.sweep import BLOCK_ROWS, Encoder, Spool, Sweep, blocks
from hooks.progress import track
from hooks.roles import NONE, Role, Tokens, View
from hooks.store import ActivationFolder, ActivationWriter, StudyRows
from maira_sae.peers import Peer
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.0.resid_post"
PROMPT, SENTENCES = 40, (18, 25, 12, 20)
"""Tokens of a study's prompt, and of the sentences of its report."""
CONTEXT, SEQUENCES, SPLITS = 256, 16, 5
"""Of delphi: its own tokens of a text, and files; texts at once to make a block of ours."""
AT_SCALE = 10_000_000
"""Rows for which the share of the examples is worked out."""


@dataclass(frozen=True)
class CollectBench:
    """Sizes of the made-up rows and dictionary."""

    rows: int = 40_000
    d_model: int = 1024
    latents: int = 16_384
    k: int = 64
    grid: int = 16
    """Patch rows, and columns, of the one film of a study."""
    repeats: int = 3

    def quick(self) -> CollectBench:
        """Small enough for a test."""
        return CollectBench(6000, 32, 64, 4, 4, 1)


def make_folder(out: Path, config: CollectBench) -> ActivationFolder:
    """Studies of one film, a prompt and a report; normal bf16 rows."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    patches = config.grid**2
    text = PROMPT + sum(SENTENCES)
    row, column = np.divmod(np.arange(patches), config.grid)
    none, no_patch = np.full(text, NONE), np.full(patches, NONE)
    role = [int(Role.CLINICAL)] * PROMPT + [int(Role.REPORT)] * sum(SENTENCES)
    sentences = np.repeat(np.arange(len(SENTENCES)), SENTENCES)
    studies = []
    for number in range(max(1, config.rows // (patches + text))):
        tokens = Tokens(
            ids=rng.integers(0, 5000, patches + text),
            role=np.array([int(Role.IMAGE)] * patches + role),
            view=np.concatenate([np.full(patches, int(View.FRONTAL)), none]),
            row=np.concatenate([row, none]),
            column=np.concatenate([column, none]),
            sentence=np.concatenate([no_patch, np.full(PROMPT, NONE), sentences]),
        )
        x = torch.randn(patches + text, config.d_model, generator=generator).bfloat16()
        name, positions = f"s{number}", np.arange(patches + text)
        studies.append(StudyRows(name, name, number, positions, tokens, {SITE: x}))
    writer = ActivationWriter(out, {"bench": asdict(config)})
    writer.write(0, studies, [SITE])
    model = {"id": "random rows", "config_sha256": ""}
    writer.seal(1, sites=[SITE], harvest={"policy": "all"}, model=model)
    return ActivationFolder(out)


def make_dictionary(folder: ActivationFolder, config: CollectBench) -> MatryoshkaSAE:
    """A random dictionary of which ``k`` latents are active a row, by its threshold."""
    sae = MatryoshkaSAE(
        SAEConfig(config.d_model, config.latents, config.k, (config.latents,), site=SITE,
                  policy="all")
    )  # fmt: skip
    x = folder.rows(SITE, 0, min(1024, folder.n_tokens)).float()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = len(x) * config.k
    with torch.no_grad():
        sae.threshold.fill_(float(pre.flatten().topk(kept).values[-1]))
    return sae


def floor(sae: MatryoshkaSAE, folder: ActivationFolder) -> int:
    """Read every row once and encode it once; the number of non-zeros."""
    encoder, count = Encoder(sae), 0
    for start in range(0, folder.n_tokens, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, folder.n_tokens)
        count += encoder(folder.rows(sae.config.site, start, stop)).val.numel()
    return count


def only_pass(sae: MatryoshkaSAE, folder: ActivationFolder, scratch: Path) -> None:
    """Collecting without drawing and writing the examples."""
    with Spool(scratch) as spool, Sweep(sae, CollectConfig(), spool) as run:
        for block in blocks(run.known(FolderSource(folder, sae.config.site))):
            run.add(block)
        run.finish()


def _collect_and_tell(sae: Path, folder: Path, out: Path, told: Queue[int | None]) -> None:
    torch.set_num_threads(1)
    collect(MatryoshkaSAE.from_pretrained(sae), ActivationFolder(folder), None, out)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    told.put(next((int(line.split()[1]) << 10 for line in lines if line[:6] == "VmHWM:"), None))


def peak_bytes(sae: MatryoshkaSAE, folder: ActivationFolder, scratch: Path) -> int | None:
    """Most memory that a process which does nothing but collect holds; ``None`` but on Linux."""
    sae.save(scratch / "sae", {})
    context = get_context("spawn")
    told = context.Queue()
    paths = (scratch / "sae", folder.folder, scratch / "features" / "alone")
    child = context.Process(target=_collect_and_tell, args=(*paths, told))
    child.start()
    peak = told.get()
    child.join()
    return peak


def bench_collect(
    sae: MatryoshkaSAE, folder: ActivationFolder, repeats: int, peers_python: Path, scratch: Path
) -> dict[str, Any]:
    """Each in turn, ``repeats`` times; medians, and medians of the ratios within a turn."""
    weights: dict[str, torch.Tensor] = {
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold.expand(sae.config.n_latents),
    }
    save_file({k: v.detach().contiguous() for k, v in weights.items()}, scratch / "w.safetensors")
    settings = {
        "weights": str(scratch / "w.safetensors"),
        "parts": [str(path) for path in sorted(folder.folder.glob("part-*.safetensors"))],
        "site": sae.config.site,
        "context": CONTEXT,
        "sequences": min(SEQUENCES, folder.n_tokens // CONTEXT),
        "splits": SPLITS,
        "out": str(scratch / "delphi"),
        "threads": torch.get_num_threads(),
    }
    made = scratch / "features"
    ways: dict[str, Callable[[int], object]] = {
        "floor": lambda _: floor(sae, folder),
        "pass": lambda _: only_pass(sae, folder, scratch),
        "collect": lambda turn: collect(sae, folder, None, made / str(turn)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    theirs: list[float] = []
    peer = Peer(peers_python, "collect", settings)
    try:
        for turn in track(range(-1, repeats), "bench collect", total=repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(turn)
                # The first turn brings files and modules into memory.
                seconds[name] += [time.perf_counter() - start] if turn >= 0 else []
            answer = peer.ask() if turn >= 0 else None
            theirs += [answer["rows"] / answer["seconds"]] if answer else []
    finally:
        peer.close()
    middle = {name: median(found) for name, found in seconds.items()}
    over = {
        name: float(np.median(np.divide(seconds[name], seconds["floor"])))
        for name in ("pass", "collect")
    }
    after = max(0.0, middle["collect"] - middle["pass"])
    at_scale = middle["floor"] * AT_SCALE / folder.n_tokens
    ours = folder.n_tokens / middle["collect"]
    manifest = made / "0" / "examples.parquet"
    return {
        "rows": folder.n_tokens,
        "d_model": sae.config.d_model,
        "n_latents": sae.config.n_latents,
        "active_a_row": round(floor(sae, folder) / folder.n_tokens, 1),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in middle.items()},
        "pass_over_floor": round(over["pass"], 3),
        "collect_over_floor": round(over["collect"], 3),
        "example_bytes": manifest.stat().st_size,
        "collect_over_floor_at_scale": round(over["pass"] + after / at_scale, 3),
        "peak_bytes": peak_bytes(sae, folder, scratch),
        "rows_per_s": round(ours),
        "delphi_rows_per_s": round(median(theirs)) if theirs else None,
        "delphi_ratio": round(ours / median(theirs), 2) if theirs else None,
        "delphi_reason": peer.reason,
    }


def run(
    config: CollectBench, sae_folder: Path | None, activations: Path | None, peers_python: Path
) -> dict[str, Any]:
    """The measurement on given folders, or on made-up ones."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if activations is None or sae_folder is None:
            folder = make_folder(scratch / "acts", config)
            sae = make_dictionary(folder, config)
        else:
            folder = ActivationFolder(activations)
            sae = MatryoshkaSAE.from_pretrained(sae_folder)
        return bench_collect(sae, folder, config.repeats, peers_python, scratch)


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    seconds = result["seconds"]
    lines = [
        f"{result['rows']:,} rows of width {result['d_model']:,}, {result['n_latents']:,} latents, "
        f"{result['active_a_row']} active a row, {result['threads']} threads",
        f"floor    {seconds['floor']:8.2f} s  one read and one encode",
        f"pass     {seconds['pass']:8.2f} s  {result['pass_over_floor']:.2f}× the floor",
        f"collect  {seconds['collect']:8.2f} s  {result['collect_over_floor']:.2f}× the floor; "
        f"worked out for {AT_SCALE:,} rows {result['collect_over_floor_at_scale']:.2f}×",
    ]
    if result["peak_bytes"] is not None:
        lines.append(f"memory   {result['peak_bytes'] / 2**20:8,.0f} MiB at most, alone")
    if result["delphi_reason"]:
        lines.append(f"delphi did not run: {result['delphi_reason']}")
    else:
        lines.append(
            f"delphi   {result['delphi_rows_per_s']:,} rows/s for its cache alone, collect "
            f"{result['rows_per_s']:,}: {result['delphi_ratio']:.2f}×"
        )
    return "\n".join(lines)
