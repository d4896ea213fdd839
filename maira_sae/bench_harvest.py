"""`maira-sae bench harvest`: a harvest beside bare forward passes on the same batches.

*Bare* is the model alone: inputs are in memory before the clock starts, the pass leaves after the
same last layer, and nothing is kept. *Harvest* is everything: films and text are read, activations
chosen, copied, written, checksummed and sealed. They take turns of one part's studies.
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

from hooks.harvest import Harvest, HarvestConfig
from hooks.processor import Maira2Processor
from hooks.progress import track
from hooks.prompts import Prompt, PromptRunner
from hooks.roles import Role
from hooks.sites import Site, capture, resolve_sites
from hooks.studies import Study
from maira_sae.peers import Peer


@dataclass(frozen=True)
class HarvestBench:
    """Sizes of the measurement."""

    studies: int = 256
    """Studies of a turn, in parts of 64."""
    rounds: int = 5
    policy: str = "published"
    batch_tokens: int = 8192
    threads: int = 2
    context: int = 128
    """Tokens of a sequence for SAELens, which has one context size."""


@torch.no_grad()
def bare(runner: PromptRunner, sites: Sequence[Site], batches: Sequence[dict[str, Any]]) -> float:
    """Seconds of forward passes up to the last site."""
    with capture(sites[-1:]) as run:
        began = time.perf_counter()
        for inputs in batches:
            run(runner.model.model, **inputs, use_cache=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def prepared(runner: PromptRunner, prompts: Sequence[Prompt], size: int) -> list[dict[str, Any]]:
    """Inputs of the batches that a harvest in parts of ``size`` studies makes."""
    return [
        runner.inputs(batch)
        for first in range(0, len(prompts), size)
        for batch in runner.batches(prompts[first : first + size])
    ]


def run(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    site: str,
    config: HarvestBench,
    folder: Path,
    peers_python: Path,
) -> dict[str, Any]:
    """Figures in whole prompts' tokens a second, medians over rounds of turns."""
    taken = HarvestConfig((site,), config.policy, batch_tokens=config.batch_tokens)
    runner = PromptRunner(model, processor, config.batch_tokens)
    sites = resolve_sites(model, [site])
    prompts = [runner.prompt(i, study) for i, study in enumerate(studies)]
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    batches = prepared(runner, prompts, taken.studies_per_part)
    peer = _sae_lens(model, processor, prompts, site, config, folder, peers_python)
    seconds: dict[str, list[float]] = {"bare": [], "harvest": [], "sae_lens": []}
    bare(runner, sites, batches)  # warm
    try:
        for number in track(range(config.rounds), "bench harvest", total=config.rounds):
            out = folder / "acts"
            for turn in ("bare", "harvest") if number % 2 else ("harvest", "bare"):
                if turn == "bare":
                    seconds["bare"].append(bare(runner, sites, batches))
                    continue
                shutil.rmtree(out, ignore_errors=True)
                job = Harvest(model, processor, studies, taken, out, strict=True)
                began = time.perf_counter()
                job.run()
                seconds["harvest"].append(time.perf_counter() - began)
            if (answer := peer.ask()) is not None:
                seconds["sae_lens"].append(answer["seconds"] / answer["tokens"])
    finally:
        peer.close()
    ratio = median(b / h for b, h in zip(seconds["bare"], seconds["harvest"], strict=True))
    theirs = seconds["sae_lens"]
    return {
        "bare_tokens_per_s": round(tokens / median(seconds["bare"])),
        "harvest_tokens_per_s": round(tokens / median(seconds["harvest"])),
        "ratio": round(ratio, 3),
        "best_ratio": round(min(seconds["bare"]) / min(seconds["harvest"]), 3),
        "sae_lens_tokens_per_s": round(1 / median(theirs)) if theirs else None,
        "sae_lens_reason": peer.reason,
        "model": str(model.config._name_or_path),
        "site": site,
        "tokens": tokens,
        "config": asdict(config),
    }


def memory(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    site: str,
    config: HarvestBench,
    folder: Path,
    tokens: int,
) -> dict[str, Any]:
    """Resident memory of a harvest of at least ``tokens`` tokens, read twice a second (Linux).

    The studies are repeated under other names. *Early* is the mean over the second tenth of the
    time, or over minute one to two of a run of more than four minutes; *late* that over the last
    tenth. MB are 10^6 bytes.
    """
    runner = PromptRunner(model, processor, config.batch_tokens)
    once = sum(len(runner.prompt(i, study).tokens) for i, study in enumerate(studies))
    repeats = -(-tokens // once)
    many = [s.model_copy(update={"id": f"{s.id}-{k}"}) for k in range(repeats) for s in studies]
    taken = HarvestConfig((site,), config.policy, batch_tokens=config.batch_tokens)
    job = Harvest(model, processor, many, taken, folder / "memory", strict=True)
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
    first, last = (60.0, 120.0) if took > 240 else (took / 10, took / 5)
    early = mean(mb for at, mb in seen if first <= at <= last)
    late = mean(mb for at, mb in seen if at >= 0.9 * took)
    return {
        "tokens": once * repeats,
        "seconds": round(took, 1),
        "early_mb": round(early, 1),
        "late_mb": round(late, 1),
        "peak_mb": round(max(mb for _, mb in seen), 1),
        "growth": round(late / early - 1, 4),
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _sae_lens(
    model: Any,
    processor: Maira2Processor,
    prompts: Sequence[Prompt],
    site: str,
    config: HarvestBench,
    folder: Path,
    peers_python: Path,
) -> Peer:
    """SAELens reads no films: it gets the text tower and the prompts' words, end to end."""
    from transformers import LlamaForCausalLM

    tower = folder / "text-tower"
    text = LlamaForCausalLM(model.config.text_config).to(model.dtype)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(tower)
    processor.tokenizer.save_pretrained(tower)
    words = [prompt.tokens.ids[~prompt.tokens.of_role(Role.IMAGE)] for prompt in prompts]
    joined = torch.cat([torch.from_numpy(ids) for ids in words])
    save_file({"words": joined}, folder / "words.safetensors")
    settings = {
        "model": str(tower),
        "tokens": str(folder / "words.safetensors"),
        "layer": int(site.split(".")[1]),
        "d_model": model.config.text_config.hidden_size,
        "batch_tokens": config.batch_tokens,
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
        f"{result['best_ratio']:.3f})"
    ]
    if result["sae_lens_tokens_per_s"] is None:
        lines.append(f"SAELens did not run: {result['sae_lens_reason']}")
    else:
        lines.append(f"SAELens, text tower alone: {result['sae_lens_tokens_per_s']:,} tokens/s")
    if (grown := result.get("memory")) is not None:
        lines.append(
            f"resident memory over {grown['tokens']:,} tokens: {grown['early_mb']:,.0f} MB early, "
            f"{grown['late_mb']:,.0f} MB at the end ({grown['growth']:+.1%})"
        )
    return "\n".join(lines)
