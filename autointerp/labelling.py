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
from autointerp.features import IMAGES, MODALITIES, Features
from autointerp.labels import FORMAT_VERSION, KIND, REMEDY, Label, read_labels, write_labels
from autointerp.operating import STRENGTHS, Offer, Point, calibrate
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
    calibrate: bool = False
    """State each label with the activation above which it holds (:mod:`autointerp.operating`), of
    labels from several strengths of firing. Each takes a question for every excerpt of the
    explaining patients."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Shares of a latent's maximum, for each of which a label is asked for."""
        return STRENGTHS if self.calibrate else (STRONG,)

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
        if self.calibrate and self.explainer != "text":
            raise ConfigError(
                "calibrate holds labels against excerpts, and explainer 'reports' has none; leave "
                "it out, or explain text"
            )


class Labeller(Protocol):
    """Names latents, and says which excerpts express a name."""

    model: str
    tokenizer: Any

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        studies: Mapping[str, Study],
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        """An explanation of each latent; ``None`` where none was to be had.

        ``strong`` is the share of its maximum from which a latent is shown as on.
        """
        ...

    def detect(self, asked: Mapping[Key, Sequence[Question]]) -> dict[Key, list[Verdict]]:
        """A verdict on every question."""
        ...


class Llm:
    """A language model behind an endpoint; answers are kept in the client's ledger."""

    def __init__(self, client: Client, tokenizer: Any) -> None:
        self.client, self.tokenizer = client, tokenizer
        self.model = client.config.model

    def requests(
        self,
        features: Features,
        config: LabelConfig,
        studies: Mapping[str, Study],
        strong: float = STRONG,
    ) -> dict[int, Request]:
        """A request for each latent that can have a name."""
        found = {}
        for latent in config.latents:
            if config.explainer == "text":
                request = text_request(features, latent, self.tokenizer, config.modality, strong)
            else:
                request = report_request(features, latent, studies, config.modality)
            if request is not None:
                found[latent] = request
        return found

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        studies: Mapping[str, Study],
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        found = explain(self.client, self.requests(features, config, studies, strong)).found
        return {latent: found.get(latent) for latent in config.latents}

    def detect(self, asked: Mapping[Key, Sequence[Question]]) -> dict[Key, list[Verdict]]:
        return ask(self.client, asked)


class Words:
    """Distinctive words, without a language model (:mod:`autointerp.statistics`)."""

    model = STATISTICS

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def explain(
        self,
        features: Features,
        config: LabelConfig,
        studies: Mapping[str, Study],
        strong: float = STRONG,
    ) -> dict[int, Explanation | None]:
        found: dict[int, Explanation | None] = dict.fromkeys(config.latents)
        for latent in config.latents:
            if features.dense(latent):
                continue
            if config.explainer == "text":
                sides = shown(features, latent, config.modality, strong)
                on, off = ([plain_text(one, self.tokenizer) for one in side] for side in sides)
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
    _claim(out, record)
    if is_sealed(out):
        open_sealed(out, KIND, FORMAT_VERSION, REMEDY)
        return read_labels(out)
    by_id = {study.id: study for study in studies}
    told = {
        strong: labeller.explain(features, config, by_id, strong) for strong in config.strengths
    }
    points = _calibrated(features, labeller, config, told) if config.calibrate else {}
    labels = []
    for latent in config.latents:
        answers = [one for one in (found[latent] for found in told.values()) if one is not None]
        if latent in points:
            label, point = points[latent]
            answers = [one for one in answers if _text(one) == label]
        else:
            label, point = (_text(answers[0]) if answers else None), None
        labels.append(
            Label(
                *(latent, label, config.explainer, labeller.model),
                *(answers[0].confidence if answers else None, config.modality),
                features.reference(latent),
                *(point or ()),
            )
        )
    write_labels(labels, out)
    return labels


def _text(one: Explanation | None) -> str | None:
    return (one.label or "").strip() or None if one else None


def _calibrated(
    features: Features,
    labeller: Labeller,
    config: LabelConfig,
    told: Mapping[float, Mapping[int, Explanation | None]],
) -> dict[int, tuple[str, Point]]:
    """The best label of each latent that has one; of equal words the highest strength counts."""
    offered = {}
    for latent in config.latents:
        own = {_text(told[strong][latent]): strong for strong in sorted(told)}
        offered[latent] = [Offer(label, strong) for label, strong in own.items() if label]
    return calibrate(features, offered, labeller.detect, labeller.tokenizer, config.modality)


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
) -> list[Score]:
    """Detection of every label of text, beside another latent's label on the same excerpts.

    A latent is on above its label's threshold. "No clear concept" predicts nothing and scores 0.5,
    so that an explainer gains nothing by it; a dense latent, never asked about, has no score.
    """

    def about(own: Label, label: str) -> Sequence[Question]:
        at = own.threshold
        return questions(features, own.latent, label, tokenizer, own.modality, side, at)

    return _scores("detection", features, labels, labeller, about)


def fuzzing_scores(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
) -> list[Score]:
    """Fuzzing (:mod:`autointerp.fuzzing`) of every label of text, as :func:`detection_scores`."""

    def about(own: Label, label: str) -> Sequence[Question]:
        at = own.threshold
        return fuzzing.questions(features, own.latent, label, tokenizer, own.modality, side, at)

    return _scores("fuzzing", features, labels, labeller, about)


def _scores(
    scorer: str,
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    about: Callable[[Label, str], Sequence[Question]],
) -> list[Score]:
    by_modality: dict[str, dict[int, Label]] = {}
    for one in labels:
        if one.modality not in IMAGES and (one.label or not features.dense(one.latent)):
            by_modality.setdefault(one.modality, {})[one.latent] = one
    scores = []
    for modality, own in by_modality.items():

        def asked(latent: int, label: str, own: dict[int, Label] = own) -> Sequence[Question]:
            return about(own[latent], label)

        named = {latent: one.label for latent, one in own.items()}
        scores += score_labels(labeller.detect, scorer, named, asked, modality)
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
        by_id, asked = {study.id: study for study in studies}, []
        for strong in config.strengths:
            asked += labeller.requests(features, config, by_id, strong).values()
        say(f"explain: {labeller.client.estimate(asked)}")
        if config.calibrate:
            latents = [n for n in config.latents if not features.dense(n)]
            excerpts = [len(features.examples(n, config.modality, set="explain")) for n in latents]
            say(f"calibrate: at most {sum(excerpts) * len(config.strengths):,} short questions")
