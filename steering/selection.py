"""Which latents are worth steering, before a report is generated.

The output score of Arad, Mueller and Belinkov (2025, "SAEs Are Good for Steering – If You Select
the Right Features"): a latent writes the words that its decoder direction promotes. Its logit-lens
words are those the unembedding ranks first along that direction; the score says how high the model
ranks them at the end of a prompt once the latent is turned up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hooks.files import ConfigError
from hooks.processor import Maira2Processor
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit
from steering.generate import prompt_inputs, steered


class OutputScore(NamedTuple):
    """How well one latent writes its own words."""

    latent: int
    score: float
    """(1 - rank / vocabulary) · probability of the best ranked of its words, 0 to 1."""
    words: tuple[str, ...]
    """What its direction promotes, the strongest first."""


@torch.no_grad()
def output_scores(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    sae: MatryoshkaSAE,
    edits: Sequence[Edit],
    *,
    words: int = 20,
) -> list[OutputScore]:
    """Score each edit's latent by one forward pass over a study's prompt.

    Only for sites of the language model: a direction of the vision tower has no logit lens.

    Raises
    ------
    ConfigError
        For a dictionary of another site.
    """
    if not sae.config.site.startswith("llm."):
        raise ConfigError(
            f"{sae.config.site!r} is not of the language model, so its directions promote no "
            "words; select its latents by trying them, see steering.effects"
        )
    inputs = prompt_inputs(model, processor, study)
    head = model.get_output_embeddings().weight
    out = []
    for edit in edits:
        lens = (head.float() @ sae.W_dec[edit.latent].to(head.device).float()).topk(words).indices
        with steered(model, sae, [edit]):
            probability = model(**inputs, use_cache=False).logits[0, -1].float().softmax(-1)
        ranks = probability.argsort(descending=True).argsort()[lens]
        best = int(ranks.argmin())
        score = (1 - float(ranks[best]) / len(probability)) * float(probability[lens[best]])
        names = tuple(processor.tokenizer.decode([token]) for token in lens.tolist())
        out.append(OutputScore(edit.latent, score, names))
    return out
