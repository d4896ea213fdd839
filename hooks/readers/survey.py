"""What a data set holds: counts, splits, gaps and leaks, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hooks.files import StudyError
from hooks.images import read_image
from hooks.studies import Skipped, SplitCheck, Study

COUNTED = (
    "lateral",
    "prior",
    "prior_report",
    "indication",
    "technique",
    "comparison",
    "report",
    "labels",
    "uncertain",
    "sentences",
    "changes",
    "patient",
    "taken",
)


@dataclass
class Gap:
    """Studies skipped for one kind of reason."""

    n: int
    first: str
    """Id and reason of the first."""


@dataclass
class Survey:
    """Counts of a data set; see :func:`survey`."""

    studies: int = 0
    patients: int = 0
    films: int = 0
    """In all, priors not counted twice."""
    sentences: int = 0
    boxes: int = 0
    """Of first readers."""
    have: dict[str, int] = field(default_factory=dict)
    """Field of the study → studies that have it."""
    labels: dict[str, int] = field(default_factory=dict)
    """Commonest first."""
    given_splits: dict[str, int] = field(default_factory=dict)
    """Studies in each of the data set's splits."""
    splits: dict[str, int] = field(default_factory=dict)
    """Studies on each side of ours."""
    gaps: dict[str, Gap] = field(default_factory=dict)
    """Kind of reason → studies skipped."""
    leaks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey(studies: Iterable[Study | Skipped], open_films: bool = False) -> Survey:
    """Count what is there and what is missing.

    Parameters
    ----------
    open_films
        Open every film a model would be shown, and count those that cannot be read as gaps.
    """
    found = Survey(have=dict.fromkeys(COUNTED, 0))
    with SplitCheck() as check:
        _count(found, check, studies, open_films)
        found.patients, found.leaks = check.n_patients(), check.leaks()
    found.labels = dict(sorted(found.labels.items(), key=lambda item: (-item[1], item[0])))
    return found


def _count(
    found: Survey, check: SplitCheck, studies: Iterable[Study | Skipped], open_films: bool
) -> None:
    for study in studies:
        if isinstance(study, Skipped):
            _gap(found, study)
            continue
        if open_films and (unreadable := _unreadable(study)):
            _gap(found, unreadable)
            continue
        check.add(study)
        found.studies += 1
        found.films += len(study.images) or 1 + (study.lateral is not None)
        found.sentences += len(study.sentences)
        found.boxes += sum(len(sentence.boxes or ()) for sentence in study.sentences)
        for name in COUNTED:
            found.have[name] += bool(getattr(study, name))
        for label in study.labels:
            found.labels[label] = found.labels.get(label, 0) + 1
        for counts, side in (
            (found.given_splits, study.given_split or "none"),
            (found.splits, study.split()),
        ):
            counts[side] = counts.get(side, 0) + 1


def _gap(found: Survey, skipped: Skipped) -> None:
    kind = skipped.reason.split(":")[0]
    gap = found.gaps.setdefault(kind, Gap(0, f"{skipped.study_id}: {skipped.reason}"))
    gap.n += 1


def _unreadable(study: Study) -> Skipped | None:
    for film in study.films():
        try:
            read_image(film)
        except StudyError as error:
            return Skipped(study.id, f"unreadable image: {error}")
    return None
