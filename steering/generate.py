"""Reports generated while latents are turned up or down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hooks.files import ConfigError, nearest
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.sites import resolve_site, rewrite, text_tower
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit, apply_edits, check_edits

Where = Literal["all", "prompt", "generated"]


@contextmanager
def steered(
    model: Any,
    sae: MatryoshkaSAE,
    edits: Sequence[Edit],
    where: Where = "all",
    prompt_length: int = 0,
) -> Iterator[None]:
    """While open, every forward pass of ``model`` applies ``edits`` at the SAE's site.

    Positions are absolute, counted from the start of the prompt whether or not the key-value
    cache holds the earlier ones, so generation with and without the cache is the same.

    Parameters
    ----------
    where
        ``all`` positions, the ``prompt`` (before ``prompt_length``), or what is ``generated``.
    """
    if where not in get_args(Where):
        raise ConfigError(
            f"unknown position {where!r}{nearest(where, get_args(Where))}; choose from "
            f"{list(get_args(Where))}"
        )
    check_edits(sae, edits)
    site = resolve_site(model, sae.config.site)
    sae = sae.to(model.device)
    start = 0

    def find_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal start
        cache = kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0

    def change(value: Tensor) -> Tensor:
        if not edits:
            return value
        low, high = 0, value.shape[1]
        if where == "prompt":
            high = min(high, max(0, prompt_length - start))
        elif where == "generated":
            low = max(0, prompt_length - start)
        if low >= high:
            return value
        edited = apply_edits(sae, edits, value[:, low:high])
        return torch.cat([value[:, :low], edited, value[:, high:]], dim=1)

    handle = text_tower(model).register_forward_pre_hook(find_start, with_kwargs=True)
    try:
        with rewrite(site, change):
            yield
    finally:
        handle.remove()


class Comparison(NamedTuple):
    """A report without and with edits, under the same greedy decoding."""

    before: str
    after: str


@torch.no_grad()
def compare(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    sae: MatryoshkaSAE,
    edits: Sequence[Edit],
    *,
    where: Where = "all",
    opening: str = "",
    max_new_tokens: int = 300,
) -> Comparison:
    """Generate a study's report twice, plainly and under ``edits``.

    Parameters
    ----------
    opening
        First words of the report, given to the model as its own.
    """
    inputs = prompt_inputs(model, processor, study, opening)
    length = inputs["input_ids"].shape[1]

    def report() -> str:
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return opening + processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True)

    before = report()
    with steered(model, sae, edits, where, length):
        after = report()
    return Comparison(before.strip(), after.strip())


def prompt_inputs(
    model: Any, processor: Maira2Processor, study: Study, opening: str = ""
) -> dict[str, Tensor]:
    """Model inputs of a study's prompt, without its report, on the model's device."""
    inputs = processor.model_inputs(encode_study(processor, study, with_report=False))
    ids = inputs["input_ids"]
    if opening:
        said = processor.tokenizer(opening, add_special_tokens=False)["input_ids"]
        ids = torch.cat([ids, torch.tensor([said], dtype=ids.dtype)], dim=1)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": inputs["pixel_values"].to(model.device, model.dtype),
    }
