"""Who the phantom patient is, and how one film of the patient was taken."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np

from phantom.factors import PhantomError, generator

ANATOMY_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "chest": (0.290, 0.325),
        "apex": (0.085, 0.120),
        "dome": (0.690, 0.735),
        "arch": (1.6, 2.2),
        "right_rise": (0.015, 0.035),
        "heart_ratio": (0.40, 0.47),
        "heart_height": (0.150, 0.170),
        "mediastinum": (0.052, 0.064),
        "knob": (0.018, 0.034),
        "rib_spacing": (0.074, 0.086),
        "rib_phase": (0.0, 1.0),
        "rib_slope": (0.25, 0.55),
        "bone": (0.80, 1.20),
        "soft": (0.50, 0.60),
        "air": (0.38, 0.44),
        "clavicle": (0.135, 0.165),
    }
)
"""The range of every field of `Anatomy`, but for the marking seed."""

ACQUISITION_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "rotation": (-4.0, 4.0),
        "shift_right": (-0.020, 0.020),
        "shift_down": (-0.015, 0.015),
        "zoom": (0.97, 1.03),
        "inspiration": (-0.006, 0.006),
        "exposure": (-0.05, 0.05),
        "contrast": (0.88, 1.12),
        "gamma": (-0.25, 0.35),
        "noise": (0.010, 0.030),
    }
)
"""The range of every field of `Acquisition`, but for the noise seed."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """One patient's body: what every film of the patient shares.

    Lengths are fractions of the film's width; heights run from the top of an upright film.

    Raises:
        PhantomError: a field is outside its range in `ANATOMY_RANGES`.
    """

    chest: float
    """Half the inner width of the chest beyond the lung's apex."""
    apex: float
    """Height of the top of the lungs."""
    dome: float
    """Height of the top of the left half of the diaphragm."""
    arch: float
    """How steeply the diaphragm falls away from its top."""
    right_rise: float
    """How much higher the right half of the diaphragm stands."""
    heart_ratio: float
    """Width of a healthy heart over the inner width of the chest."""
    heart_height: float
    """Half the long axis of the heart."""
    mediastinum: float
    """Half the width of the mediastinum."""
    knob: float
    """How far the aortic arch reaches into the left lung."""
    rib_spacing: float
    """Distance from one rib to the next."""
    rib_phase: float
    """Where the first rib lies, 0 to 1 of the spacing."""
    rib_slope: float
    """How steeply the ribs fall."""
    bone: float
    """Density of bone, about 1."""
    soft: float
    """Density of soft tissue."""
    air: float
    """How much density the air of a lung takes away."""
    clavicle: float
    """Height of the inner end of the collar bones."""
    marking_seed: int
    """Seed of the vessels and of the texture of the lungs."""

    def __post_init__(self) -> None:
        _check(self, ANATOMY_RANGES)


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How one film was taken.

    Raises:
        PhantomError: a field is outside its range in `ACQUISITION_RANGES`.
    """

    rotation: float
    """Degrees by which the film is turned; positive turns the patient clockwise."""
    shift_right: float
    """How far the patient stands to the right of the image's middle, in film widths."""
    shift_down: float
    """How far the patient stands below the middle, in film widths."""
    zoom: float
    """Magnification, about 1."""
    inspiration: float
    """How much lower the diaphragm stands than in the anatomy, in film widths."""
    exposure: float
    """Brightness added to the whole film, where the film runs from 0 to 1."""
    contrast: float
    """Factor on the density before the tone curve, about 1."""
    gamma: float
    """Bend of the tone curve: above 0 lifts the dark parts, below 0 drops them."""
    noise: float
    """Standard deviation of the noise, where the film runs from 0 to 1."""
    noise_seed: int
    """Seed of the noise."""

    def __post_init__(self) -> None:
        _check(self, ACQUISITION_RANGES)


def sample_anatomy(seed: int) -> Anatomy:
    """A patient, drawn evenly from `ANATOMY_RANGES`."""
    return Anatomy(*_draw(generator(seed, "anatomy"), ANATOMY_RANGES), marking_seed=seed)


def sample_acquisition(seed: int, film: int = 0) -> Acquisition:
    """The taking of a film, drawn evenly from `ACQUISITION_RANGES`.

    Args:
        seed: the patient's seed.
        film: which of the patient's films it is, 0 to 9; each is taken anew.

    Raises:
        PhantomError: the number of the film is outside 0 to 9.
    """
    if not 0 <= film <= 9:
        raise PhantomError(f"the film's number is {film}; a patient has films 0 to 9")
    values = _draw(generator(seed, "acquisition", film), ACQUISITION_RANGES)
    return Acquisition(*values, noise_seed=10 * seed + film)


def _draw(rng: np.random.Generator, ranges: Mapping[str, tuple[float, float]]) -> list[float]:
    uniform = rng.random(len(ranges)).tolist()
    pairs = zip(ranges.values(), uniform, strict=True)
    return [low + (high - low) * u for (low, high), u in pairs]


def _check(record: Anatomy | Acquisition, ranges: Mapping[str, tuple[float, float]]) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        low, high = ranges.get(field.name, (0, np.inf))
        if not low <= value <= high:
            what = f"{type(record).__name__}.{field.name}"
            raise PhantomError(f"{what} is {value}; choose a value from {low} to {high}")
