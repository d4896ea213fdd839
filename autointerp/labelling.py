"""Labels for latents, and their detection scores beside a shuffled baseline.

Two labellers answer the same questions: :class:`Llm`, any OpenAI-compatible endpoint, and
:class:`Words`, word statistics alone, the baseline that an LLM has to beat. What either is shown
beside the examples of a latent is a :class:`Sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from autointerp import fuzzing
from autointerp.batch import BatchConfig
from autointerp.causal import SteeredReports, causal_request, steering_words
from autointerp.client import Client, EndpointConfig, Ledger, Request
from autointerp.detection import Question, ask, questions, report_questions
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
from autointerp.scores import Said, Score, Verdict
from autointerp.scoring import score_labels
from autointerp.statistics import words_express
from autointerp.vision import VisionConfig, vision_request
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
Explainer = Literal["text", "vision", "reports", "causal"]
Say = Callable[[str], None]
STATISTICS = "statistics"
"""Stands for the model in the record of labels that needed none."""


@dataclass(frozen=True)
class LabelConfig:
    """What is labelled, and from what."""

    latents: tuple[int, ...]
    explainer: Explainer = "text"
    """``text``: excerpts in which a latent fires. ``vision``: films under its activations.
    ``reports``: the reports of the studies on whose films it fires. ``causal``: the reports that
    the model writes of a blank film with it turned up."""
    modality: str = "report"
    """Of the examples shown; of ``vision`` and ``reports`` a film."""
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
        on_films = self.explainer in ("vision", "reports")
        if self.explainer != "causal" and on_films != (self.modality in IMAGES):
            raise ConfigError(
                f"explainer {self.explainer!r} and modality {self.modality!r} do not go together; "
                "text is explained by text, and films by vision or reports"
            )
        if self.calibrate and self.explainer != "text":
            raise ConfigError(
                f"calibrate holds labels against excerpts, and explainer {self.explainer!r} has "
                "none; leave it out, or explain text"
            )


@dataclass(frozen=True)
class Sources:
    """What an explainer needs beside the examples of a latent."""

    studies: Mapping[str, Study] = field(default_factory=dict)
    """By id; for ``vision`` and ``reports``."""
    image_size: int = 518
    """Side in pixels of the square that the processor crops a film to; for ``vision``."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    steered: SteeredReports | None = None
    """For ``causal``."""

    @classmethod
    def of(cls, studies: Sequence[Study], **others: Any) -> Sources:
        """From a list of studies."""
        return cls({study.id: study for study in studies}, **others)

    def reports(self) -> SteeredReports:
        """The steered reports, which must be there."""
        if self.steered is None:
            raise ConfigError("the causal explainer reads steered reports; give them")
        return self.steered


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


def label_latents(
    features: Features,
    labeller: Labeller,
    config: LabelConfig,
    out: Path,
    studies: Sequence[Study] = (),
    sources: Sources | None = None,
) -> list[Label]:
    """Name each latent and write the folder ``out``; a finished one is read.

    Dense latents (:meth:`Features.dense`) have no label, and nobody is asked about them; neither
    they nor those without a readable answer have a confidence, which "no clear concept" has.

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
    given = sources or Sources.of(studies)
    told = {
        strong: labeller.explain(features, config, given, strong) for strong in config.strengths
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
    answers = partial(labeller.detect, name="calibrate")
    return calibrate(features, offered, answers, labeller.tokenizer, config.modality)


def keep_labels(
    features: Features,
    texts: Mapping[int, str | None],
    out: Path,
    *,
    explainer: str,
    model: str,
    modality: str,
) -> list[Label]:
    """The label folder ``out`` of labels that somebody else made; a finished one is read.

    Raises
    ------
    ConfigError
        If a latent is none of the features'.
    """
    labels = [
        Label(latent, text, explainer, model, None, modality, features.reference(latent))
        for latent, text in sorted(texts.items())
    ]
    record = {
        "config": {"explainer": explainer, "modality": modality, "texts": fingerprint(labels)},
        "model": model,
        "site": features.site,
        "features": fingerprint(features.manifest["files"]),
    }
    _claim(out, record)
    if is_sealed(out):
        return read_labels(out)
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
    studies: Mapping[str, Study] | None = None,
    heard: list[Said] | None = None,
) -> list[Score]:
    """Detection of every label, beside another latent's label on the same excerpts.

    A latent is on above its label's threshold. "No clear concept" predicts nothing and scores 0.5,
    so that an explainer gains nothing by it; a dense latent, never asked about, has no score.

    Parameters
    ----------
    studies
        Labels of films are held against the reports of these; without them they have no score.
    heard
        The verdicts on the labels themselves are added to it.
    """

    def about(own: Label, label: str) -> Sequence[Question]:
        latent, modality, at = own.latent, own.modality, own.threshold
        if modality in IMAGES:
            return report_questions(features, latent, label, studies or {}, modality, side, at)
        return questions(features, latent, label, tokenizer, modality, side, at)

    tested = labels if studies else [one for one in labels if one.modality not in IMAGES]
    return _scores("detection", features, tested, labeller, about, heard)


def fuzzing_scores(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
    heard: list[Said] | None = None,
) -> list[Score]:
    """Fuzzing (:mod:`autointerp.fuzzing`) of every label of text, as :func:`detection_scores`."""

    def about(own: Label, label: str) -> Sequence[Question]:
        at = own.threshold
        return fuzzing.questions(features, own.latent, label, tokenizer, own.modality, side, at)

    of_text = [one for one in labels if one.modality not in IMAGES]
    return _scores("fuzzing", features, of_text, labeller, about, heard)


def _scores(
    scorer: str,
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    about: Callable[[Label, str], Sequence[Question]],
    heard: list[Said] | None,
) -> list[Score]:
    by_modality: dict[str, dict[int, Label]] = {}
    for one in labels:
        if one.label or not features.dense(one.latent):
            by_modality.setdefault(one.modality, {})[one.latent] = one
    scores = []
    for modality, own in by_modality.items():

        def asked(latent: int, label: str, own: dict[int, Label] = own) -> Sequence[Question]:
            return about(own[latent], label)

        named = {latent: one.label for latent, one in own.items()}
        scores += score_labels(labeller.detect, scorer, named, asked, modality, heard=heard)
    return scores


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
