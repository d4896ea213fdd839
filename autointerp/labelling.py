"""Labels for latents, and their detection scores beside a shuffled baseline.

Two labellers answer the same questions: :class:`Llm`, any OpenAI-compatible endpoint, and
:class:`Words`, word statistics alone, the baseline that an LLM has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from autointerp import fuzzing
from autointerp.client import Client, EndpointConfig, Ledger, Request
from autointerp.detection import Question, ask, questions
from autointerp.explainers import (
    Explanation,
    plain_text,
    report_request,
    reports_of,
    shown,
    text_request,
    words_label,
)
from autointerp.explaining import explain
from autointerp.features import IMAGES, MODALITIES, Features
from autointerp.labels import FORMAT_VERSION, KIND, REMEDY, Label, read_labels, write_labels
from autointerp.scores import Score, Verdict
from autointerp.scoring import score_labels
from autointerp.statistics import words_express
from hooks.files import (
    ConfigError,
    FolderError,
    fingerprint,
    is_sealed,
    nearest,
    open_sealed,
    read_json,
    write_json,
)
from hooks.studies import Study

Key = TypeVar("Key", bound=Hashable)
Explainer = Literal["text", "reports"]
STATISTICS = "statistics"
"""Stands for the model in the record of labels that needed none."""


@dataclass(frozen=True)
class LabelConfig:
    """What is labelled, and from what."""

    latents: tuple[int, ...]
    explainer: Explainer = "text"
    """``text``: excerpts in which a latent fires. ``reports``: the reports of the studies on whose
    films it fires."""
    modality: str = "report"
    """Of the examples shown; of ``reports`` a film."""

    def __post_init__(self) -> None:
        if not self.latents:
            raise ConfigError("no latents to label; name at least one")
        if self.explainer not in get_args(Explainer):
            raise ConfigError(
                f"explainer {self.explainer!r} is unknown"
                f"{nearest(self.explainer, get_args(Explainer))}; choose from "
                f"{list(get_args(Explainer))}"
            )
        if self.modality not in MODALITIES:
            raise ConfigError(
                f"modality {self.modality!r} is unknown{nearest(self.modality, MODALITIES)}; "
                f"choose from {list(MODALITIES)}"
            )
        if (self.explainer == "reports") != (self.modality in IMAGES):
            raise ConfigError(
                f"explainer {self.explainer!r} and modality {self.modality!r} do not go together; "
                "text is explained by text, and films by reports"
            )


class Labeller(Protocol):
    """Names latents, and says which excerpts express a name."""

    model: str

    def explain(
        self, features: Features, config: LabelConfig, studies: Mapping[str, Study]
    ) -> dict[int, Explanation | None]:
        """An explanation of each latent; ``None`` where none was to be had."""
        ...

    def detect(self, asked: Mapping[Key, Sequence[Question]]) -> dict[Key, list[Verdict]]:
        """A verdict on every question."""
        ...


class Llm:
    """A language model behind an endpoint; answers are kept in the client's ledger."""

    def __init__(self, client: Client, tokenizer: Any) -> None:
        self.client, self._tokenizer = client, tokenizer
        self.model = client.config.model

    def requests(
        self, features: Features, config: LabelConfig, studies: Mapping[str, Study]
    ) -> dict[int, Request]:
        """A request for each latent that can have a name."""
        found = {}
        for latent in config.latents:
            if config.explainer == "text":
                request = text_request(features, latent, self._tokenizer, config.modality)
            else:
                request = report_request(features, latent, studies, config.modality)
            if request is not None:
                found[latent] = request
        return found

    def explain(
        self, features: Features, config: LabelConfig, studies: Mapping[str, Study]
    ) -> dict[int, Explanation | None]:
        found = explain(self.client, self.requests(features, config, studies)).found
        return {latent: found.get(latent) for latent in config.latents}

    def detect(self, asked: Mapping[Key, Sequence[Question]]) -> dict[Key, list[Verdict]]:
        return ask(self.client, asked)


class Words:
    """Distinctive words, without a language model (:mod:`autointerp.statistics`)."""

    model = STATISTICS

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def explain(
        self, features: Features, config: LabelConfig, studies: Mapping[str, Study]
    ) -> dict[int, Explanation | None]:
        found: dict[int, Explanation | None] = dict.fromkeys(config.latents)
        for latent in config.latents:
            if features.dense(latent):
                continue
            if config.explainer == "text":
                sides = shown(features, latent, config.modality)
                on, off = ([plain_text(one, self._tokenizer) for one in side] for side in sides)
            else:
                on, off = reports_of(features, latent, studies, config.modality)
            label = words_label(on, off)
            sides = ([words_express(label or "", text) for text in side] for side in (on, off))
            hits, alarms = (sum(side) / len(side) if side else 0.0 for side in sides)
            sure = (hits + 1 - alarms) / 2 if label else 0.0
            found[latent] = Explanation(label=label, confidence=sure, evidence=label or "")
        return found

    def detect(self, asked: Mapping[Key, Sequence[Question]]) -> dict[Key, list[Verdict]]:
        return {
            key: [Verdict(q.patient, q.truth, q.expressed()) for q in some]
            for key, some in asked.items()
        }


def label_latents(
    features: Features,
    labeller: Labeller,
    config: LabelConfig,
    out: Path,
    studies: Sequence[Study] = (),
) -> list[Label]:
    """Name each latent and write the folder ``out``; a finished one is read.

    An LLM's client keeps its ledger where it likes; in ``out`` a stopped run loses nothing it paid
    for. Answers may quote reports: treat the ledger as you treat the reports.
    """
    record = {
        "config": {**asdict(config), "latents": list(config.latents)},
        "model": labeller.model,
        "site": features.site,
        "features": fingerprint(features.manifest["files"]),
    }
    for latent in config.latents:
        features.stats(latent)  # refuses what is no latent before anything is written
    _claim(out, record)
    if is_sealed(out):
        open_sealed(out, KIND, FORMAT_VERSION, REMEDY)
        return read_labels(out)
    found = labeller.explain(features, config, {study.id: study for study in studies})
    labels = []
    for latent, one in found.items():
        label = (one.label or "").strip() or None if one else None
        sure = one.confidence if one else None
        labels.append(
            Label(
                *(latent, label, config.explainer, labeller.model, sure, config.modality),
                reference=features.reference(latent),
            )
        )
    write_labels(labels, out)
    return labels


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    path = out / "config.json"
    if path.is_file() and read_json(path) != record:
        raise FolderError(f"{out} holds other labels; give a new folder, or delete this one")
    write_json(path, record)


def detection_scores(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
    strong: bool = False,
) -> list[Score]:
    """Detection of every label of text, beside another latent's label on the same excerpts.

    Latents without a label have no score.
    """

    def about(latent: int, label: str, modality: str) -> Sequence[Question]:
        return questions(features, latent, label, tokenizer, modality, side, strong)

    return _scores("detection", labels, labeller, about)


def fuzzing_scores(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
    strong: bool = False,
) -> list[Score]:
    """Fuzzing (:mod:`autointerp.fuzzing`) of every label of text, as :func:`detection_scores`."""

    def about(latent: int, label: str, modality: str) -> Sequence[Question]:
        return fuzzing.questions(features, latent, label, tokenizer, modality, side, strong)

    return _scores("fuzzing", labels, labeller, about)


def _scores(
    scorer: str,
    labels: Sequence[Label],
    labeller: Labeller,
    about: Callable[[int, str, str], Sequence[Question]],
) -> list[Score]:
    by_modality: dict[str, dict[int, str | None]] = {}
    for one in labels:
        if one.label and one.modality not in IMAGES:
            by_modality.setdefault(one.modality, {})[one.latent] = one.label
    scores = []
    for modality, named in by_modality.items():

        def own(latent: int, label: str, modality: str = modality) -> Sequence[Question]:
            return about(latent, label, modality)

        scores += score_labels(labeller.detect, scorer, named, own, modality)
    return scores


def labeller_of(
    endpoint: EndpointConfig | None,
    tokenizer: Any,
    ledger: Path,
) -> Llm | Words:
    """Who answers: the endpoint's model, with its ledger in a folder, or word statistics."""
    if endpoint is None:
        return Words(tokenizer)
    return Llm(Client(endpoint, Ledger(ledger / "ledger.sqlite")), tokenizer)


def announce(
    labeller: Llm | Words,
    features: Features,
    config: LabelConfig,
    studies: Sequence[Study],
    say: Callable[[str], None],
) -> None:
    """Say what is left to ask of an endpoint, and at most what it costs, before it is asked."""
    if isinstance(labeller, Llm):
        asked = labeller.requests(features, config, {study.id: study for study in studies})
        say(f"explain: {labeller.client.estimate(list(asked.values()))}")
