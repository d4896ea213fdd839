"""`maira-sae bench harvest`: a harvest beside bare forward passes on the same batches.

*Bare* is the model alone: inputs are in memory before the clock starts, the pass leaves after the
same last layer, and nothing is kept; once with all threads in one pass, as a plain loop has it, and
once with as many passes at a time as the harvest makes. *Harvest* is everything: films and text are
read, activations chosen, copied, written, checksummed and sealed. They take turns.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors.torch import save_file

from hooks.progress import track
from hooks.sites import capture, resolve_sites
from hooks.streams import in_threads, shared_cores
from maira_sae.harvest_subjects import Subject
from maira_sae.peers import Peer


@dataclass(frozen=True)
class HarvestBench:
    """Sizes of the measurement."""

    rounds: int = 5
    threads: int = 2
    context: int = 128
    """Tokens of a sequence for SAELens, which has one context size."""


def bare(subject: Subject, batches: Sequence[dict[str, Any]], streams: int = 1) -> float:
    """Seconds of forward passes up to the last site, so many of them at a time."""
    sites = resolve_sites(subject.model, [subject.site])

    @torch.no_grad()
    def passes(share: Sequence[dict[str, Any]]) -> None:
        with capture(sites) as run:
            for inputs in share:
                run(subject.forward, **inputs, use_cache=False)

    began = time.perf_counter()
    if streams == 1:
        passes(batches)
    else:
        with shared_cores(streams):
            for _ in in_threads(batches, lambda inputs: passes([inputs]), streams):
                pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run(subject: Subject, config: HarvestBench, folder: Path, peers_python: Path) -> dict[str, Any]:
    """Figures in whole prompts' tokens a second, medians over rounds of turns."""
    batches = subject.inputs()
    peer = _sae_lens(subject, config, folder, peers_python)
    streams = subject.job(folder / "unused").streams
    seconds: dict[str, list[float]] = {"bare": [], "bare_streams": [], "harvest": []}
    theirs: list[float] = []
    out = folder / "acts"

    def turn(name: str) -> float:
        if name != "harvest":
            return bare(subject, batches, streams if name == "bare_streams" else 1)
        shutil.rmtree(out, ignore_errors=True)
        job = subject.job(out)
        began = time.perf_counter()
        job.run()
        return time.perf_counter() - began

    bare(subject, batches)  # warm
    order = list(seconds)
    try:
        for number in track(range(config.rounds), "bench harvest", total=config.rounds):
            for name in order if number % 2 else reversed(order):
                seconds[name].append(turn(name))
            if (answer := peer.ask()) is not None:
                theirs.append(answer["seconds"] / answer["tokens"])
    finally:
        peer.close()
    own = {name: round(subject.tokens / median(found)) for name, found in seconds.items()}
    return {
        **{f"{name}_tokens_per_s": rate for name, rate in own.items()},
        "ratio": _ratio(seconds["bare"], seconds["harvest"]),
        "best_ratio": round(min(seconds["bare"]) / min(seconds["harvest"]), 3),
        "ratio_streams": _ratio(seconds["bare_streams"], seconds["harvest"]),
        "sae_lens_tokens_per_s": round(1 / median(theirs)) if theirs else None,
        "sae_lens_ratio": (
            _ratio([one * subject.tokens for one in theirs], seconds["harvest"]) if theirs else None
        ),
        "sae_lens_reason": peer.reason,
        "model": subject.name,
        "site": subject.site,
        "tokens": subject.tokens,
        "streams": streams,
        "config": {**asdict(config), **asdict(subject.config)},
    }


def _ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the others' seconds over ours."""
    return round(median(a / b for a, b in zip(others, ours, strict=True)), 3)


def memory(subject: Subject, folder: Path, tokens: int) -> dict[str, Any]:
    """Resident memory of a harvest of at least ``tokens`` tokens, read twice a second (Linux).

    The inputs are repeated under other names. *Early* is the mean over the second tenth of the
    time, or over minute one to two of a run of more than three minutes; *late* that over the last
    tenth. MB are 10^6 bytes.
    """
    repeats = -(-tokens // subject.tokens)
    job = subject.job(folder / "memory", repeats)
    seen: list[tuple[float, float]] = []
    done = threading.Event()
    began = time.perf_counter()

    def watch() -> None:
        while not done.wait(0.5):
            seen.append((time.perf_counter() - began, _resident()))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        job.run()
    finally:
        done.set()
        watching.join()
    took = time.perf_counter() - began
    first, last = (60.0, 120.0) if took > 180 else (took / 10, took / 5)
    early = mean(mb for at, mb in seen if first <= at <= last)
    late = mean(mb for at, mb in seen if at >= 0.9 * took)
    return {
        "tokens": subject.tokens * repeats,
        "seconds": round(took, 1),
        "early_mb": round(early, 1),
        "late_mb": round(late, 1),
        "peak_mb": round(max(mb for _, mb in seen), 1),
        "growth": round(late / early - 1, 4),
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _sae_lens(subject: Subject, config: HarvestBench, folder: Path, peers_python: Path) -> Peer:
    """SAELens reads no films: it gets the text tower and the prompts' words, end to end."""
    tower = folder / "text-tower"
    text, tokenizer = subject.text_tower()
    text.save_pretrained(tower)
    tokenizer.save_pretrained(tower)
    joined = torch.cat([torch.from_numpy(ids) for ids in subject.words])
    save_file({"words": joined}, folder / "words.safetensors")
    settings = {
        "model": str(tower),
        "tokens": str(folder / "words.safetensors"),
        "layer": int(subject.site.split(".")[1]),
        "d_model": text.config.hidden_size,
        "batch_tokens": subject.config.tokens_on(subject.model.device),
        "context": config.context,
        "threads": config.threads,
        "out": str(folder / "sae-lens"),
    }
    return Peer(peers_python, "harvest", settings)


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['model']}, {result['site']}: bare {result['bare_tokens_per_s']:,} tokens/s, "
        f"harvest {result['harvest_tokens_per_s']:,} ({result['ratio']:.3f} of bare; best of each "
        f"{result['best_ratio']:.3f})",
        f"bare, {result['streams']} passes at a time: {result['bare_streams_tokens_per_s']:,} "
        f"tokens/s (harvest {result['ratio_streams']:.3f} of it)",
    ]
    if result["sae_lens_tokens_per_s"] is None:
        lines.append(f"SAELens did not run: {result['sae_lens_reason']}")
    else:
        lines.append(
            f"SAELens, text alone: {result['sae_lens_tokens_per_s']:,} tokens/s "
            f"(harvest {result['sae_lens_ratio']:.2f}×)"
        )
    if (grown := result.get("memory")) is not None:
        lines.append(
            f"resident memory over {grown['tokens']:,} tokens in {grown['seconds']:,.0f} s: "
            f"{grown['early_mb']:,.0f} MB early, {grown['late_mb']:,.0f} MB at the end "
            f"({grown['growth']:+.1%})"
        )
    return "\n".join(lines)
