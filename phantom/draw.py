"""Films: a scene developed into grey pixels, with the exact place of everything on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from phantom.anatomy import Acquisition, Anatomy
from phantom.canvas import Scene, clip
from phantom.factors import LABELS, Factors, PhantomError, generator
from phantom.frontal import frontal
from phantom.lateral import lateral

View = Literal["frontal", "lateral"]
FILM_SIZE = 112
"""Height and width of a film in pixels, unless asked otherwise."""
PATCH_SIZE = 14
"""Height and width of an image patch in pixels, unless asked otherwise."""

_VIEWS: Mapping[str, Callable[[Factors, Anatomy, Acquisition, int], Scene]] = {
    "frontal": frontal,
    "lateral": lateral,
}
_TISSUE_WHITE = 0.86  # brightness of the densest tissue; only metal and plastic are brighter
_MIDDLE = 0.45  # the density that a change of contrast leaves alone
# Noise is the sum of two random bytes; this is its standard deviation, 255 its mean.
_BYTES_SPREAD = ((256**2 - 1) / 6) ** 0.5


class Box(NamedTuple):
    """A rectangle, in fractions of the film's width and height; x to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float


def box_of(mask: np.ndarray) -> Box:
    """The smallest box that holds every pixel of a mask.

    Args:
        mask: bool of shape (H, W).

    Returns:
        The box, edges of the outermost pixels included: a mask of the whole film gives 0 to 1.

    Raises:
        PhantomError: the mask is empty.
    """
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise PhantomError("an empty mask has no box; check mask.any() first")
    height, width = mask.shape
    edges = (cols[0] / width, rows[0] / height, (cols[-1] + 1) / width, (rows[-1] + 1) / height)
    return Box(*map(float, edges))


@dataclass(frozen=True, eq=False)
class Film:
    """One film and the truth about it.

    Masks, boxes and regions are worked out when first asked for, which costs one more drawing
    unless the film was drawn with `annotate=True`.
    """

    pixels: np.ndarray = field(repr=False)
    """Grey levels: uint8 (size, size). A frontal film has the patient's left on its right."""
    view: View
    factors: Factors
    """What is wrong with the patient."""
    anatomy: Anatomy = field(repr=False)
    acquisition: Acquisition = field(repr=False)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.pixels.shape[0]

    @cached_property
    def masks(self) -> Mapping[str, np.ndarray]:
        """Where each finding is: bool (size, size) by label, for every finding of the factors."""
        return _masks(self._redraw(), self.size)

    @cached_property
    def boxes(self) -> Mapping[str, Box]:
        """The box around each finding, by label."""
        return {label: box_of(mask) for label, mask in self.masks.items()}

    @cached_property
    def regions(self) -> Mapping[str, np.ndarray]:
        """Where the anatomy is: bool (size, size) by name.

        The names are left lung, right lung, heart, mediastinum, abdomen (all that lies below the
        diaphragm), spine and trachea. On a lateral film the two lungs overlap.
        """
        return {name: opacity > 0.5 for name, opacity in self._redraw().regions().items()}

    def coverage(self, patch: int = PATCH_SIZE) -> np.ndarray:
        """How much of every image patch each finding covers.

        Args:
            patch: height and width of a patch in pixels.

        Returns:
            float32 of shape (14, size // patch, size // patch), shares from 0 to 1, in the order
            of `LABELS`; rows of patches run down the film.

        Raises:
            PhantomError: the film is not a whole number of patches wide.
        """
        if patch < 1 or self.size % patch:
            raise PhantomError(
                f"a film of {self.size} pixels has no whole number of patches of {patch} pixels; "
                f"choose a patch size that divides {self.size}"
            )
        grid = self.size // patch
        out = np.zeros((len(LABELS), grid, grid), np.float32)
        for label, mask in self.masks.items():
            shares = mask.reshape(grid, patch, grid, patch).mean((1, 3), dtype=np.float32)
            out[LABELS.index(label)] = shares
        return out

    def _redraw(self) -> Scene:
        return _VIEWS[self.view](self.factors, self.anatomy, self.acquisition, self.size)


def draw(
    factors: Factors,
    anatomy: Anatomy,
    acquisition: Acquisition,
    *,
    view: View = "frontal",
    size: int = FILM_SIZE,
    annotate: bool = False,
) -> Film:
    """Draw a film: the same arguments give the same bytes.

    Args:
        factors: what is wrong with the patient.
        anatomy: who the patient is; films of one patient share it.
        acquisition: how this film is taken.
        view: frontal, or lateral.
        size: height and width in pixels.
        annotate: work out masks and boxes in the same drawing.

    Returns:
        The film.

    Raises:
        PhantomError: there is no such view, or the size is too small to show a tube.

    Example:
        >>> from phantom import Factors, draw, sample_acquisition, sample_anatomy
        >>> film = draw(Factors(), sample_anatomy(0), sample_acquisition(0))
        >>> film.pixels.shape, film.masks
        ((112, 112), {})
    """
    if view not in _VIEWS:
        raise PhantomError(f"there is no view {view!r}; use one of: {', '.join(_VIEWS)}")
    scene = _VIEWS[view](factors, anatomy, acquisition, size)
    film = Film(_develop(scene, acquisition, view), view, factors, anatomy, acquisition)
    if annotate:
        film.__dict__["masks"] = _masks(scene, size)
    return film


def _masks(scene: Scene, size: int) -> Mapping[str, np.ndarray]:
    """Where each finding covers more than half of what lies behind it, in the labels' order."""
    out = {}
    for label in LABELS:
        if label in scene.findings:
            window, opacity = scene.findings[label]
            out[label] = np.zeros((size, size), bool)
            out[label][window] = opacity > 0.5
    return out


def _develop(scene: Scene, acquisition: Acquisition, view: View) -> np.ndarray:
    """Grey levels of a scene, uint8 (H, W): contrast, tone curve, devices, marker, noise.

    The tone curve is d (1 + g) / (1 + g d), a gamma without a power.
    """
    density = scene.density * acquisition.contrast
    density += _MIDDLE + acquisition.exposure - _MIDDLE * acquisition.contrast
    bend = acquisition.gamma
    grey = clip(density) * (_TISSUE_WHITE * (1 + bend))
    density *= bend
    density += 1
    grey /= density
    for (window, opacity), brightness in scene.devices:
        grey[window] += opacity * (brightness - grey[window])
    if view == "frontal":
        _mark_left(grey)
    raw = generator(acquisition.noise_seed, "noise").bytes(2 * grey.size)
    pair = np.frombuffer(raw, "<u2").reshape(grey.shape)
    strength = 255 * acquisition.noise / _BYTES_SPREAD
    grey *= 255
    grey += ((pair & 255) + (pair >> 8)).astype(np.float32) * np.float32(strength)
    grey += 0.5 - 255 * strength
    return grey.clip(np.float32(0), np.float32(255), out=grey).astype(np.uint8)


def _mark_left(grey: np.ndarray) -> None:
    """Set the lead letter L in the corner over the patient's left shoulder."""
    step = grey.shape[0] / 112
    top, low, left, right = (round(n * step) for n in (3, 10, 103, 108))
    thick = max(1, round(2 * step))
    grey[top:low, left : left + thick] = 0.95
    grey[low - thick : low, left:right] = 0.95
