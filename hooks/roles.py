"""What each token is: image patch, boilerplate, clinical prompt text, report text, grounding.

A prompt is built from *pieces* whose role is known. The rendered text keeps their character
spans, the tokenizer gives each token's span, and so every token gets the role of the piece that
its last character belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from hooks.grounding import TOKEN_PATTERN

NONE = -1
"""Value of view, row, column and sentence where a token has none."""


class Role(IntEnum):
    """The five kinds of token; the value is what the token table stores."""

    IMAGE = 0
    """A patch embedding in place of ``<image>``."""
    BOILERPLATE = 1
    """Fixed prompt words, template words, special tokens."""
    CLINICAL = 2
    """Indication, technique, comparison, prior report, phrase to ground."""
    REPORT = 3
    """The report itself, teacher-forced or generated."""
    GROUNDING = 4
    """``<obj>``, ``<box>`` and coordinate tokens inside a report."""


class View(IntEnum):
    """Which film a patch belongs to, in the order MAIRA-2 reads them."""

    FRONTAL = 0
    LATERAL = 1
    PRIOR = 2


class Piece(NamedTuple):
    """A stretch of prompt text of one role; ``view`` is set for an image placeholder."""

    text: str
    role: Role
    view: View | None = None


class Span(NamedTuple):
    """Characters ``start:end`` of a rendered prompt and their role."""

    start: int
    end: int
    role: Role
    view: View | None = None


@dataclass(frozen=True)
class Tokens:
    """One prompt's tokens as parallel arrays ``[n_tokens]``; :data:`NONE` where not applicable."""

    ids: np.ndarray
    role: np.ndarray
    view: np.ndarray
    row: np.ndarray
    column: np.ndarray
    sentence: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray | slice) -> Tokens:
        """The tokens a mask, index array or slice chooses."""
        return Tokens(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def of_role(self, *roles: Role) -> np.ndarray:
        """Boolean mask ``[n_tokens]`` of the tokens that have one of ``roles``."""
        return np.isin(self.role, [int(role) for role in roles])


def assign_roles(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    spans: Sequence[Span],
    patches_per_image: int,
) -> Tokens:
    """Roles of a tokenised prompt.

    Parameters
    ----------
    ids, offsets
        Token ids and their character spans in ``text``; ``(0, 0)`` for added special tokens.
    text
        The prompt with one placeholder for each film; its token stands for all patches and is
        repeated here, which is what tokenising as many placeholders gives.
    spans
        Spans of the pieces in ``text``, in order; characters between them are boilerplate.
    patches_per_image
        Must be a square number; patches run row by row.
    """
    n = len(ids)
    role = np.full(n, Role.BOILERPLATE, dtype=np.int8)
    view, sentence = (np.full(n, NONE, dtype=np.int16) for _ in range(2))
    begins, ends = np.array(offsets, dtype=np.int64).reshape(n, 2).T
    last = np.maximum(ends - 1, begins)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    owner = np.searchsorted(starts, last, side="right") - 1
    owner[(begins == 0) & (ends == 0)] = NONE  # added special tokens
    for index, span in enumerate(spans):
        own = (owner == index) & (last < span.end)
        role[own] = span.role
        if span.role is Role.IMAGE:
            view[own] = int(span.view or 0)
        elif span.role is Role.REPORT:
            sentences = np.array(_sentence_starts(text, spans), dtype=np.int64)
            sentence[own] = np.searchsorted(sentences, last[own], side="right") - 1
            for i in np.flatnonzero(own) if "<" in text[span.start : span.end] else ():
                if TOKEN_PATTERN.fullmatch(text[begins[i] : ends[i]].strip()):
                    role[i] = Role.GROUNDING
    image = role == Role.IMAGE
    times = np.where(image, patches_per_image, 1)
    known = (np.asarray(ids, dtype=np.int64), role, view, sentence)
    all_ids, role, view, sentence = (np.repeat(values, times) for values in known)
    row, column = (np.full(len(role), NONE, dtype=np.int16) for _ in range(2))
    side = round(patches_per_image**0.5)
    films, place = int(image.sum()), role == Role.IMAGE
    row[place] = np.tile(np.repeat(np.arange(side), side), films)
    column[place] = np.tile(np.arange(side), side * films)
    return Tokens(all_ids, role, view, row, column, sentence)


def _sentence_starts(text: str, spans: Sequence[Span]) -> list[int]:
    """Character positions at which the report's sentences start, ascending."""
    starts = []
    for span in spans:
        if span.role is Role.REPORT:
            report = text[span.start : span.end]
            starts += [span.start]
            starts += [span.start + m.end() for m in re.finditer(r"[.!?](?:\s+|(?=<))", report)]
    return starts or [0]
