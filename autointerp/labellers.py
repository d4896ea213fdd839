"""Who labels latents, and answers what labels are tested by.

Two answer the same questions: :class:`Llm`, any OpenAI-compatible endpoint, and :class:`Words`,
word statistics alone, the baseline that an LLM has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from autointerp.batch import BatchConfig
from autointerp.causal import SteeredReports, causal_request, steering_words
from autointerp.client import Client, EndpointConfig, Ledger, Request
from autointerp.detection import Question, ask
from autointerp.explainers import (
    STRONG,
    Explanation,
    plain_text,
    report_request,
    reports_of,
    shown,
    text_request,
    words_label,
)
from autointerp.explaining import explain
from autointerp.features import Features
from autointerp.label_config import LabelConfig, Sources
from autointerp.scores import Verdict
from autointerp.statistics import words_express
from autointerp.vision import vision_request
from hooks.files import (
    ConfigError,
)

Key = TypeVar("Key", bound=Hashable)
Say = Callable[[str], None]
STATISTICS = "statistics"
"""Stands for the model in the record of labels that needed none."""


class Labeller(Protocol):
    """Names latents, and says which excerpts express a name."""

    model: str
    tokenizer: Any

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        sources: Sources,
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        """An explanation of each latent; ``None`` where none was to be had.

        ``strong`` is the share of its maximum from which a latent is shown as on.
        """
        ...

    def detect(
        self, asked: Mapping[Key, Sequence[Question]], name: str = "score"
    ) -> dict[Key, list[Verdict]]:
        """A verdict on every question; ``name`` says what they are for."""
        ...


class Llm:
    """A language model behind an endpoint; answers are kept in the client's ledger.

    Parameters
    ----------
    say
        Told, before anything is sent, what is left to send and at most what it costs.
    batch, wait
        Ask through the provider's Batch API, see :meth:`autointerp.client.Client.ask_all`.
    """

    def __init__(
        self,
        client: Client,
        tokenizer: Any,
        say: Say | None = None,
        batch: BatchConfig | None = None,
        wait: bool = True,
    ) -> None:
        self.client, self.tokenizer, self._say = client, tokenizer, say
        self._batch, self._wait = batch, wait
        self.model = client.config.model

    def requests(
        self,
        features: Features,
        config: LabelConfig,
        sources: Sources,
        strong: float = STRONG,
    ) -> dict[int, Request]:
        """A request for each latent that can have a name."""
        found = {}
        for latent in config.latents:
            request = self._request(features, latent, config, sources, strong)
            if request is not None:
                found[latent] = request
        return found

    def _request(
        self,
        features: Features,
        latent: int,
        config: LabelConfig,
        sources: Sources,
        strong: float,
    ) -> Request | None:
        if features.dense(latent):
            return None
        if config.explainer == "text":
            return text_request(features, latent, self.tokenizer, config.modality, strong)
        if config.explainer == "reports":
            return report_request(features, latent, sources.studies, config.modality)
        if config.explainer == "vision":
            size, how = sources.image_size, sources.vision
            return vision_request(features, latent, sources.studies, size, config.modality, how)
        reports = sources.reports()
        return causal_request(reports.steered[latent], reports.unsteered)

    def _announce(self, name: str, requests: Sequence[Request]) -> None:
        if self._say is not None:
            self._say(f"{name}: {self.client.estimate(requests, self._batch)}")

    def _announce_labels(
        self, features: Features, config: LabelConfig, sources: Sources, first: list[Request]
    ) -> None:
        """What all strengths will ask for; of the calibration only the number is known before."""
        if self._say is None:
            return
        for strong in config.strengths[1:]:
            first = [*first, *self.requests(features, config, sources, strong).values()]
        self._announce("explain", first)
        if config.calibrate:
            latents = [n for n in config.latents if not features.dense(n)]
            excerpts = [len(features.examples(n, config.modality, set="explain")) for n in latents]
            most = sum(excerpts) * len(config.strengths)
            self._say(f"calibrate: at most {most:,} short questions")

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        sources: Sources,
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        requests = self.requests(features, config, sources, strong)
        if strong == config.strengths[0]:
            self._announce_labels(features, config, sources, list(requests.values()))
        found = explain(self.client, requests, batch=self._batch, wait=self._wait).found
        return {latent: found.get(latent) for latent in config.latents}

    def detect(
        self, asked: Mapping[Key, Sequence[Question]], name: str = "score"
    ) -> dict[Key, list[Verdict]]:
        self._announce(name, [one.request() for some in asked.values() for one in some])
        return ask(self.client, asked, name, batch=self._batch, wait=self._wait)


class Words:
    """Distinctive words, without a language model (:mod:`autointerp.statistics`)."""

    model = STATISTICS

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        sources: Sources,
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        if config.explainer == "vision":
            raise ConfigError("word statistics see no films; give an endpoint, or explain reports")
        if config.explainer == "causal":
            return self._causal(features, config, sources.reports())
        found: dict[int, Explanation | None] = dict.fromkeys(config.latents)
        for latent in config.latents:
            if features.dense(latent):
                continue
            if config.explainer == "text":
                sides = shown(features, latent, config.modality, strong)
                on, off = ([plain_text(one, self.tokenizer) for one in side] for side in sides)
            else:
                on, off = reports_of(features, latent, sources.studies, config.modality)
            label = words_label(on, off)
            sides = ([words_express(label or "", text) for text in side] for side in (on, off))
            hits, alarms = (sum(side) / len(side) if side else 0.0 for side in sides)
            sure = (hits + 1 - alarms) / 2 if label else 0.0
            found[latent] = Explanation(label=label, confidence=sure, evidence=label or "")
        return found

    def _causal(
        self, features: Features, config: LabelConfig, reports: SteeredReports
    ) -> dict[int, Explanation | None]:
        steered = {n: reports.steered[n] for n in config.latents if not features.dense(n)}
        found: dict[int, Explanation | None] = dict.fromkeys(config.latents)
        for latent, label in steering_words(steered, reports.unsteered).items():
            found[latent] = Explanation(
                label=label, confidence=float(label is not None), evidence=label or ""
            )
        return found

    def detect(
        self, asked: Mapping[Key, Sequence[Question]], name: str = "score"
    ) -> dict[Key, list[Verdict]]:
        return {
            key: [Verdict(q.patient, q.truth, q.expressed()) for q in some]
            for key, some in asked.items()
        }


def labeller_of(
    endpoint: EndpointConfig | None,
    tokenizer: Any,
    ledger: Path,
    say: Say | None = None,
    batch: BatchConfig | None = None,
    wait: bool = True,
) -> Llm | Words:
    """Who answers: the endpoint's model, with its ledger in a folder, or word statistics.

    The other parameters are those of :class:`Llm`.
    """
    if endpoint is None:
        return Words(tokenizer)
    client = Client(endpoint, Ledger(ledger / "ledger.sqlite"))
    return Llm(client, tokenizer, say, batch, wait)
