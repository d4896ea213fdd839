"""One phantom study: films, findings and report of one patient, all from one seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from phantom.anatomy import Anatomy, sample_acquisition, sample_anatomy
from phantom.draw import FILM_SIZE, Film, draw
from phantom.factors import (
    Factors,
    PhantomError,
    clinical_factors,
    generator,
    independent_factors,
    prior_factors,
)
from phantom.findings import Findings
from phantom.language import DEFAULT_BINS
from phantom.reports import Report, write_report

Sampler = Literal["clinical", "independent"]
LATERAL_RATE = 0.3
"""How often a study has a lateral film, unless asked."""
PRIOR_RATE = 0.5
"""How often a study has a prior film, unless asked."""


@dataclass(frozen=True, slots=True, eq=False)
class PhantomStudy:
    """The films and the report of one visit of a phantom patient."""

    seed: int
    """Everything else follows from it, and from the arguments of `sample_study`."""
    factors: Factors = field(repr=False)
    """What the current films show."""
    prior_factors: Factors | None = field(repr=False)
    """What the prior film shows; None without one."""
    anatomy: Anatomy = field(repr=False)
    """The patient, whom all films share."""
    frontal: Film = field(repr=False)
    """The current frontal film."""
    lateral: Film | None = field(repr=False)
    """The current lateral film, of the same moment."""
    prior: Film | None = field(repr=False)
    """The prior frontal film: the same patient, taken anew."""
    findings: Findings
    """What the report states."""
    report: Report

    def films(self) -> tuple[Film, ...]:
        """The films there are, in MAIRA-2's order: frontal, lateral, prior."""
        return tuple(film for film in (self.frontal, self.lateral, self.prior) if film is not None)


def sample_study(
    seed: int,
    *,
    sampler: Sampler = "clinical",
    rate: float | Mapping[str, float] = 0.25,
    lateral: bool | None = None,
    prior: bool | None = None,
    grounded: bool = True,
    size: int = FILM_SIZE,
    bins: int = DEFAULT_BINS,
) -> PhantomStudy:
    """Sample a study: the same arguments give the same bytes and the same words.

    Args:
        seed: any whole number from 0.
        sampler: clinical (findings occur together as in clinics) or independent.
        rate: how often each label occurs with the independent sampler (`independent_factors`).
        lateral: whether there is a lateral film; None leaves it to chance (`LATERAL_RATE`).
        prior: whether there is a prior film; None leaves it to chance (`PRIOR_RATE`).
        grounded: write the grounded form too, which needs the masks of the frontal film.
        size: height and width of the films in pixels.
        bins: steps of a box coordinate.

    Returns:
        The study.

    Raises:
        PhantomError: an argument is outside what its description allows.

    Example:
        >>> from phantom import read_report, sample_study
        >>> study = sample_study(7, prior=False)
        >>> read_report(study.report.text).findings == study.findings
        True
    """
    if sampler == "clinical":
        now = clinical_factors(seed)
    elif sampler == "independent":
        now = independent_factors(seed, rate)
    else:
        raise PhantomError(f"there is no sampler {sampler!r}; use clinical or independent")
    by_lateral, by_prior = generator(seed, "study").random(2)
    has_lateral = by_lateral < LATERAL_RATE if lateral is None else lateral
    has_prior = by_prior < PRIOR_RATE if prior is None else prior
    before = prior_factors(now, seed) if has_prior else None
    body = sample_anatomy(seed)
    front = draw(now, body, sample_acquisition(seed, 0), size=size, annotate=grounded)
    side = old = None
    if has_lateral:
        side = draw(now, body, sample_acquisition(seed, 1), view="lateral", size=size)
    if before is not None:
        old = draw(before, body, sample_acquisition(seed, 2), size=size)
    findings = Findings.of(now, before)
    report = write_report(
        findings,
        seed,
        lateral=bool(has_lateral),
        prior=bool(has_prior),
        boxes=front.boxes if grounded else None,
        bins=bins,
    )
    return PhantomStudy(seed, now, before, body, front, side, old, findings, report)
