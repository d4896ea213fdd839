"""From a features folder, labels and scores to the pages of the explorer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autointerp.evidence import OutputTokens, known_boxes, patch_map, token_texts
from autointerp.features import IMAGES, Example, Features
from autointerp.labels import Label
from autointerp.scores import Score
from autointerp.views import (
    ExplorerData,
    FilmView,
    HeatView,
    LatentView,
    ModalityView,
    ScoreView,
    SteeringView,
    TextView,
)
from hooks.files import ConfigError
from hooks.images import grid_of, read_image
from hooks.pages import CAREFUL
from hooks.studies import Study
from sae.model import MatryoshkaSAE

QUANTILES: tuple[str, ...] = ("p50", "p90", "p99")
N_NEIGHBOURS = 8


def explorer_from(
    features: Features,
    *,
    labels: Iterable[Label] = (),
    scores: Iterable[Score] = (),
    studies: Iterable[Study] = (),
    sae: MatryoshkaSAE | None = None,
    tokenizer: Any = None,
    image_size: int = 518,
    output_tokens: Mapping[int, OutputTokens] | None = None,
    steering: Mapping[int, Sequence[SteeringView]] | None = None,
    latents: Sequence[int] | None = None,
    top: int = 2000,
    title: str = "Latents",
    origin: str = CAREFUL,
    site: str = "",
) -> ExplorerData:
    """What a page can show of a features folder.

    Parameters
    ----------
    labels, scores
        A latent without a label of these shows none.
    studies
        Records of the studies, for the films and known boxes; without one, heat has no film.
    sae
        The dictionary, for neighbours.
    tokenizer
        Without one, no text is shown.
    image_size
        Side in pixels of the square that the processor crops a film to.
    output_tokens
        Of each latent, as :func:`autointerp.evidence.model_output_tokens` gives them.
    latents
        Which ones; by default those labelled, then those that fire in most studies, ``top`` in all.
    site
        Name before the numbers, where a page holds several dictionaries.
    """
    named = {label.latent: label for label in labels}
    by_latent: dict[int, list[Score]] = {}
    for score in scores:
        by_latent.setdefault(score.latent, []).append(score)
    if latents is None:
        latents = list(dict.fromkeys([*named, *features.alive()]))[:top]
    known = {study.id: study for study in studies}
    near = _neighbours(sae, latents) if sae is not None else {}
    films: dict[str, FilmView] = {}
    views = []
    for latent in latents:
        # The strongest first, whatever they are of; the other kinds keep their order.
        examples = sorted(
            features.examples(latent), key=lambda one: -one.peak if one.kind == "top" else 0.0
        )
        heats = [
            HeatView(
                _film(one, known, image_size, films),
                np.nan_to_num(patch_map(one)),
                one.modality,
                one.kind,
            )
            for one in examples
            if one.modality in IMAGES
        ]
        texts = (
            [
                TextView(
                    one.study,
                    tuple(token_texts(one, tokenizer)),
                    tuple(one.values),
                    one.modality,
                    one.kind,
                )
                for one in examples
                if one.modality not in IMAGES
            ]
            if tokenizer is not None
            else []
        )
        written = (output_tokens or {}).get(latent)
        view = LatentView(
            latent,
            site=site,
            asked=latent in named,
            dense=features.dense(latent),
            finding=_finding(by_latent.get(latent, []), examples, known),
            modalities=tuple(
                ModalityView(
                    name,
                    stats.n_rows,
                    stats.n_fired,
                    stats.max,
                    {q: getattr(stats, q) for q in QUANTILES} if stats.n_fired else {},
                )
                for name, stats in features.stats(latent).items()
            ),
            heats=tuple(heats),
            texts=tuple(texts),
            promoted=written.promoted if written else (),
            suppressed=written.suppressed if written else (),
            neighbours=near.get(latent, ()),
            steering=tuple((steering or {}).get(latent, ())),
        )
        views.append(_with_label(view, named.get(latent), by_latent.get(latent, [])))
    facts = {"Site": features.site, "Dictionary": f"{features.n_latents:,} latents"}
    return ExplorerData(
        title=title,
        subtitle=f"{len(views):,} latents at {features.site}, with what each fires on.",
        origin=origin,
        latents=tuple(views),
        films=films,
        facts=facts,
    )


def joined(first: ExplorerData, *others: ExplorerData) -> ExplorerData:
    """One page of the latents of several dictionaries, which differ in their ``site``."""
    films, latents, facts = dict(first.films), first.latents, dict(first.facts)
    for other in others:
        films |= other.films
        latents += other.latents
        facts |= other.facts
    return replace(first, latents=latents, films=films, facts=facts)


def read_steering(path: Path) -> dict[int, list[SteeringView]]:
    """Reports before and after, from a file with the JSON line of every ``steer --json``.

    Raises
    ------
    ConfigError
        If there is no such file, or a line is not such a record.
    """
    if not path.is_file():
        raise ConfigError(
            f"no file {path}; give one with the lines that `maira-sae steer --json` printed"
        )
    found: dict[int, list[SteeringView]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            latent, before, after = int(record["latent"]), record["before"], record["after"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"line {number} of {path} is no record of steering ({error!r}); give one JSON "
                "line of `maira-sae steer --json` a report"
            ) from None
        words = [record.get("mode"), record.get("strength"), record.get("study")]
        title = " · ".join(str(word) for word in words if word is not None)
        found.setdefault(latent, []).append(SteeringView(title or "edit", before, after))
    return found


def _with_label(view: LatentView, label: Label | None, scores: Sequence[Score]) -> LatentView:
    shown = [
        ScoreView(
            score.scorer + (f": {score.about}" if score.about else ""),
            score.modality,
            score.value,
            score.standard_error,
            score.baseline,
            score.n,
        )
        for score in scores
        if score.value is not None
    ]
    if label is None:
        return replace(view, scores=tuple(shown))
    return replace(view, label=label.label, scores=tuple(shown))


def _finding(
    scores: Sequence[Score], examples: Sequence[Example], known: Mapping[str, Study]
) -> str | None:
    """The study label of the best agreement, or the one most common in its strongest studies.

    Of the second, most of them must carry it.
    """
    agreed = [s for s in scores if s.about and s.scorer == "agreement" and s.value is not None]
    if agreed:
        return max(agreed, key=lambda s: s.value or 0.0).about
    studies = {one.study for one in examples if one.kind == "top"} & set(known)
    counts = Counter(label for study in studies for label in known[study].labels)
    if not counts:
        return None
    (name, count), *_ = counts.most_common(1)
    return name if 2 * count > len(studies) else None


def _film(
    example: Example, known: Mapping[str, Study], size: int, films: dict[str, FilmView]
) -> str:
    """The film's key; it is added to ``films`` if it is new."""
    key = f"{example.study} {example.modality}"
    if key in films:
        return key
    study = known.get(example.study)
    path = getattr(study, example.modality) if study else None
    if path is None:
        films[key] = FilmView(None, example.study)
        return key
    width, height = read_image(path).size
    boxes = known_boxes(study) if study and example.modality == "frontal" else ()
    corners = tuple(("", (b.x_min, b.y_min, b.x_max, b.y_max)) for b in boxes)
    films[key] = FilmView(path, example.study, corners, grid_of(width, height, size))
    return key


@torch.no_grad()
def _neighbours(
    sae: MatryoshkaSAE, latents: Sequence[int]
) -> dict[int, tuple[tuple[int, float], ...]]:
    """The latents whose decoder directions are closest, over the whole dictionary."""
    directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    found = {}
    for latent in latents:
        cosines = directions @ directions[latent]
        cosines[latent] = -2.0
        best = cosines.topk(min(N_NEIGHBOURS, len(cosines) - 1))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found[latent] = tuple((i, round(cosine, 4)) for i, cosine in pairs)
    return found
