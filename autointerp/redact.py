"""Identifiers out of text that leaves the machine: dates, record numbers, telephones, names."""

from __future__ import annotations

import re

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_WORD = r"[A-Z][\w'’-]*\.?"
_NAME = (
    rf"(?:<<)?{_WORD}(?:>>)?(?:\s+(?:(?:van|von|de|der|la|al|bin)\s+)*(?:<<)?{_WORD}(?:>>)?){{0,2}}"
)

_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "[PHONE]",
        re.compile(
            r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\)\s?|\d{3}[ .-])\d{3}[ .-]\d{4}(?!\w)"
            r"|(?<!\w)\+\d{1,3}(?:[ .-]?\d{2,4}){2,5}(?!\w)"
            r"|\b(?:(?i:pager|phone|telephone|tel|fax|ext|extension|beeper)\b[\s.:#x]*)\d[\d-]{2,}"
        ),
    ),
    (
        "[DATE]",
        re.compile(
            r"(?<![\d.])(?:\d{1,2}([/-])\d{1,2}\1(?:\d{4}|\d{2})|\d{4}([/-])\d{1,2}\2\d{1,2}"
            r"|\d{1,2}\.\d{1,2}\.\d{4}|\d{1,2}/(?:19|20)\d{2})(?![\d.]\d|\d)"
            r"|(?<=\bon )\d{1,2}/\d{1,2}(?![\d/])|(?<=\bdated )\d{1,2}/\d{1,2}(?![\d/])"
            r"|(?<=\bfrom )\d{1,2}/\d{1,2}(?![\d/])|(?<=\bsince )\d{1,2}/\d{1,2}(?![\d/])"
            rf"|\b(?i:{_MONTH})\s+\d{{1,2}}(?:st|nd|rd|th)?(?:,?\s+\d{{4}})?\b"
            rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?(?i:{_MONTH})(?:,?\s+\d{{4}}\b)?"
            rf"|\b(?i:{_MONTH}),?\s+\d{{4}}\b"
        ),
    ),
    (
        "[ID]",
        re.compile(
            r"\b\d{3}-\d{2}-\d{4}\b|(?<![\w.])[A-Za-z]{0,4}-?\d{6,}(?!\w)"
            r"|\b(?:(?i:mrn|mr#|medical record(?: number)?|accession(?: number)?|acc|patient id)"
            r"[\s.:#]*(?:(?i:no|number)[\s.:#]*)?)[A-Za-z]{0,4}-?\d{3,}\b"
        ),
    ),
    (
        # "MR" in capitals without a stop is magnetic resonance.
        "[NAME]",
        re.compile(
            rf"\b(?:(?:Dr|DR|Mr|Mrs|MRS|Ms|MS|Miss|Prof|Doctor|Professor)\.?|MR\.)\s+{_NAME}"
            r"|\b(?:dr|mr|mrs|ms|prof)\.\s+(?:<<)?[a-z][\w'’-]*(?:>>)?"
        ),
    ),
)


def redact(text: str) -> str:
    """Text with dates, record numbers, telephone numbers and names after a title replaced.

    It knows patterns, not people: a name without a title stays. De-identify reports before they go
    anywhere; this is the second line.

    >>> redact("Seen by Dr. Jane Roe on 3/14/2019, MRN 1234567, call 617-555-0123.")
    'Seen by [NAME] on [DATE], [ID], call [PHONE].'
    >>> redact("A 1.2 x 3.4 cm nodule; MR Brain advised.")
    'A 1.2 x 3.4 cm nodule; MR Brain advised.'
    """
    for mark, pattern in _RULES:
        text = pattern.sub(mark, text)
    return text
