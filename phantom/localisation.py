"""Whether a latent's map over a film's patches shows where a finding is."""

from typing import NamedTuple

import numpy as np
import torch

from phantom.factors import PhantomError
from sae.latent_scores import auroc


class Mean(NamedTuple):
    """A mean over films."""

    value: float
    error: float
    """Standard error of the mean; 0 for a single film, which tells nothing of it."""


class Localisation(NamedTuple):
    """How well maps show masks, as means over films."""

    n: int
    """Films with something to find."""
    n_left_out: int
    """Films whose mask is empty or whole, on which no place is right or wrong."""
    pixel_auroc: Mean
    """Area under the ROC curve over the film's pixels, each with its patch's value."""
    pointing: Mean
    """The pointing game (Zhang et al. 2016, arXiv 1608.00507): 1 where the highest patch meets
    the mask, else 0; the mean over patches that are equally high."""
    pointing_chance: Mean
    """What a patch chosen at random scores."""
    iou: Mean
    """Intersection over union of the mask and the patches that reach the threshold."""


def localise(maps: np.ndarray, masks: np.ndarray, threshold: float = 0.5) -> Localisation:
    """Compare a latent's activation maps with the masks of a finding.

    Patches are coarse: not even `Film.coverage` itself reaches an IoU of 1, and a tube's stays
    near 0.1. Read the IoU beside that of the coverage maps.

    Args:
        maps: float (films, h, w), the latent's activation on each patch.
        masks: bool (films, H, W), where the finding is; H and W are multiples of h and w.
        threshold: a patch is marked if it reaches this share of its film's highest value; a film
            whose highest value is not above 0 has none.

    Returns:
        Means over the films with something to find, none of them NaN.

    Raises:
        PhantomError: shapes do not fit, a value is not finite, the threshold is outside 0 to 1,
            or no film has anything to find.

    Example:
        >>> import numpy as np
        >>> masks = np.zeros((1, 4, 4), bool)
        >>> masks[0, :2, :2] = True
        >>> localise(np.array([[[1.0, 0.0], [0.0, 0.0]]]), masks).iou.value
        1.0
    """
    maps, masks = np.asarray(maps), np.asarray(masks)
    fits = maps.ndim == masks.ndim == 3 and len(maps) == len(masks) and maps.size > 0
    if not fits or any(big % small for big, small in zip(masks.shape, maps.shape, strict=True)):
        raise PhantomError(
            f"maps {maps.shape} and masks {masks.shape} do not fit; give [films, h, w] and "
            "[films, H, W], with H and W multiples of h and w"
        )
    if masks.dtype != bool or not np.isfinite(maps).all():
        raise PhantomError(f"masks are {masks.dtype}; give bool masks, and maps of finite numbers")
    if not 0 < threshold <= 1:
        raise PhantomError(f"the threshold is {threshold}; give a share above 0, at most 1")
    found = masks.any((1, 2)) & ~masks.all((1, 2))
    if not found.any():
        raise PhantomError(f"none of {len(masks)} films has anything to find; give films that do")
    columns = [_one(*pair, threshold) for pair in zip(maps[found], masks[found], strict=True)]
    scores = np.array(columns)
    n = len(scores)
    errors = scores.std(0, ddof=1) / n**0.5 if n > 1 else np.zeros(4)
    means = [Mean(float(m), float(e)) for m, e in zip(scores.mean(0), errors, strict=True)]
    return Localisation(n, len(masks) - n, *means)


def _one(patches: np.ndarray, mask: np.ndarray, threshold: float) -> tuple[float, ...]:
    """Pixel AUROC, pointing, chance of pointing, and IoU of one film."""
    high, wide = (big // small for big, small in zip(mask.shape, patches.shape, strict=True))
    pixels = patches.repeat(high, 0).repeat(wide, 1)
    scores = torch.from_numpy(np.ascontiguousarray(pixels.reshape(-1, 1)))
    area = float(auroc(scores, torch.from_numpy(mask.reshape(-1)))[0])
    meets = np.any(mask.reshape(patches.shape[0], high, patches.shape[1], wide), axis=(1, 3))
    peak = patches.max()
    marked = pixels >= threshold * peak if peak > 0 else np.zeros_like(mask)
    iou = (marked & mask).sum() / (marked | mask).sum()
    return area, float(np.mean(meets, where=patches == peak)), float(meets.mean()), float(iou)
