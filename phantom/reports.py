"""Reports: written from findings alone, plain or grounded, and read back exactly.

A grounded sentence is `<obj> small left pleural effusion . <box> <x17> <y19> <x24> <y22> </box>
</obj>`. A coordinate's token is its bin, and stands for `(bin + 0.5) / bins`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from phantom.draw import Box
from phantom.factors import DEVICES, PhantomError, generator, labels_of
from phantom.findings import ABSENT, Findings, State
from phantom.language import (
    ALL_CLEAR,
    COMPARISONS,
    DEFAULT_BINS,
    DENIALS,
    GROUPS,
    INDICATIONS,
    SECTIONS,
    TECHNIQUES,
    phrasings,
    sentences,
)

_COORDINATE = re.compile(r"<([xy])(0|[1-9]\d{0,5})>")


@dataclass(frozen=True, slots=True)
class Report:
    """The sections of one report, each a text of words parted by single blanks."""

    indication: str
    technique: str
    comparison: str
    findings: str
    impression: str
    grounded: str = ""
    """The findings once more, every sentence an object and with its box; empty without boxes."""

    @property
    def text(self) -> str:
        """All sections under their headings, with the plain findings."""
        return " ".join(f"{name} : {getattr(self, name)}" for name in SECTIONS)

    @property
    def grounded_text(self) -> str:
        """All sections under their headings, with the grounded findings.

        Raises:
            PhantomError: the report was written without boxes.
        """
        if not self.grounded:
            raise PhantomError("this report has no boxes; give write_report the boxes of the film")
        texts = {name: getattr(self, name) for name in SECTIONS} | {"findings": self.grounded}
        return " ".join(f"{name} : {text}" for name, text in texts.items())


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says, and whatever in it could not be read."""

    findings: Findings
    """What the findings say. A label that no sentence names is absent."""
    impression: Findings | None = None
    """What the impression says; None without one."""
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    """The boxes of each label that has some, as centres of their bins."""
    indication: str | None = None
    """Why the film was asked for; None without an indication."""
    lateral: bool | None = None
    """Whether the technique names a lateral film; None without a technique."""
    prior: bool | None = None
    """Whether the comparison names a prior film; None without a comparison."""
    unknown: tuple[str, ...] = ()
    """Every sentence, box or token that is not of the language, in order."""
    conflicts: tuple[str, ...] = ()
    """Labels to which one section gives two states; the first is the one that counts."""


def bins_of(box: Box, bins: int = DEFAULT_BINS) -> tuple[int, int, int, int]:
    """The bins of a box's four coordinates, 0 to `bins - 1`.

    Raises:
        PhantomError: there are no bins, or the box is not an xyxy box within 0 to 1.
    """
    if bins < 1:
        raise PhantomError(f"{bins} bins asked for; use at least 1")
    if not (0 <= box.x0 <= box.x1 <= 1 and 0 <= box.y0 <= box.y1 <= 1):
        raise PhantomError(f"{box} is no box; give x0 <= x1 and y0 <= y1 from 0 to 1")
    x0, y0, x1, y1 = (min(int(value * bins), bins - 1) for value in box)
    return x0, y0, x1, y1


def box_from(places: Sequence[int], bins: int = DEFAULT_BINS) -> Box:
    """The box whose coordinates are the centres of four bins; each is within half a bin.

    Raises:
        PhantomError: a bin does not exist, or the corners are the wrong way round.
    """
    if len(places) != 4 or not all(0 <= place < bins for place in places):
        raise PhantomError(f"{tuple(places)} are no four bins from 0 to {bins - 1}")
    x0, y0, x1, y1 = places
    if x0 > x1 or y0 > y1:
        raise PhantomError(f"box {tuple(places)} ends before it starts; give x0, y0, x1, y1")
    return Box(*((place + 0.5) / bins for place in places))


def write_report(
    findings: Findings,
    seed: int,
    *,
    lateral: bool = False,
    prior: bool = False,
    boxes: Mapping[str, Box] | None = None,
    bins: int = DEFAULT_BINS,
) -> Report:
    """Write a report. Nothing but the arguments decides what it says.

    Args:
        findings: what it states.
        seed: chooses between wordings that say the same.
        lateral: whether there is a lateral film.
        prior: whether there is a prior film.
        boxes: the box of everything seen, for a grounded report.
        bins: steps of a box coordinate.

    Returns:
        The report.

    Raises:
        PhantomError: findings that compare without a prior film, or do not with one; or a box is
            missing.

    Example:
        >>> write_report(Findings(), 0).impression
        'no acute abnormality .'
    """
    for label in findings.seen:
        if bool(findings[label].change) != prior:
            have = "a" if prior else "no"
            raise PhantomError(
                f"{label} is {findings[label]} and there is {have} prior film; "
                "use Findings.of(factors, prior_factors) exactly where there is a prior"
            )
    if findings.compared and not prior:
        raise PhantomError("the findings compare with a prior film; pass prior=True")
    dice = iter(generator(seed, "report").random(64).tolist())
    lines = _lines(findings, dice)
    grounded = ""
    if boxes is not None:
        grounded = " ".join(_ground(text, label, boxes, bins) for text, label in lines)
    return Report(
        indication=_pick(INDICATIONS, dice),
        technique=_pick(TECHNIQUES[lateral], dice),
        comparison=_pick(COMPARISONS[prior], dice),
        findings=" ".join(text for text, _ in lines),
        impression=_impression(findings, dice),
        grounded=grounded,
    )


def _pick(choices: Sequence[str], dice: Iterator[float]) -> str:
    return choices[int(next(dice) * len(choices))]


def _lines(findings: Findings, dice: Iterator[float]) -> list[tuple[str, str]]:
    """The sentences of the findings, each with the label that is seen there, or none."""
    out, stated, seen = [], findings.stated, findings.seen
    for group in GROUPS:
        denied = []
        for kind in group:
            labels = [label for label in labels_of(kind) if label in stated]
            for label in labels:
                text = _pick(phrasings(label, stated[label]), dice)
                out.append((text, label if label in seen else ""))
            if not labels:
                denied.append(kind)
        together = len(group) != 2 or next(dice) < 0.5
        if tuple(denied) == group and together:
            out.append((_pick(DENIALS[group], dice), ""))
        elif group != DEVICES:  # of devices, none is denied beside another
            out += [(_pick(DENIALS[kind,], dice), "") for kind in denied]
    return out


def _impression(findings: Findings, dice: Iterator[float]) -> str:
    acute = findings.acute().stated
    if not acute:
        return _pick(DENIALS[ALL_CLEAR], dice)
    said = (_pick(phrasings(label, state, brief=True), dice) for label, state in acute.items())
    return " ".join(said)


def _ground(text: str, label: str, boxes: Mapping[str, Box], bins: int) -> str:
    if not label:
        return f"<obj> {text} </obj>"
    if label not in boxes:
        raise PhantomError(f"{label} is seen but has no box; boxes came for {sorted(boxes)}")
    x0, y0, x1, y1 = bins_of(boxes[label], bins)
    return f"<obj> {text} <box> <x{x0}> <y{y0}> <x{x1}> <y{y1}> </box> </obj>"


def read_report(text: str, bins: int = DEFAULT_BINS) -> Reading:
    """Read a report, or only its findings, back into what it says.

    Args:
        text: tokens parted by blanks: sections under headings such as `findings :`, or findings
            alone; plain or grounded.
        bins: steps of a box coordinate.

    Returns:
        What it says. Nothing is dropped: what is not of the language is in `unknown`.

    Example:
        >>> read_report("possible left pneumothorax . the moon is full .").unknown
        ('the moon is full .',)
    """
    unknown: list[str] = []
    sections: dict[str, list[str]] = {}
    current = sections.setdefault("", [])
    tokens = text.split()
    for place, token in enumerate(tokens):
        if token == ":" and place and tokens[place - 1] in SECTIONS:
            name = current.pop()
            if name in sections:
                unknown.append(f"{name} :")
            current = sections.setdefault(name, [])
        else:
            current.append(token)
    opening = sections.pop("")
    if opening and sections:
        unknown.append(" ".join(opening))
    elif opening:
        sections = {"findings": opening}

    body = _Body(sections.get("findings", []), bins)
    closing = _Body(sections.get("impression", []), bins)
    fixed = {name: " ".join(sections[name]) for name in SECTIONS[:3] if name in sections}
    technique = {text: lateral for lateral, texts in TECHNIQUES.items() for text in texts}
    comparison = {text: prior for prior, texts in COMPARISONS.items() for text in texts}
    for name, table in zip(SECTIONS, (INDICATIONS, technique, comparison), strict=False):
        if name in fixed and fixed[name] not in table:
            unknown.append(fixed.pop(name))
    return Reading(
        findings=Findings.where(body.states),
        impression=Findings.where(closing.states) if "impression" in sections else None,
        boxes={label: tuple(found) for label, found in body.boxes.items()},
        indication=fixed.get("indication"),
        lateral=technique.get(fixed.get("technique", "")),
        prior=comparison.get(fixed.get("comparison", "")),
        unknown=(*unknown, *body.unknown, *closing.unknown),
        conflicts=tuple(dict.fromkeys((*body.conflicts, *closing.conflicts))),
    )


class _Body:
    """One section of sentences, read token by token."""

    def __init__(self, tokens: Sequence[str], bins: int) -> None:
        self.states: dict[str, State] = {}
        self.boxes: dict[str, list[Box]] = {}
        self.unknown: list[str] = []
        self.conflicts: list[str] = []
        self.bins = bins
        words: list[str] = []
        corners: list[str] | None = None
        is_open = False
        subject: str | None = None  # the label that the next box belongs to
        for token in tokens:
            if corners is not None and token != "</box>" and _COORDINATE.fullmatch(token):
                corners.append(token)
            elif corners is not None:
                self._box(corners, token, subject)
                corners = None
            elif token == "<box>":
                self._give_up(words)
                corners = []
            elif token in ("<obj>", "</obj>"):
                self._give_up(words)
                if is_open == (token == "<obj>"):
                    self.unknown.append(token)
                is_open, subject = token == "<obj>", None
            else:
                words.append(token)
                if token == ".":
                    subject = self._sentence(" ".join(words))
                    words = []
        self._give_up(words)
        if corners is not None:
            self.unknown.append(" ".join(["<box>", *corners]))
        if is_open:
            self.unknown.append("<obj>")

    def _give_up(self, words: list[str]) -> None:
        if words:
            self.unknown.append(" ".join(words))
            words.clear()

    def _sentence(self, sentence: str) -> str | None:
        meaning = sentences().get(sentence)
        if meaning is None:
            self.unknown.append(sentence)
            return None
        for label, state in meaning:
            if self.states.setdefault(label, state) != state:
                self.conflicts.append(label)
        (label, state), *others = meaning
        return label if not others and state != ABSENT and state.status != "absent" else None

    def _box(self, corners: list[str], end: str, subject: str | None) -> None:
        axes = [match.groups() for match in map(_COORDINATE.fullmatch, corners) if match]
        well_formed = end == "</box>" and [axis for axis, _ in axes] == ["x", "y", "x", "y"]
        try:
            if not well_formed or subject is None:
                raise PhantomError("no box of anything seen")
            box = box_from([int(number) for _, number in axes], self.bins)
        except PhantomError:
            self.unknown.append(" ".join(["<box>", *corners, end]))
        else:
            self.boxes.setdefault(subject, []).append(box)
