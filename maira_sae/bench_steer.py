"""What steering costs: tokens a second of generation without, with one and with twenty latents."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hooks.files import ConfigError
from hooks.roles import Tokens
from phantom.corpus import grey, normalised
from phantom.model import load
from phantom.study import sample_study
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit, Positions, steered


@dataclass(frozen=True)
class SteerBench:
    """Sizes of the measurement."""

    batch: int = 1
    """Reports written together; one is where fixed costs weigh most."""
    new_tokens: int = 40
    """Of every report, whatever the model would like."""
    rounds: int = 41
    """Turns of each; the order changes from round to round."""
    latents: int = 2048
    """Size of the dictionary, of random weights: an edit's cost does not depend on them."""
    site: str = "llm.3.resid_post"
    threads: int = 1
    """Matrices this small are no faster on more, and slower on busy cores."""

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.latents < 20:
            raise ConfigError(f"{self.latents} latents; twenty are edited, so give 20 or more")

    def quick(self) -> SteerBench:
        """Small enough to check that it runs."""
        return replace(self, new_tokens=4, rounds=1)


@torch.no_grad()
def run(config: SteerBench) -> dict[str, Any]:
    """Median over rounds of each round's ratio to its own unsteered turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _run(config)
    finally:
        torch.set_num_threads(threads)


def _run(config: SteerBench) -> dict[str, Any]:
    model: Any
    model, words = load()
    study = sample_study(0, lateral=False, prior=False)
    report = study.report
    tokens: Tokens = words.tokenize_reporting(
        indication=report.indication, technique=report.technique, comparison=report.comparison
    )
    ids = torch.from_numpy(tokens.ids)[None].repeat(config.batch, 1)
    pixels = normalised(np.stack([grey(film) for film in study.films()] * config.batch), words)
    width = model.config.text_config.hidden_size
    sae = MatryoshkaSAE(SAEConfig(width, config.latents, 8, site=config.site), seed=0).eval()
    edits = [Edit(config.latents // 20 * i, 1.0, 0.01) for i in range(20)]
    length = ids.shape[1]
    known = {"tokens": tokens, "tokenizer": words.tokenizer}
    arms = {
        "unsteered": nullcontext,
        "one": lambda: steered(model, sae, edits[:1]),
        "twenty": lambda: steered(model, sae, edits),
        "one_generated": lambda: steered(model, sae, edits[:1], "generated", length),
        "one_sentence": lambda: steered(model, sae, edits[:1], Positions(sentences=(1,)), **known),
    }

    def seconds(arm: str) -> tuple[float, float]:
        """Wall and processor time of one turn."""
        with arms[arm]():
            began, worked = time.perf_counter(), time.process_time()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                max_new_tokens=config.new_tokens,
                min_new_tokens=config.new_tokens,
                do_sample=False,
            )
            return time.perf_counter() - began, time.process_time() - worked

    names = list(arms)
    for arm in names:
        seconds(arm)
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in names}
    for i in range(config.rounds):
        turn = i % len(names)
        order = names[turn:] + names[:turn]
        for arm in order if i % 2 else reversed(order):
            taken[arm].append(seconds(arm))
    made = config.batch * config.new_tokens
    times = {arm: np.array(values) for arm, values in taken.items()}  # [rounds, 2]
    result: dict[str, Any] = {
        "tokens_per_s": {arm: made / float(np.median(t[:, 0])) for arm, t in times.items()}
    }
    for arm in names[1:]:
        more = times[arm] / times["unsteered"] - 1
        result[f"overhead_{arm}"], result[f"cpu_overhead_{arm}"] = np.median(more, 0).tolist()
        result[f"quartiles_{arm}"] = np.quantile(more[:, 0], (0.25, 0.75)).tolist()
    return {**result, **vars(config)}


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"unsteered           {result['tokens_per_s']['unsteered']:8.1f} tokens/s"]
    for arm, what in (
        ("one", "one latent"),
        ("twenty", "twenty latents"),
        ("one_generated", "one, generated"),
        ("one_sentence", "one, a sentence"),
    ):
        low, high = result[f"quartiles_{arm}"]
        lines.append(
            f"{what:<19} {result['tokens_per_s'][arm]:8.1f} tokens/s   time "
            f"{result[f'overhead_{arm}']:+.1%} (quartiles {low:+.1%} to {high:+.1%}), "
            f"processor {result[f'cpu_overhead_{arm}']:+.1%}"
        )
    return "\n".join(lines)
