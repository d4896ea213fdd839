"""What stands behind each sentence of a report: image latents, their patches, and what lacks them.

A sentence rests on the films as far as it becomes less likely when every latent that fires on them
is ablated at once (its support), and on one latent as far as it does without that one (its drop).
Neither says that the sentence is true: only what the model drew on. For research, not diagnosis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.processor import Maira2Processor
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.evidence import ReportReader


@dataclass(frozen=True)
class ReviewConfig:
    """How much is measured and shown."""

    candidates: int = 8
    """Image latents of each sentence, by predicted drop, that are ablated."""
    shown: int = 3
    """Of these the ones that are named, by score."""
    contrast: float = 0.5
    """What a latent's drops of the other sentences count against it: one that every sentence needs
    says little of any. Of 0, 0.25, 0.5, 1 and 2 the best on the
    phantom's training patients."""
    least_support: float = 4.0
    """Nats below which a sentence is flagged; choose it on studies whose truth is known."""
    batch: int = 32
    """Copies of the prompt in one forward pass, each with its own latent ablated."""

    def __post_init__(self) -> None:
        if self.contrast < 0:
            raise ConfigError(f"contrast is {self.contrast}; it must not be negative")
        for name in ("candidates", "shown", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Evidence:
    """One image latent behind a sentence."""

    latent: int
    name: str | None
    drop: float
    """Of the sentence's log-probability without the latent, nats."""
    score: float
    """The drop, less ``contrast`` times the latent's positive drops of the other sentences."""
    predicted: float
    """The same drop by gradient times activation."""
    patches: Mapping[str, list[list[float]]] = field(repr=False)
    """Predicted drop without the latent on each patch alone, by film."""


@dataclass(frozen=True)
class SentenceReview:
    """One sentence and what it rests on."""

    text: str
    log_prob: float
    """Nats, given the films, the prompt and the sentences before."""
    support: float
    """Drop of the log-probability without every image latent, nats."""
    supported: bool
    image: tuple[Evidence, ...]
    """Image latents with a positive drop, by score, the largest first."""
    text_latents: tuple[tuple[int, str | None, float], ...] = ()
    """Number, name and largest activation of another dictionary's latents on the words."""


def review(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    sae: MatryoshkaSAE,
    *,
    text_sae: MatryoshkaSAE | None = None,
    names: Mapping[int, str] | None = None,
    text_names: Mapping[int, str] | None = None,
    config: ReviewConfig | None = None,
) -> list[SentenceReview]:
    """Review the report that ``study`` holds, sentence by sentence.

    Raises
    ------
    ConfigError
        If the study has no report.
    """
    c, names, text_names = config or ReviewConfig(), names or {}, text_names or {}
    reader = ReportReader(model, processor, sae, study)
    reading = reader.read()
    latents = reading.films.latents.tolist()
    best = reading.attributions.argsort(dim=1, descending=True)[:, : c.candidates]
    chosen = sorted({latents[i] for i in best.flatten().tolist()})
    after = reader.without([*[[latent] for latent in chosen], latents], c.batch)
    drops = reading.log_probs - after
    score = selective(drops[:-1], c.contrast)
    column = {latent: i for i, latent in enumerate(latents)}
    words = reader.text_latents(text_sae) if text_sae is not None else None
    out = []
    for s in range(len(reader.sentences)):
        order = score[:, s].argsort(descending=True).tolist()
        image = []
        for place in [place for place in order if drops[place, s] > 0][: c.shown]:
            latent = chosen[place]
            image.append(
                Evidence(
                    latent,
                    names.get(latent),
                    float(drops[place, s]),
                    float(score[place, s]),
                    float(reading.attributions[s, column[latent]]),
                    _lists(reader, reader.patch_attribution(reading, s, latent)),
                )
            )
        said = []
        if words is not None:
            peak = words[s].amax(0)
            top = peak.argsort(descending=True)[: c.shown].tolist()
            said = [(i, text_names.get(i), float(peak[i])) for i in top if peak[i] > 0]
        support = float(drops[-1, s])
        out.append(
            SentenceReview(
                reader.text(processor, s),
                float(reading.log_probs[s]),
                support,
                support >= c.least_support,
                tuple(image),
                tuple(said),
            )
        )
    return out


def selective(drops: Float[Tensor, "n S"], contrast: float) -> Float[Tensor, "n S"]:
    """Drops of the sentences, less what the same latent takes from the other ones.

    >>> import torch
    >>> selective(torch.tensor([[3.0, 3.0], [2.0, -1.0]]), 0.5).tolist()
    [[1.5, 1.5], [2.0, -2.0]]
    """
    taken = drops.clamp_min(0)
    return drops - contrast * (taken.sum(1, keepdim=True) - taken)


def _lists(reader: ReportReader, values: Tensor) -> dict[str, list[list[float]]]:
    """For JSON."""
    return {view: grid.tolist() for view, grid in reader.by_film(values.numpy()).items()}
