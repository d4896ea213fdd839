"""What a report can say: the discrete side of the factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from phantom.factors import (
    BANDS,
    DEVICES,
    LABELS,
    Change,
    Factors,
    PhantomError,
    change,
    may_be_subtle,
    parts,
)

Status = Literal["absent", "possible", "present"]


class State(NamedTuple):
    """What a report says about one label."""

    status: Status = "absent"
    """Possible where the finding is subtle, and only there."""
    grade: str = ""
    """Small or large (effusions), high or stomach (nasogastric tubes), else empty."""
    change: Change = ""
    """How it compares with the prior film; empty without one, or where neither film shows it."""


ABSENT = State()


def states_of(label: str, *, compared: bool) -> tuple[State, ...]:
    """Every state that a label can be in, but for plain absence.

    Args:
        label: one of `LABELS`.
        compared: whether there is a prior film.
    """
    kind = parts(label).kind
    changes: tuple[Change, ...] = ("",)
    if compared:
        sizes: tuple[Change, ...] = ("larger", "smaller") if kind == "effusion" else ()
        changes = ("new", "unchanged", *sizes)
    found = [State("present", grade, how) for grade in BANDS[kind] for how in changes]
    faint = [grade for grade in BANDS[kind] if may_be_subtle(label, grade)]
    found += [State("possible", grade, how) for grade in faint for how in changes]
    return (*found, State("absent", "", "resolved")) if compared else tuple(found)


_ALLOWED = {
    label: {ABSENT, *states_of(label, compared=False), *states_of(label, compared=True)}
    for label in LABELS
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What a report says about every label.

    Raises:
        PhantomError: the number of states is wrong, or a label cannot be in its state.

    Example:
        >>> from phantom import Factors, Finding, Findings
        >>> Findings.of(Factors((Finding("effusion_left", 0.06),)))["effusion_left"]
        State(status='present', grade='small', change='')
    """

    states: tuple[State, ...] = (ABSENT,) * len(LABELS)
    """One state for each label, in the order of `LABELS`."""

    def __post_init__(self) -> None:
        if len(self.states) != len(LABELS):
            raise PhantomError(f"{len(self.states)} states given; give one for each of {LABELS}")
        for label, state in zip(LABELS, self.states, strict=True):
            if state not in _ALLOWED[label]:
                raise PhantomError(f"{label} cannot be {state}; see states_of({label!r})")

    @classmethod
    def of(cls, factors: Factors, prior: Factors | None = None) -> "Findings":
        """What follows from the factors, and from those of the prior film where there is one.

        Raises:
            PhantomError: a finding changed by an amount that no word describes.
        """
        found = {}
        current = {finding.label: finding for finding in factors.findings}
        before = set(prior.present) if prior else set()
        for label in current.keys() | before:
            how = change(label, factors, prior) if prior is not None else ""
            finding = current.get(label)
            if finding is None:
                found[label] = State("absent", "", how)
            else:
                status = "possible" if finding.subtle else "present"
                found[label] = State(status, finding.grade, how)
        return cls.where(found)

    @classmethod
    def where(cls, states: Mapping[str, State]) -> "Findings":
        """Findings with some labels in the given states, and all others absent.

        Raises:
            PhantomError: a label is unknown, or cannot be in its state.
        """
        for label in states:
            parts(label)
        return cls(tuple(states.get(label, ABSENT) for label in LABELS))

    def __getitem__(self, label: str) -> State:
        parts(label)
        return self.states[LABELS.index(label)]

    @property
    def stated(self) -> Mapping[str, State]:
        """The labels that are anything but plainly absent, with their states."""
        pairs = zip(LABELS, self.states, strict=True)
        return {label: state for label, state in pairs if state != ABSENT}

    @property
    def seen(self) -> tuple[str, ...]:
        """The labels that are present or possible."""
        return tuple(label for label, state in self.stated.items() if state.status != "absent")

    @property
    def compared(self) -> bool:
        """Whether anything is compared with a prior film."""
        return any(state.change for state in self.states)

    def acute(self) -> "Findings":
        """What an impression repeats: all but devices, of these only a tube that ends too high."""
        return Findings.where(
            {
                label: state
                for label, state in self.stated.items()
                if parts(label).kind not in DEVICES or state.grade == "high"
            }
        )
