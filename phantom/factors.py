"""What is wrong with a phantom patient: findings, their factors, and how they are sampled.

Everything a film shows and everything a report says follows from a `Factors` record (and, where
there is a prior film, from the prior's record). Lengths are fractions of the film's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from hooks.files import MairaSaeError

Change = Literal["", "new", "larger", "unchanged", "smaller", "resolved"]
"""How a finding compares with the prior film; empty where there is nothing to compare."""


class PhantomError(MairaSaeError, ValueError):
    """A phantom was asked for something that it cannot be; the text says what to do next."""


class Label(NamedTuple):
    """One finding at one place. Sides are the patient's: left is on the right of the image."""

    kind: str
    """What it is, such as `effusion`."""
    side: Literal["left", "right", ""] = ""
    """The patient's side; empty where the finding has none."""
    zone: Literal["upper", "lower", ""] = ""
    """The half of the lung, for nodules only."""

    @property
    def name(self) -> str:
        """The label as one word, such as `nodule_left_upper`."""
        return "_".join(part for part in self if part)


_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_ZONES: tuple[Literal["upper"], Literal["lower"]] = ("upper", "lower")
_ALL = (
    *(Label("effusion", side) for side in _SIDES),
    Label("cardiomegaly"),
    Label("pacemaker"),
    Label("endotracheal_tube"),
    Label("nasogastric_tube"),
    *(Label("nodule", side, zone) for side in _SIDES for zone in _ZONES),
    *(Label("pneumothorax", side) for side in _SIDES),
    *(Label("consolidation", side) for side in _SIDES),
)
PARTS: Mapping[str, Label] = MappingProxyType({label.name: label for label in _ALL})
"""Every label's name with its parts."""
LABELS: tuple[str, ...] = tuple(PARTS)
"""The fourteen labels, in the order in which every table and vector lists them."""
KINDS: tuple[str, ...] = tuple(dict.fromkeys(label.kind for label in _ALL))
DEVICES = ("pacemaker", "endotracheal_tube", "nasogastric_tube")

BANDS: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        # height of the fluid level over the top of the diaphragm
        "effusion": {"small": (0.05, 0.08), "large": (0.21, 0.36)},
        # width of the heart over the inner width of the chest (normal: see anatomy.py)
        "cardiomegaly": {"": (0.59, 0.66)},
        # height at which the lead ends, from the top of the film
        "pacemaker": {"": (0.63, 0.67)},
        # height at which the tube ends, from the top of the film
        "endotracheal_tube": {"": (0.20, 0.26)},
        "nasogastric_tube": {"high": (0.48, 0.56), "stomach": (0.85, 0.90)},
        "nodule": {"": (0.035, 0.055)},  # radius
        "pneumothorax": {"": (0.075, 0.115)},  # gap between the lung and the chest wall
        "consolidation": {"": (0.090, 0.125)},  # radius
    }
)
"""For each kind its grades, and the extents that belong to each. The gaps between the bands are
the margins that make a grade unambiguous."""

CHANGE_MARGIN = 0.09
"""An effusion is larger or smaller when its level moved at least this far."""
SAME_WITHIN = 0.01
"""A finding is unchanged when its extent moved no further than this."""


_STREAMS = (
    "clinical",
    "independent",
    "prior",
    "anatomy",
    "acquisition",
    "texture",
    "noise",
    "report",
    "study",
    "prompt",
)


def generator(seed: int, stream: str, film: int = 0) -> np.random.Generator:
    """The random numbers of one stage, independent of those of every other stage and film.

    Raises:
        PhantomError: the seed is not a whole number from 0.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise PhantomError(f"the seed is {seed!r}; give a whole number from 0")
    return np.random.default_rng([seed, _STREAMS.index(stream), film])


def parts(label: str) -> Label:
    """The kind, side and zone of a label.

    Raises:
        PhantomError: there is no such label.
    """
    try:
        return PARTS[label]
    except KeyError:
        known = ", ".join(LABELS)
        raise PhantomError(f"no label is called {label!r}; use one of: {known}") from None


def labels_of(kind: str) -> tuple[str, ...]:
    """The labels of a kind, such as both effusions."""
    return tuple(name for name, label in PARTS.items() if label.kind == kind)


def may_be_subtle(label: str, grade: str) -> bool:
    """Whether such a finding may be drawn faintly and reported as possible only."""
    kind = parts(label).kind
    return kind in ("nodule", "pneumothorax", "consolidation") or grade == "small"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding, as it is drawn.

    Raises:
        PhantomError: the label is unknown, the extent lies outside every band of its kind, a
            position is outside 0 to 1, or the finding cannot be subtle.
    """

    label: str
    """One of `LABELS`."""
    extent: float
    """Its size, in the unit that `BANDS` gives for its kind (fractions of the film)."""
    across: float = 0.5
    """Where it sits between the midline (0) and the chest wall (1), within its zone."""
    along: float = 0.5
    """Where it sits between the top (0) and the bottom (1) of its zone."""
    depth: float = 0.5
    """Where it sits between the breastbone (0) and the spine (1); the lateral film shows it."""
    subtle: bool = False
    """Drawn with two thirds of the contrast, and reported as possible, never as present."""

    def __post_init__(self) -> None:
        grade = self.grade
        for name in ("across", "along", "depth"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise PhantomError(f"{self.label}: {name} is {value}; give a number from 0 to 1")
        if self.subtle and not may_be_subtle(self.label, grade):
            what = f"{grade} {self.label}".strip()
            raise PhantomError(f"a {what} cannot be subtle; leave subtle=False")

    @property
    def grade(self) -> str:
        """The band that holds the extent: small, large, high, stomach, or empty."""
        bands = BANDS[parts(self.label).kind]
        for name, (low, high) in bands.items():
            if low <= self.extent <= high:
                return name
        asked = ", ".join(f"{name or 'any'} {low} to {high}" for name, (low, high) in bands.items())
        raise PhantomError(f"{self.label}: extent {self.extent} is in no band; choose in {asked}")


@dataclass(frozen=True, slots=True)
class Factors:
    """Everything that is wrong with one patient at one time.

    Raises:
        PhantomError: a label is given twice, or the findings are not in the order of `LABELS`.
    """

    findings: tuple[Finding, ...] = ()
    """At most one finding for each label, in the order of `LABELS`."""
    sick: bool = False
    """The latent state that the clinical sampler shares between findings. No report states it."""

    def __post_init__(self) -> None:
        order = [LABELS.index(finding.label) for finding in self.findings]
        if any(a >= b for a, b in pairwise(order)):
            found = ", ".join(finding.label for finding in self.findings)
            raise PhantomError(f"findings must be unique and in the order of LABELS, not {found}")

    def get(self, label: str) -> Finding | None:
        """The finding at a label, or None where the patient has none."""
        parts(label)
        return next((finding for finding in self.findings if finding.label == label), None)

    @property
    def present(self) -> tuple[str, ...]:
        """The labels of what the patient has."""
        return tuple(finding.label for finding in self.findings)

    def vector(self) -> np.ndarray:
        """Presence of every label: float32 of shape (14,), 0 or 1, in the order of `LABELS`."""
        present = set(self.present)
        return np.array([label in present for label in LABELS], np.float32)


def change(label: str, now: Factors, before: Factors) -> Change:
    """How one finding changed from the prior film to this one.

    Args:
        label: one of `LABELS`.
        now: what the current film shows.
        before: what the prior film shows.

    Returns:
        Empty where neither film shows it. Only an effusion can be larger or smaller.

    Raises:
        PhantomError: both films show it and the two differ by an amount that no word describes.

    Example:
        >>> small = Factors((Finding("effusion_left", 0.06),))
        >>> change("effusion_left", small, Factors())
        'new'
    """
    new, old = now.get(label), before.get(label)
    if new is None or old is None:
        return "new" if new else "resolved" if old else ""
    grown = new.extent - old.extent
    if parts(label).kind == "effusion" and abs(grown) >= CHANGE_MARGIN:
        return "larger" if grown > 0 else "smaller"
    if abs(grown) <= SAME_WITHIN and new.subtle == old.subtle:
        return "unchanged"
    raise PhantomError(
        f"{label}: extent {old.extent:.3f} (subtle {old.subtle}) before and {new.extent:.3f} "
        f"(subtle {new.subtle}) now is neither a clear change nor none; keep both within "
        f"{SAME_WITHIN}, or for an effusion at least {CHANGE_MARGIN} apart"
    )


CLINICAL: Mapping[str, tuple[float, Mapping[str, float]]] = MappingProxyType(
    {
        "cardiomegaly": (0.18, {"sick": 0.27}),
        "pacemaker": (0.12, {"cardiomegaly": 0.38}),
        "endotracheal_tube": (0.06, {"sick": 0.49}),
        "nasogastric_tube": (0.08, {"endotracheal_tube": 0.67}),
        **{f"effusion_{s}": (0.10, {"sick": 0.25, "cardiomegaly": 0.20}) for s in _SIDES},
        **{f"consolidation_{s}": (0.08, {"sick": 0.24}) for s in _SIDES},
        **{f"pneumothorax_{s}": (0.09, {"endotracheal_tube": 0.12}) for s in _SIDES},
        **{f"nodule_{s}_{z}": (0.16, {}) for s in _SIDES for z in _ZONES},
    }
)
"""The clinical sampler: the rate of each label, and what each cause adds to it when present. A
cause stands above whatever it causes."""
SICK_RATE = 0.40
SUBTLE_RATE = 0.25
"""How often a finding that may be subtle is."""
_LARGE_RATE, _HIGH_RATE = 0.5, 0.35
_DRAWS = 7  # uniform numbers that one label uses: presence, grade, subtle, extent, three places


def clinical_factors(seed: int) -> Factors:
    """Sample findings that occur together as they do in clinics, after `CLINICAL`.

    A latent sick patient has more of everything but nodules; a large heart brings effusions and a
    pacemaker, an endotracheal tube brings a nasogastric one.
    """
    uniform = generator(seed, "clinical").random(_DRAWS * len(LABELS) + 1).tolist()
    present = {"sick"} if uniform[-1] < SICK_RATE else set()
    draws = {label: uniform[_DRAWS * i : _DRAWS * (i + 1)] for i, label in enumerate(LABELS)}
    for label, (rate, causes) in CLINICAL.items():
        if draws[label][0] < rate + sum(add for cause, add in causes.items() if cause in present):
            present.add(label)
    chosen = tuple(_finding(label, draws[label]) for label in LABELS if label in present)
    return Factors(chosen, "sick" in present)


def independent_factors(seed: int, rate: float | Mapping[str, float] = 0.25) -> Factors:
    """Sample every label independently of every other.

    Args:
        seed: any integer from 0.
        rate: how often each label occurs, 0 to 1; one number, or one for each label (a label
            that is left out never occurs).

    Raises:
        PhantomError: a rate is outside 0 to 1, or belongs to no label.
    """
    rates = rate if isinstance(rate, Mapping) else dict.fromkeys(LABELS, rate)
    for label, value in rates.items():
        parts(label)
        if not 0 <= value <= 1:
            raise PhantomError(f"the rate of {label} is {value}; give a number from 0 to 1")
    uniform = generator(seed, "independent").random((len(LABELS), _DRAWS)).tolist()
    pairs = zip(LABELS, uniform, strict=True)
    return Factors(tuple(_finding(label, u) for label, u in pairs if u[0] < rates.get(label, 0)))


def prior_factors(now: Factors, seed: int) -> Factors:
    """Sample what the same patient's prior film showed.

    Each label is drawn by itself: what is there now was there before or is new; what is not there
    now was not there before or has resolved. Effusions also shrink and grow, by `CHANGE_MARGIN`
    at least.
    """
    uniform = generator(seed, "prior").random((len(LABELS), 2 + _DRAWS)).tolist()
    current = {finding.label: finding for finding in now.findings}
    found = []
    for label, (choice, amount, *rest) in zip(LABELS, uniform, strict=True):
        finding = current.get(label)
        if finding is None:
            old = _finding(label, rest) if choice < 0.15 else None
        elif parts(label).kind == "effusion":
            old = _earlier_effusion(finding, choice, amount)
        else:
            old = None if choice < 0.35 else finding
        if old is not None:
            found.append(old)
    return Factors(tuple(found), now.sick)


def _earlier_effusion(now: Finding, choice: float, amount: float) -> Finding | None:
    """No effusion, the same one, or one that is clearly smaller or larger, as `choice` says."""
    (small_low, small_high), (large_low, large_high) = BANDS["effusion"].values()
    least = CHANGE_MARGIN + 0.001  # so that rounding never takes a sampled change below it
    ways: list[tuple[float, float] | None] = [None, (now.extent, now.extent)]
    if now.grade == "small":
        ways += [(large_low, large_high)]
    else:
        ways += [(small_low, small_high)]
        if now.extent - least >= large_low:
            ways += [(large_low, now.extent - least)]
        if now.extent + least <= large_high:
            ways += [(now.extent + least, large_high)]
    way = ways[int(choice * len(ways))]
    if way is None:
        return None
    low, high = way
    extent = low + (high - low) * amount
    return replace(now, extent=extent, subtle=now.subtle and extent <= small_high)


def _finding(label: str, uniform: list[float]) -> Finding:
    """The finding that seven uniform numbers describe; the first decided that it is there."""
    _, grade, subtle, extent, across, along, depth = uniform
    bands = BANDS[parts(label).kind]
    first, *others = bands
    first_rate = 1.0 if not others else _HIGH_RATE if first == "high" else 1 - _LARGE_RATE
    name = first if grade < first_rate else others[0]
    low, high = bands[name]
    faint = subtle < SUBTLE_RATE and may_be_subtle(label, name)
    return Finding(label, low + (high - low) * extent, across, along, depth, faint)
