"""The sheet that views draw on: where every pixel lies in the patient, and soft-edged shapes.

Arrays are float32 and use only operations that IEEE arithmetic rounds exactly (+ - * / sqrt,
minimum, floor), so that the bytes of a seed do not depend on SIMD width or BLAS.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from phantom.anatomy import Acquisition
from phantom.factors import PhantomError, generator

Point = tuple[float, float]
Window = tuple[slice, slice]
SMALLEST = 84
"""Fewer pixels than this, and a tube may fall between pixels and have no mask."""
_KNOTS = 20  # coarse cells of the texture along each side of the film
# Freeing one large block makes glibc keep freed memory instead of returning it after every film:
# without this, page faults take more time than the drawing.
np.empty(1 << 24, np.uint8)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Patch(NamedTuple):
    """A shape: its opacity, 0 to 1, in a window of the film, and nothing outside the window."""

    window: Window
    opacity: np.ndarray

    def spread(self, size: int) -> np.ndarray:
        """The opacity on the whole film: float32 (size, size)."""
        out = np.zeros((size, size), np.float32)
        out[self.window] = self.opacity
        return out


class Scene(NamedTuple):
    """What a view hands over to be developed into a film."""

    density: np.ndarray
    """How much the body dims the beam, float32 (H, W): 0 is air, about 1 is bone."""
    devices: list[tuple[Patch, float]]
    """Metal and plastic with their brightness, painted on top in this order."""
    findings: dict[str, Patch]
    """The shape of every finding by its label."""
    regions: Callable[[], Mapping[str, np.ndarray]]
    """Opacity (H, W) of every region of the anatomy by its name; worked out when called."""


@lru_cache(maxsize=8)
def _axis(size: int) -> np.ndarray:
    """Pixel centres of a film measured from its middle: float32 (size,)."""
    return ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)


@lru_cache(maxsize=8)
def _spread(size: int) -> np.ndarray:
    """Smooth interpolation weights from the knots to the pixels: float32 (size, knots).

    Weights are multiples of 1/64 and the knots of 1/128, so that the sums are exact in float32
    in whatever order a BLAS adds them.
    """
    place = (np.arange(size) + 0.5) / size * (_KNOTS - 1)
    near = np.clip(1 - np.abs(place[:, None] - np.arange(_KNOTS)), 0, 1)
    return (np.rint(near * near * (3 - 2 * near) * 64) / 64).astype(np.float32)


@lru_cache(maxsize=8)
def texture(seed: int, size: int) -> np.ndarray:
    """Smooth noise between -1 and 1 with a grain of a twentieth of the film.

    Returns:
        float32 (size, size), read-only: the films of one patient share it.
    """
    raw = np.frombuffer(generator(seed, "texture").bytes(_KNOTS * _KNOTS), np.int8)
    weights = _spread(size)
    out = weights @ (raw.reshape(_KNOTS, _KNOTS).astype(np.float32) / 128) @ weights.T
    out.flags.writeable = False
    return out


def clip(values: np.ndarray) -> np.ndarray:
    """The values held between 0 and 1, in place."""
    return values.clip(_ZERO, _ONE, out=values)


def inside(distance: np.ndarray, soft: float) -> np.ndarray:
    """Opacity of a shape from the signed distance to its edge, positive inside.

    The opacity is one half on the edge and goes from 0 to 1 over the width `soft`.
    """
    out = distance * (1 / soft)
    out += 0.5
    return clip(out)


def stripes(phase: np.ndarray, power: int) -> np.ndarray:
    """Soft stripes, one for every whole step of the phase: `(1 - 4 x²) ** (2 ** power)`, with x
    the distance from the middle of the step. The phase is used up."""
    phase -= np.floor(phase)
    phase -= 0.5
    phase *= phase
    out = 1 - 4 * phase
    for _ in range(power):
        out *= out
    return out


class Canvas:
    """The patient's coordinates of every pixel of one film.

    `u` runs from the midline, positive towards the right of the image; `v` runs from 0 at the
    top to 1 at the bottom of an upright film. Both are float32 (size, size), and a step of 1 is
    the width of the film divided by the zoom.

    Raises:
        PhantomError: a film of fewer than `SMALLEST` pixels.
    """

    def __init__(self, acquisition: Acquisition, size: int) -> None:
        if size < SMALLEST:
            raise PhantomError(f"a film of {size} pixels is too small; ask for {SMALLEST} or more")
        self.acquisition, self.size = acquisition, size
        self.fine = 1.25 / size  # softness of a sharp edge: a little over a pixel
        turn = math.radians(acquisition.rotation)
        self._cos, self._sin = math.cos(turn), math.sin(turn)
        cos, sin = self._cos / acquisition.zoom, self._sin / acquisition.zoom
        x = _axis(size)[None, :] - np.float32(acquisition.shift_right)
        y = _axis(size)[:, None] - np.float32(acquisition.shift_down)
        self.u = x * cos + y * sin
        self.v = (0.5 - x * sin) + y * cos

    def window(self, points: Sequence[Point], margin: float) -> Window:
        """Rows and columns that hold every pixel within `margin` of the hull of some points."""
        film, size = self.acquisition, self.size
        cos, sin = self._cos * film.zoom, self._sin * film.zoom
        xs = [0.5 + film.shift_right + u * cos - (v - 0.5) * sin for u, v in points]
        ys = [0.5 + film.shift_down + u * sin + (v - 0.5) * cos for u, v in points]
        reach = margin * film.zoom + 1.5 / size
        return self._span(min(ys) - reach, max(ys) + reach), self._span(
            min(xs) - reach, max(xs) + reach
        )

    def _span(self, low: float, high: float) -> slice:
        size = self.size
        return slice(min(size, max(0, int(low * size))), min(size, max(0, int(high * size) + 1)))

    def rows(self, top: float, bottom: float) -> Window:
        """Whole rows that hold every pixel whose `v` lies between two heights."""
        corners = [(u, v) for u in (-0.6, 0.6) for v in (top, bottom)]
        return self.window(corners, 0.0)[0], slice(0, self.size)

    def disc(self, centre: Point, radius: float, soft: float | None = None) -> Patch:
        """A filled circle."""
        soft = soft or self.fine
        part = self.window([centre], radius + soft)
        du, dv = self.u[part] - centre[0], self.v[part] - centre[1]
        return Patch(part, inside(radius - np.sqrt(du * du + dv * dv), soft))

    def block(self, centre: Point, half: Point) -> Patch:
        """A filled rectangle with rounded corners; `half` is half its width and height."""
        part = self.window([centre], half[0] + half[1])
        corner = 0.4 * min(half)
        du = np.maximum(np.abs(self.u[part] - centre[0]) - (half[0] - corner), 0)
        dv = np.maximum(np.abs(self.v[part] - centre[1]) - (half[1] - corner), 0)
        return Patch(part, inside(corner - np.sqrt(du * du + dv * dv), self.fine))

    def tube(self, points: Sequence[Point], radius: float) -> Patch:
        """A line through some points."""
        whole = self.window(points, radius)
        u, v = self.u[whole], self.v[whole]
        out = np.zeros_like(u)
        for (u0, v0), (u1, v1) in pairwise(points):
            part = within(self.window([(u0, v0), (u1, v1)], radius), whole)
            du, dv = u[part] - u0, v[part] - v0
            eu, ev = u1 - u0, v1 - v0
            length = max(eu * eu + ev * ev, 1e-9)
            share = clip(du * (eu / length) + dv * (ev / length))
            du -= share * eu
            dv -= share * ev
            line = inside(radius - np.sqrt(du * du + dv * dv), self.fine)
            np.maximum(out[part], line, out=out[part])
        return Patch(whole, out)


def within(part: Window, whole: Window) -> Window:
    """A window as counted from the corner of another that holds it."""
    (rows, cols), (top, left) = part, (whole[0].start, whole[1].start)
    return (
        slice(rows.start - top, rows.stop - top),
        slice(cols.start - left, cols.stop - left),
    )


def union(first: Patch, second: Patch) -> Patch:
    """The shape that covers two shapes."""
    rows, cols = (
        slice(min(a.start, b.start), max(a.stop, b.stop))
        for a, b in zip(first.window, second.window, strict=True)
    )
    out = np.zeros((rows.stop - rows.start, cols.stop - cols.start), np.float32)
    for window, opacity in (first, second):
        part = within(window, (rows, cols))
        np.maximum(out[part], opacity, out=out[part])
    return Patch((rows, cols), out)


def cut(path: Sequence[Point], height: float) -> list[Point]:
    """The part of a falling path above a height, ended exactly there."""
    kept = [path[0]]
    for start, end in pairwise(path):
        if end[1] >= height:
            share = (height - start[1]) / max(end[1] - start[1], 1e-9)
            return [*kept, (start[0] + share * (end[0] - start[0]), height)]
        kept.append(end)
    return kept
