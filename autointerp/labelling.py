"""Labels for latents, and their detection scores beside a shuffled baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from autointerp import fuzzing
from autointerp.detection import Question, questions, report_questions
from autointerp.explainers import Explanation
from autointerp.features import IMAGES, Features
from autointerp.label_config import LabelConfig, Sources
from autointerp.labellers import Labeller
from autointerp.labels import FORMAT_VERSION, KIND, REMEDY, Label, read_labels, write_labels
from autointerp.operating import Offer, Point, calibrate
from autointerp.scores import Said, Score
from autointerp.scoring import score_labels
from hooks.files import (
    FolderError,
    fingerprint,
    is_sealed,
    open_sealed,
    read_json,
    write_json,
)
from hooks.studies import Study


def label_latents(
    features: Features,
    labeller: Labeller,
    config: LabelConfig,
    out: Path,
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
    given = sources or Sources()
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
