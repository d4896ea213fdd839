"""Agreement and localisation of latents with what a data set knows of its studies, without an LLM.

Both choose, for each latent, the study label or the marked thing that it fits best on the patients
who explain, and are measured on the patients who score (:attr:`autointerp.CollectConfig.score`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from autointerp.agreement import agreement
from autointerp.collect import CollectConfig
from autointerp.evidence import Crop
from autointerp.features import MODALITIES, SETS
from autointerp.layout import FolderSource
from autointerp.scores import Score
from hooks.files import ConfigError
from hooks.images import read_image
from hooks.store import ActivationFolder
from hooks.studies import Study
from sae.latent_scores import auroc
from sae.localisation import Localisation, box_masks, localise
from sae.model import MatryoshkaSAE

FINDING = "finding"
"""What a box is of where its sentence has no label."""
PIXELS = 8
"""Pixels of a mask along a patch."""
LEAST = 2
"""Studies with a label, and without, or films with a thing, on either side."""


class Maxima(NamedTuple):
    """The largest activation of some latents in every study, over the rows of one modality."""

    studies: list[str]
    patients: list[str]
    values: Float[np.ndarray, "S n"]
    """NaN where a study has no such rows."""


def some_maxima(
    sae: MatryoshkaSAE, folder: ActivationFolder, latents: Sequence[int], modality: str
) -> Maxima:
    """Maxima of a few latents."""
    source = FolderSource(folder, sae.config.site)
    layout = source.layout
    values = np.full((len(layout.studies), len(latents)), np.nan, dtype=np.float32)
    for rows, z in _encoded(sae, source, latents, modality):
        np.fmax.at(values, layout.study[rows], z)
    return Maxima(layout.studies, layout.patients, values)


@torch.no_grad()
def _encoded(
    sae: MatryoshkaSAE, source: FolderSource, latents: Sequence[int], modality: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the rows of a modality, and the latents on them."""
    source.folder.check_trained(sae.config.policy)
    code, at = MODALITIES.index(modality), 0
    for piece in source.pieces():
        own = np.flatnonzero(piece.modality == code)
        if len(own):
            x = piece.x[torch.from_numpy(own)].to(sae.W_dec)
            yield at + own, sae.encode_some(x, latents).float().cpu().numpy()
        at += len(piece.modality)


def agreement_scores(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    latents: Mapping[int, str],
    studies: Sequence[Study],
    config: CollectConfig,
    seed: int = 0,
) -> list[Score]:
    """AUROC of each latent's maximum in a study for the study label that it knows best.

    Parameters
    ----------
    latents
        With the modality whose rows count.
    config
        Of the features: it says which patients score.

    Raises
    ------
    ConfigError
        If no label has :data:`LEAST` studies with and without it on both sides.
    """
    records = {study.id: study for study in studies}
    scores = []
    for modality, own in _by_modality(latents).items():
        maxima = some_maxima(sae, folder, own, modality)
        sides = np.array([config.set_of(patient) for patient in maxima.patients])
        known = np.array([study in records for study in maxima.studies])
        usable = known & np.isfinite(maxima.values).all(1) & (sides != SETS.index("steer"))
        values, heldout = maxima.values[usable], (sides == SETS.index("score"))[usable]
        names = [study for study, kept in zip(maxima.studies, usable, strict=True) if kept]
        patients = [one for one, kept in zip(maxima.patients, usable, strict=True) if kept]
        carried = _labels([records[name] for name in names], heldout)
        other = torch.from_numpy(values[~heldout])
        areas = np.stack(
            [auroc(other, torch.from_numpy(truth[~heldout])).numpy() for truth in carried.values()]
        )
        for i, latent in enumerate(own):
            about = list(carried)[int(np.nan_to_num(areas[:, i]).argmax())]
            column = values[:, i]
            found = agreement(
                *(latent, modality, about, column, carried[about], patients, heldout, seed)
            )
            scores.append(found.score)
    return sorted(scores, key=lambda score: score.latent)


def _by_modality(latents: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for latent, modality in sorted(latents.items()):
        found.setdefault(modality, []).append(latent)
    return found


def _labels(
    studies: Sequence[Study], heldout: Bool[np.ndarray, " S"]
) -> dict[str, Bool[np.ndarray, " S"]]:
    """Labels that occur often enough, and are absent often enough, on both sides."""
    names = sorted({label for study in studies for label in study.labels})
    found = {}
    for name in names:
        truth = np.array([name in study.labels for study in studies], dtype=bool)
        sides = [truth[heldout], truth[~heldout]]
        if all(min(side.sum(), (~side).sum()) >= LEAST for side in sides):
            found[name] = truth
    if not found:
        raise ConfigError(
            f"none of the {len(names)} labels of {len(studies)} studies is on at least {LEAST} "
            "studies, and absent from as many, among the scored patients and among the others; "
            "give studies with labels, or leave agreement out"
        )
    return found


class Located(NamedTuple):
    """A latent's localisation of the thing that it fits best."""

    score: Score
    """Its value is the pixel AUROC; the baseline that of another patient's map."""
    detail: Localisation


def localisation_scores(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    latents: Sequence[int],
    studies: Sequence[Study],
    config: CollectConfig,
    image_size: int,
    masks: Path | None = None,
    seed: int = 0,
) -> list[Located]:
    """Where each latent fires on frontal films, against boxes of the studies and masks on disk.

    Parameters
    ----------
    image_size
        Side of the square that the processor crops to.
    masks
        ``<name>/<study>.png`` there is of the film's shape, and not 0 where the thing is.

    Raises
    ------
    ConfigError
        If nothing is marked on :data:`LEAST` films on both sides, or the harvest kept only some
        patches.
    """
    source = FolderSource(folder, sae.config.site)
    layout, code = source.layout, MODALITIES.index("frontal")
    grid = layout.grid(code)
    if grid is None:
        raise ConfigError(f"{folder.folder} has no frontal patches; give a harvest of films")
    records = {study.id: study for study in studies}
    number = {name: i for i, name in enumerate(layout.studies)}
    sides = {name: config.set_of(layout.patients[i]) for name, i in number.items()}
    names = [n for n in number if n in records and sides[n] != SETS.index("steer")]
    marked = _marked([records[name] for name in names], masks)
    films = [name for name in names if any(name in one for one in marked.values())]
    heldout = np.array([sides[name] == SETS.index("score") for name in films], dtype=bool)
    truths = _truths(marked, films, records, heldout, grid, image_size)
    values = _maps(sae, source, latents, films, grid)
    patients = [layout.patients[number[name]] for name in films]
    found = []
    for i, latent in enumerate(latents):
        maps = values[:, i]
        on_others = {
            name: localise(maps, truth, patients, ~heldout, seed).pixel_auroc.value
            for name, truth in truths.items()
        }
        about = max(on_others, key=lambda name: on_others[name])
        detail = localise(maps, truths[about], patients, heldout, seed)
        score = Score(
            *(latent, "localisation", "frontal", detail.pixel_auroc.value),
            *(_finite(detail.pixel_auroc.standard_error), None, detail.pixel_auroc.value, 1.0),
            *(detail.n, detail.n_patients, about),
        )
        baseline = _finite(detail.pixel_auroc_other_film.value)
        found.append(Located(replace(score, baseline=baseline), detail))
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _maps(
    sae: MatryoshkaSAE,
    source: FolderSource,
    latents: Sequence[int],
    films: Sequence[str],
    grid: tuple[int, int],
) -> Float[np.ndarray, "S n h w"]:
    layout = source.layout
    place = np.full(len(layout.studies), -1)
    wanted = {name: i for i, name in enumerate(films)}
    for i, name in enumerate(layout.studies):
        place[i] = wanted.get(name, -1)
    maps = np.full((len(films), len(latents), *grid), np.nan, dtype=np.float32)
    for rows, z in _encoded(sae, source, latents, "frontal"):
        film = place[layout.study[rows]]
        kept = film >= 0
        rows, z, film = rows[kept], z[kept], film[kept]
        maps[film, :, layout.patch_row[rows], layout.patch_column[rows]] = z
    if not np.isfinite(maps).all():
        raise ConfigError(
            f"{source.folder.folder} has only some patches of its films; harvest all of them for "
            "localisation"
        )
    return maps


Marks = dict[str, dict[str, Any]]
"""By name of a thing, then by study: boxes as fractions of the film, or the path of a mask."""


def _marked(studies: Sequence[Study], masks: Path | None) -> Marks:
    found: Marks = {}
    for study in studies:
        for sentence in study.sentences:
            for name in (sentence.labels or (FINDING,)) if sentence.boxes else ():
                found.setdefault(name, {}).setdefault(study.id, []).extend(sentence.boxes or ())
    if masks is not None:
        if not masks.is_dir():
            raise ConfigError(f"{masks} is no folder; give one with <name>/<study>.png")
        known = {study.id for study in studies}
        for path in sorted(masks.glob("*/*.png")):
            if path.stem in known:
                found.setdefault(path.parent.name, {})[path.stem] = path
    return found


def _truths(
    marked: Marks,
    films: Sequence[str],
    records: Mapping[str, Study],
    heldout: Bool[np.ndarray, " S"],
    grid: tuple[int, int],
    image_size: int,
) -> dict[str, Bool[np.ndarray, "S H W"]]:
    """Masks on the square that the model sees, of things marked often enough on both sides."""
    shape = (grid[0] * PIXELS, grid[1] * PIXELS)
    sizes: dict[str, tuple[int, int]] = {}
    found = {}
    for name, own in marked.items():
        truth = np.zeros((len(films), *shape), dtype=bool)
        for i, study in enumerate(films):
            if study not in own:
                continue
            if study not in sizes:
                sizes[study] = read_image(records[study].frontal).size
            crop = Crop.of(*sizes[study], image_size)
            truth[i] = _on_square(own[study], sizes[study], crop, shape)
        shown = np.array([mask.any() and not mask.all() for mask in truth])
        if min(shown[heldout].sum(), shown[~heldout].sum()) >= LEAST:
            found[name] = truth
    if not found:
        raise ConfigError(
            f"{sorted(marked) or 'nothing'} is marked by boxes or masks, and none of it on at "
            f"least {LEAST} films of the scored patients and of the others; give studies "
            "with boxes, or --masks, or leave localisation out"
        )
    return found


def _on_square(
    mark: Any, size: tuple[int, int], crop: Crop, shape: tuple[int, int]
) -> Bool[np.ndarray, "H W"]:
    width, height = size
    down, across = crop.side / shape[0], crop.side / shape[1]
    if isinstance(mark, Path):
        with Image.open(mark) as image:
            mask = np.asarray(image.convert("L")) > 0
        if mask.shape != (height, width):
            raise ConfigError(
                f"the mask {mark} is {mask.shape} and its film {(height, width)}; give masks of "
                "the film's shape"
            )
        y = (crop.top + (np.arange(shape[0]) + 0.5) * down).astype(int)
        x = (crop.left + (np.arange(shape[1]) + 0.5) * across).astype(int)
        return mask[np.ix_(y.clip(0, height - 1), x.clip(0, width - 1))]
    boxes = [
        (
            (box.x_min * width - crop.left) / across,
            (box.y_min * height - crop.top) / down,
            (box.x_max * width - crop.left) / across,
            (box.y_max * height - crop.top) / down,
        )
        for box in mark
    ]
    return box_masks([boxes], shape)[0]
