"""Radiology reports in sections: FINDINGS, IMPRESSION, INDICATION and what stands for them.

Written for MIMIC-CXR, whose headings vary: ``FINDINGS AND IMPRESSION``, the view in place of a
heading (``CHEST, PA AND LATERAL:``), ``REASON FOR EXAM``, misspellings, a wet read before the final
report, sections that occur twice. A heading that is not recognised stays in the section it is in
(``LUNGS:`` within findings), so no text is ever dropped.

Where findings have no heading they follow COMPARISON or another short section after a blank line.
They become the part ``body``, so that they are not taken for the comparison and shown to a model as
such.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from hooks.studies import Section


class Part(NamedTuple):
    """A stretch of a report: ``heading + text`` of all parts in order is the report itself."""

    name: str
    heading: str
    text: str


PREAMBLE, FINAL, BODY = "preamble", "final report", "body"

SHORT = ("examination", "indication", "history", "comparison", "technique")
"""Sections of one paragraph."""

MAIN = {
    "FINDINGS": "findings",
    "IMPRESSION": "impression",
    "CONCLUSION": "impression",
    "SUMMARY": "impression",
    "INDICATION": "indication",
    "HISTORY": "history",
    "COMPARISON": "comparison",
    "TECHNIQUE": "technique",
    "EXAMINATION": "examination",
    "RECOMMENDATION": "recommendation",
    "NOTIFICATION": "notification",
    "ADDENDUM": "addendum",
}
"""Headings of one word, matched with a letter or two wrong."""

EXACT = {
    "EXAM": "examination",
    "STUDY": "examination",
    "TYPE OF EXAMINATION": "examination",
    "TYPE OF EXAM": "examination",
    "PROCEDURE": "technique",
    "CLINICAL INFORMATION": "indication",
    "CLINICAL DATA": "indication",
    "OPINION": "impression",
    "NOTE": "note",
    FINAL.upper(): FINAL,
}

PHRASES = (
    (re.compile(r"WET READ|PRELIM|PROVISIONAL"), "wet read"),
    (re.compile(r"ADDENDUM"), "addendum"),
    (re.compile(r"RECOMMENDATION"), "recommendation"),
    (re.compile(r"NOTIFICATION"), "notification"),
    (re.compile(r"FINDINGS?\b"), "findings"),
    (re.compile(r"IMPRESSION|CONCLUSION"), "impression"),
    (re.compile(r"INDICATION|REASON FOR|CLINICAL INFO"), "indication"),
    (re.compile(r"HISTORY"), "history"),
    (re.compile(r"COMPARISON"), "comparison"),
    (re.compile(r"TECHNIQUE"), "technique"),
)
"""Part of a longer heading in capitals; the first that occurs decides, so ``FINDINGS AND
IMPRESSION`` is findings."""

_FILM = frozenset(
    ("CHEST", "RADIOGRAPH", "RADIOGRAPHS", "RADIOGRAPHY", "XRAY", "CXR", "VIEW", "VIEWS")
).union(("FILM", "FILMS", "RIBS"))
_VIEW_WORDS = _FILM.union(
    ("PA", "AP", "LAT", "LATERAL", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR"),
    ("DECUBITUS", "LORDOTIC", "PORTABLE", "BEDSIDE", "SUPINE", "UPRIGHT", "ERECT"),
    ("SEMI", "SEMIUPRIGHT", "SEMIERECT", "LEFT", "RIGHT", "SINGLE", "ONE", "TWO", "THREE"),
    ("FOUR", "OF", "THE", "AND", "WITH", "A", "AN", "IN", "X", "RAY", "AT", "ON", "DATED", "AM"),
    ("PM", "PERFORMED", "OBTAINED", "COMPARED", "TO", "STUDY", "HOURS"),
)

_HEADING = re.compile(
    r"""^[ \t]*(?:
        (?P<capitals>[A-Z](?:[A-Z0-9_ \t,/&()'\-]|(?<=\d):(?=\d\d)){1,80}?)[ \t]*:(?!\d\d)
      | (?P<mixed>[A-Z][A-Za-z]*(?:[ ][A-Za-z]+){0,3})[ \t]*:  # Findings:
      | (?P<bare>[A-Z]{6,15}|FINAL[ ]REPORT)[ \t]*(?:[.;\-]+(?=\s)|(?=\r?$))   # IMPRESSION alone
    )""",
    re.MULTILINE | re.VERBOSE,
)


_PARAGRAPH = re.compile(r"\s*\S.*?\n[ \t]*\r?\n(?=\s*\S)", re.DOTALL)
"""A paragraph, with the blank line that divides it from the next."""


def split_report(text: str) -> list[Part]:
    """Parts of a report in order; their headings and texts joined are ``text``.

    >>> [part.name for part in split_report("FINDINGS: Clear.  LUNGS: well aerated.")]
    ['findings']
    >>> [(p.name, p.text) for p in split_report("CHEST, TWO VIEWS:  Clear.\\nIMPRESION: Fine.")]
    [('findings', '  Clear.\\n'), ('impression', ' Fine.')]
    """
    parts: list[Part] = []
    name, heading, start = PREAMBLE, "", 0
    for match in _HEADING.finditer(text):
        found = _recognise(match)
        if found is None:
            continue
        parts += _paragraphs(Part(name, heading, text[start : match.start()]))
        name, heading, start = found, match[0], match.end()
    parts += _paragraphs(Part(name, heading, text[start:]))
    return [part for part in parts if part.heading or part.text]


def _paragraphs(part: Part) -> list[Part]:
    """A short section and the paragraphs after its first, if there are any."""
    first = _PARAGRAPH.match(part.text) if part.name in SHORT else None
    if first is None:
        return [part]
    rest = part.text[first.end() :]
    return [part._replace(text=first[0]), Part(BODY, "", rest)]


def _recognise(match: re.Match[str]) -> str | None:
    """The section that a heading begins, if it is one."""
    asked = " ".join((match["capitals"] or match["mixed"] or match["bare"]).split())
    plain = asked.upper()
    if plain in EXACT:
        return EXACT[plain]
    if " " not in plain and (close := difflib.get_close_matches(plain, MAIN, n=1, cutoff=0.85)):
        return MAIN[close[0]]
    if not match["capitals"]:
        return None
    for phrase, name in PHRASES:
        if phrase.search(plain):
            return name
    words = re.findall(r"[A-Z]+", plain.replace("X-RAY", "XRAY"))
    return "findings" if set(words) <= _VIEW_WORDS and set(words) & _FILM else None


def merge(parts: Iterable[Part]) -> tuple[Section, ...]:
    """One section a name, in the order of first occurrence, white space collapsed.

    Text of a section that occurs twice is joined. Sections without text are left out.
    """
    texts: dict[str, list[str]] = {}
    for part in parts:
        if text := " ".join(part.text.split()):
            texts.setdefault(part.name, []).append(text)
    return tuple(Section(name=name, text=" ".join(found)) for name, found in texts.items())


def parse_report(text: str) -> tuple[Section, ...]:
    """The sections of a report; see :func:`split_report` and :func:`merge`."""
    return merge(split_report(text))
