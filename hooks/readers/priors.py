"""Which earlier examination of a patient is the prior of which."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, time
from typing import NamedTuple, Protocol, TypeVar

from hooks.studies import Film

FRONTAL = ("PA", "AP")
"""View positions of an upright or portable frontal film, the preferred one first."""

LATERAL = ("LATERAL", "LL", "RL")

MEANINGS = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "lateral": "LATERAL",
    "left lateral": "LL",
    "right lateral": "RL",
}
"""Meanings of DICOM view codes, used where ViewPosition is empty."""


class Moment(NamedTuple):
    """When an examination was; either part may be unknown."""

    date: date | None = None
    time: time | None = None

    def __str__(self) -> str:
        day = self.date.isoformat() if self.date else ""
        return f"{day}T{self.time.isoformat('seconds')}" if self.date and self.time else day


def moment(day: str, clock: str, dropped_zeros: bool = False) -> Moment:
    """A moment from DICOM's ``YYYYMMDD`` and ``HHMMSS.frac``; what cannot be read is unknown.

    ``dropped_zeros`` says that the time went through a number, as in MIMIC-CXR, so that
    ``83045.1`` is 08:30:45.

    >>> str(moment("21800506", "83045.1", dropped_zeros=True)), str(moment("20200102", "0830"))
    ('2180-05-06T08:30:45', '2020-01-02T08:30:00')
    """
    day = day.split(".")[0].replace("-", "")
    digits = clock.split(".")[0].replace(":", "")
    digits = digits.zfill(6) if digits and dropped_zeros else digits.ljust(6, "0")
    return Moment(_date(day), _time(digits) if clock else None)


def _date(digits: str) -> date | None:
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        return None


def _time(digits: str) -> time | None:
    try:
        return time(int(digits[:2]), int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return None


def before(first: Moment, second: Moment) -> bool:
    """Whether the first is surely earlier; unknown dates, or times within a day, are not.

    >>> noon, one = moment("20200102", "12"), moment("20200102", "13")
    >>> before(noon, one), before(noon, moment("20200102", "")), before(noon, moment("", "13"))
    (True, False, False)
    """
    if first.date is None or second.date is None:
        return False
    if first.date != second.date:
        return first.date < second.date
    return first.time is not None and second.time is not None and first.time < second.time


class Dated(Protocol):
    @property
    def when(self) -> Moment: ...


D = TypeVar("D", bound=Dated)


def latest_before(current: Dated, others: Sequence[D]) -> D | None:
    """The last of ``others`` that is surely earlier than ``current``."""
    earlier = [other for other in others if before(other.when, current.when)]
    if not earlier:
        return None
    return max(earlier, key=lambda other: (other.when.date, other.when.time or time.min))


def view_of(position: str, meaning: str = "") -> str:
    """The view's name: ViewPosition, or what the code's meaning says, or an empty string."""
    return position.strip().upper() or MEANINGS.get(meaning.strip().lower(), "")


def choose(films: Sequence[Film], views: Sequence[str]) -> Film | None:
    """The first film of the most preferred view."""
    for view in views:
        for film in films:
            if film.view == view:
                return film
    return None
