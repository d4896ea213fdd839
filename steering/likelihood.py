"""What an edit does to the model's own probabilities, and what the model thinks of edited text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooks.files import ConfigError
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.roles import Role
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Change
from steering.generate import steered
from steering.positions import Positions, Where


class TokenEffects(NamedTuple):
    """Of one report, token by token, the report given as the model's own words."""

    kl: list[float]
    """KL(plain ‖ steered) of the next-token distribution at each token of the report, nats."""
    plain_nll: list[float]
    """−log p of each token without the edits, nats."""
    steered_nll: list[float]
    """The same under them."""

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return sum(self.kl) / len(self.kl)

    @property
    def perplexity(self) -> float:
        """Of the report under the model without edits."""
        return math.exp(sum(self.plain_nll) / len(self.plain_nll))


@torch.no_grad()
def token_effects(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    report: str,
    sae: MatryoshkaSAE,
    edits: Sequence[Change],
    *,
    where: Where | Positions = "all",
) -> TokenEffects:
    """Compare plain and steered distributions over ``report``, teacher-forced.

    Over the plain report it says how far the edits move the model; over the steered report its
    ``perplexity`` says how odd that text is to the model without edits.

    Raises
    ------
    ConfigError
        If the report is empty.
    """
    if not report.strip():
        raise ConfigError("the report is empty; it has no tokens to compare")
    encoding = encode_study(processor, study.model_copy(update={"report": report}))
    inputs = processor.model_inputs(encoding)
    written = torch.from_numpy(encoding.tokens.of_role(Role.REPORT, Role.GROUNDING))
    places = written.nonzero().flatten()
    ids = inputs["input_ids"][0]
    given = {
        "input_ids": inputs["input_ids"].to(model.device),
        "attention_mask": torch.ones_like(inputs["input_ids"]).to(model.device),
        "pixel_values": inputs["pixel_values"].to(model.device, model.dtype),
    }

    def log_probs() -> Tensor:
        logits = model(**given, use_cache=False).logits[0, places - 1]
        return logits.float().log_softmax(-1).cpu()

    plain = log_probs()
    start = int(places[0])
    with steered(
        model, sae, edits, where, start, tokens=encoding.tokens, tokenizer=processor.tokenizer
    ):
        changed = log_probs()
    kl = (plain.exp() * (plain - changed)).sum(-1).clamp_min(0)
    said = ids[places].cpu()[:, None]
    nll = [-each.gather(1, said)[:, 0] for each in (plain, changed)]
    return TokenEffects(kl.tolist(), nll[0].tolist(), nll[1].tolist())
