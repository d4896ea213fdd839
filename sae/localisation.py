"""Where a latent fires on films, against masks or boxes of what is there.

Scores are means over films, with standard errors by patient, beside four baselines, weakest
first. *Permuted*: the film's own map with its patches dealt anew, which keeps how much the latent
fires and loses where; its pixel AUROC is 0.5 but for the draw, whatever the map. *Other film*: the
map of another patient's film, which knows the latent's habit. *Same*: that of a film with something
to find too. *Prior*: the mean mask of other patients, which knows the place alone. A thing that is
always at one place overlaps itself from film to film: there the last two come near the map itself,
and pixel AUROC tells little. What is left then is the map *above its habit*: minus the latent's
mean map over the other side's films, beside another film's treated likewise. The threshold of the
IoU is chosen on other patients than those it is measured on.

Letters: S films, h·w patches, H·W pixels, H and W multiples of h and w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hooks.files import ConfigError

PERMUTATIONS = 20
"""Of each film's patches; scores are means over them."""
THRESHOLDS = tuple(i / 20 for i in range(1, 20))
"""Shares of a map's scale that are tried."""


class Mean(NamedTuple):
    """A mean over films."""

    value: float
    standard_error: float
    """By patient; NaN with one patient, who tells nothing of others."""


@dataclass(frozen=True)
class Localisation:
    """How well maps show masks."""

    n: int
    """Films scored: those with something to find, and somewhere it is not."""
    n_patients: int
    n_left_out: int
    """Films whose mask is empty or whole, on which no place is right or wrong."""
    pixel_auroc: Mean
    """Area under the ROC curve over the film's pixels, each with its patch's value."""
    pixel_auroc_permuted: Mean
    """The same of the film's own map with its patches permuted, :data:`PERMUTATIONS` times."""
    pixel_auroc_other_film: Mean
    """The same of the map of another patient's film, whatever it shows."""
    pixel_auroc_same: Mean
    """The same of the map of another patient's film that has something to find too: a thing that is
    always at one place is known to it."""
    pixel_auroc_prior: Mean
    """The same of the mean mask of the other side's patients."""
    pixel_auroc_above: Mean
    """Of the map minus the latent's mean map over the other side's films: what it shows here, and
    not on every film."""
    pixel_auroc_above_other_film: Mean
    """The same of the map of another patient's film, minus the mean map."""
    pointing: Mean
    """The pointing game (Zhang et al. 2016, arXiv 1608.00507): 1 where the highest patch meets the
    mask, else 0; the mean over patches that are equally high."""
    pointing_permuted: Mean
    pointing_other_film: Mean
    pointing_same: Mean
    pointing_prior: Mean
    iou: Mean
    """Of the mask and the patches above the threshold that is best on the other side."""
    iou_permuted: Mean
    iou_other_film: Mean
    iou_same: Mean
    iou_prior: Mean
    """Of the mask and the prior, at the threshold best for it."""
    threshold: float
    """In the map's own units."""


def box_masks(
    boxes: Sequence[Sequence[tuple[float, float, float, float]]], shape: tuple[int, int]
) -> Bool[np.ndarray, "S H W"]:
    """Masks that are true inside any of a film's boxes ``(x0, y0, x1, y1)``, in pixels.

    A pixel belongs to a box if its centre does.

    >>> box_masks([[(0, 0, 1, 2)]], (2, 2)).astype(int).tolist()
    [[[1, 0], [1, 0]]]
    """
    y, x = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1])[None, :] + 0.5
    masks = np.zeros((len(boxes), *shape), dtype=bool)
    for mask, own in zip(masks, boxes, strict=True):
        for x0, y0, x1, y1 in own:
            mask |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
    return masks


def localise(
    maps: Float[np.ndarray, "S h w"],
    masks: Bool[np.ndarray, "S H W"],
    patients: Sequence[str],
    heldout: Bool[np.ndarray, " S"],
    seed: int = 0,
) -> Localisation:
    """Compare maps with masks on held-out films; the others give the threshold and the prior.

    Args:
        maps: a latent on each patch.
        masks: where the thing is.
        patients: whose film it is.
        heldout: films that are scored; no patient is on both sides.
        seed: of the permutations and of the other films.

    Raises:
        ConfigError: shapes do not fit, a value is not finite, a patient is on both sides, or a side
            has no film with something to find.
    """
    maps, masks, heldout = np.asarray(maps), np.asarray(masks), np.asarray(heldout)
    _check(maps, masks, patients, heldout)
    names = np.asarray(patients)
    useful = masks.any((1, 2)) & ~masks.all((1, 2))
    scored, other = np.flatnonzero(useful & heldout), np.flatnonzero(useful & ~heldout)
    if not len(scored) or not len(other):
        raise ConfigError(
            f"{len(scored)} held-out and {len(other)} other films have something to find; give at "
            "least one on each side"
        )
    prior = _shares(masks[other], maps.shape[1:]).mean(0)
    rng = np.random.default_rng(seed)
    pool = np.flatnonzero(heldout)
    own = maps[scored]
    others = maps[pool[_partners(names[scored], names[pool], rng)]]
    shown = {
        "": own[None],
        "_permuted": _permuted(own, rng),
        "_other_film": others[None],
        "_same": maps[scored[_partners(names[scored], names[scored], rng)]][None],
        "_prior": np.broadcast_to(prior, (1, *own.shape)),
    }
    covered, covered_other = (
        _shares(masks[scored], own.shape[1:]),
        _shares(masks[other], own.shape[1:]),
    )
    threshold = _threshold(maps[other], covered_other)
    own_prior = np.broadcast_to(prior, (len(other), *prior.shape))
    limits = dict.fromkeys(shown, threshold)
    limits["_prior"] = _threshold(own_prior, covered_other)
    owners = names[scored]
    # A patient who is alone has no other's map: what cannot be measured is NaN, not 0.
    alone = {"_other_film": names[heldout], "_same": owners, "_above_other_film": names[heldout]}

    def mean(suffix: str, values: np.ndarray) -> Mean:
        if len(set(alone.get(suffix, (0, 1)))) == 1:
            return Mean(float("nan"), float("nan"))
        return clustered_mean(values, owners)

    found: dict[str, Mean] = {}
    for suffix, draws in shown.items():
        for name, score in (("pixel_auroc", _pixel_aurocs), ("pointing", _points)):
            scores = np.mean([score(grids, covered) for grids in draws], axis=0)
            found[name + suffix] = mean(suffix, scores)
        overlaps = np.mean([_ious(grids, covered, limits[suffix]) for grids in draws], axis=0)
        found["iou" + suffix] = mean(suffix, overlaps)
    habit = maps[~heldout].mean(0)
    for suffix, grids in (("_above", own - habit), ("_above_other_film", others - habit)):
        found["pixel_auroc" + suffix] = mean(suffix, _pixel_aurocs(grids, covered))
    return Localisation(
        n=len(scored),
        n_patients=len(set(owners)),
        n_left_out=int((heldout & ~useful).sum()),
        threshold=threshold,
        **found,
    )


def clustered_mean(values: Float[np.ndarray, " n"], patients: Sequence[str] | np.ndarray) -> Mean:
    """Mean with the standard error that allows for values of one patient going together.

    The sandwich estimate: patients' sums of residuals are independent, values within one are not.

    >>> clustered_mean(np.array([0.0, 1.0, 0.0, 1.0]), ["a", "a", "b", "b"])
    Mean(value=0.5, standard_error=0.0)
    """
    _, code = np.unique(np.asarray(patients), return_inverse=True)
    n_patients = int(code.max()) + 1
    value = float(np.mean(values))
    if n_patients < 2:
        return Mean(value, float("nan"))
    sums = np.bincount(code, weights=np.asarray(values) - value)
    error = np.sqrt(n_patients / (n_patients - 1) * np.square(sums).sum()) / len(values)
    return Mean(value, float(error))


def _check(
    maps: np.ndarray, masks: np.ndarray, patients: Sequence[str], heldout: np.ndarray
) -> None:
    fits = maps.ndim == masks.ndim == 3 and maps.size > 0
    fits = fits and len(maps) == len(masks) == len(patients) == len(heldout)
    if not fits or any(b % s for b, s in zip(masks.shape[1:], maps.shape[1:], strict=True)):
        raise ConfigError(
            f"maps {maps.shape}, masks {masks.shape}, {len(patients)} patients and {len(heldout)} "
            "of heldout do not fit; give [S, h, w] and [S, H, W], H and W multiples of h and w, "
            "and one patient and side a film"
        )
    if masks.dtype != bool or heldout.dtype != bool or not np.isfinite(maps).all():
        raise ConfigError(
            f"masks are {masks.dtype}, heldout {heldout.dtype}, maps finite: "
            f"{np.isfinite(maps).all()}; give bool, bool and finite numbers"
        )
    names = np.asarray(patients)
    both = np.intersect1d(names[heldout], names[~heldout])
    if len(both):
        raise ConfigError(f"patient {both[0]!r} is on both sides; split films by patient")


def _partners(patients: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each patient the number of a film of another one in ``pool``, or 0 if there is none."""
    found = []
    for patient in patients:
        others = np.flatnonzero(pool != patient)
        found.append(int(rng.choice(others)) if len(others) else 0)
    return np.array(found)


def _shares(masks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Share of each patch that a mask covers."""
    h, w = shape
    n, high, wide = masks.shape
    return masks.reshape(n, h, high // h, w, wide // w).mean((2, 4))


def _permuted(maps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each map's patches dealt anew, ``[PERMUTATIONS, S, h, w]``."""
    flat = np.broadcast_to(maps.reshape(len(maps), -1), (PERMUTATIONS, len(maps), maps[0].size))
    return rng.permuted(flat, axis=2).reshape(PERMUTATIONS, *maps.shape)


def _pixel_aurocs(grids: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Of each film: area under the ROC curve over its pixels, from the share of each patch covered.

    All pixels of a patch have one value, so it counts with its share as found and with the rest as
    not found, to the same area as pixel by pixel; ties count one half.
    """
    areas = []
    for grid, share in zip(grids, covered, strict=True):
        _, level = np.unique(grid, return_inverse=True)
        inside = np.bincount(level.ravel(), share.ravel())
        outside = np.bincount(level.ravel(), 1 - share.ravel())
        wins = inside * (np.cumsum(outside) - outside / 2)
        areas.append(wins.sum() / (inside.sum() * outside.sum()))
    return np.array(areas)


def _points(grids: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Of each film: share of the highest patches that meet the mask."""
    highest = grids == grids.max((1, 2), keepdims=True)
    return (highest & (covered > 0)).sum((1, 2)) / highest.sum((1, 2))


def _ious(maps: np.ndarray, covered: np.ndarray, threshold: float) -> np.ndarray:
    """Of each film: patches above the threshold against the mask, over its pixels."""
    marked = maps > threshold
    inside = (covered * marked).sum((1, 2))
    return inside / (covered.sum((1, 2)) + marked.sum((1, 2)) - inside)


def _threshold(maps: np.ndarray, covered: np.ndarray) -> float:
    """The value of best mean IoU among shares of the maps' 99th percentile where they are > 0."""
    fired = maps[maps > 0]
    if not len(fired):
        return 0.0
    scale = float(np.quantile(fired, 0.99))
    tried = [0.0, *(share * scale for share in THRESHOLDS)]
    return max(tried, key=lambda value: float(_ious(maps, covered, value).mean()))
