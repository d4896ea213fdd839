"""Where an edit acts: tokens by role, film, section, sentence or absolute position.

Positions are a row's own: 0 is its first token that is not padding, on whichever side the padding
is, and whether or not the key-value cache holds the earlier tokens.

Letters: N rows of a batch (beams included), R rows with positions of their own, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooks.files import ConfigError, nearest
from hooks.grounding import TOKEN_PATTERN, Box
from hooks.roles import Role, Tokens, View

Where = Literal["all", "prompt", "generated"]
Section = Literal["prior_report", "indication", "technique", "comparison"]
_SENTENCE_END = re.compile(r"[.!?](?:\s+|(?=<))")
_WRITTEN = (Role.REPORT, Role.GROUNDING)


@dataclass(frozen=True)
class Positions:
    """The tokens for which everything that is given holds; without any, all tokens.

    >>> frontal = Positions(view=View.FRONTAL, box=Box(0.5, 0.5, 1.0, 1.0))
    >>> second_sentence = Positions(sentences=(1,), generated=True)
    """

    roles: tuple[Role, ...] = ()
    """One of these; what is generated is ``REPORT``, or ``GROUNDING`` by its token."""
    view: View | None = None
    """Image patches of this film."""
    box: Box | None = None
    """Image patches that overlap it, in fractions of the square that the model sees."""
    sections: tuple[Section, ...] = ()
    """Text that the prompt gives under these headings."""
    sentences: tuple[int, ...] = ()
    """Sentences of the report, counted from 0; a full stop belongs to the sentence it ends."""
    window: tuple[int, int] | None = None
    """Absolute positions from the first number up to, not including, the second."""
    generated: bool | None = None
    """What the model writes (True), or what it is given (False)."""

    def __post_init__(self) -> None:
        for section in self.sections:
            if section not in get_args(Section):
                known = get_args(Section)
                raise ConfigError(
                    f"unknown section {section!r}{nearest(section, known)}; choose from "
                    f"{list(known)}"
                )
        if self.box is not None:
            b = Box(*self.box)
            if not (0 <= b.x_min < b.x_max <= 1 and 0 <= b.y_min < b.y_max <= 1):
                raise ConfigError(
                    f"{b} is no box: corners are fractions of width and height, the smaller first"
                )
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise ConfigError(
                f"window {self.window} holds no position; give a start of 0 or more and an end "
                "above it"
            )
        if any(sentence < 0 for sentence in self.sentences):
            raise ConfigError(f"sentences {self.sentences} are counted from 0; give none below it")

    @classmethod
    def of(cls, where: str | Positions) -> Positions:
        """Positions themselves, or what ``all``, ``prompt`` and ``generated`` stand for."""
        if isinstance(where, Positions):
            return where
        if where not in get_args(Where):
            raise ConfigError(
                f"unknown position {where!r}{nearest(where, get_args(Where))}; choose from "
                f"{list(get_args(Where))}, or give Positions"
            )
        return cls(generated=None if where == "all" else where == "generated")

    def __str__(self) -> str:
        given = [
            f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default
        ]
        return f"Positions({', '.join(given)})" if given else "everywhere"

    @property
    def everywhere(self) -> bool:
        """Nothing is left out."""
        return self == Positions()


class Row:
    """One row's positions, resolved against the tokens of its prompt.

    Parameters
    ----------
    tokens
        Of the prompt, or of as much of it as is known; what follows is part of the report.
    start
        Column at which the model's own words begin, padding counted; without it, the end of
        ``tokens``.
    tokenizer
        Needed for sections, and for sentences and grounding tokens of what is generated.
    """

    def __init__(
        self, where: Positions, tokens: Tokens | None, start: int | None, tokenizer: Any
    ) -> None:
        self.where, self.tokens, self.start, self.tokenizer = where, tokens, start, tokenizer
        self.n_known = 0 if tokens is None else len(tokens)
        of_prompt = bool(where.sections) or where.view is not None or where.box is not None
        roles = set(where.roles)
        if tokens is None and (of_prompt or roles):
            raise ConfigError(f"{where} needs to know the prompt; give `tokens`")
        if tokens is None and start is None and (where.sentences or where.generated is not None):
            raise ConfigError(
                f"{where} needs to know where the prompt ends; give `prompt_length` or `tokens`"
            )
        self.rest = not of_prompt and (not roles or bool(roles & set(_WRITTEN)))
        """Whether tokens after the known ones may be chosen."""
        self.reads_ids = self.rest and (bool(where.sentences) or len(roles & set(_WRITTEN)) == 1)
        """Whether their ids decide it."""
        if (where.sections or self.reads_ids) and tokenizer is None:
            raise ConfigError(f"{where} needs to read tokens; give `tokenizer`")
        self.known = np.zeros(0, dtype=bool) if tokens is None else self._choose(tokens)
        written = np.zeros(0) if tokens is None else np.flatnonzero(tokens.of_role(*_WRITTEN))
        self.report_start = int(written[0]) if len(written) else self.n_known
        if not self.rest and not self.known.any():
            raise ConfigError(f"{where} chooses nothing in a prompt of {self.n_known} tokens")

    def _choose(self, tokens: Tokens) -> Bool[np.ndarray, " known"]:
        """Known tokens that are chosen, windows and what is generated aside."""
        w = self.where
        chosen = np.ones(len(tokens), dtype=bool)
        if w.roles:
            chosen &= tokens.of_role(*w.roles)
        if w.view is not None:
            chosen &= tokens.of_role(Role.IMAGE) & (tokens.view == int(w.view))
        if w.box is not None:
            side = int(tokens.row.max()) + 1
            b = Box(*w.box)
            chosen &= tokens.of_role(Role.IMAGE)
            chosen &= (tokens.column < b.x_max * side) & (tokens.column + 1 > b.x_min * side)
            chosen &= (tokens.row < b.y_max * side) & (tokens.row + 1 > b.y_min * side)
        if w.sections:
            named = section_of(tokens, self.tokenizer)
            for section in w.sections:
                if section not in named:
                    found = sorted({str(n) for n in named if n})
                    raise ConfigError(f"this prompt has no {section}; it has {found}")
            chosen &= np.isin(named, w.sections)
        if w.sentences:
            chosen &= np.isin(tokens.sentence, w.sentences)
        return chosen

    def mask(
        self, first: int, n: int, pad: int, ids: Sequence[int] | None
    ) -> Bool[np.ndarray, " n"]:
        """Chosen among columns ``first:first + n`` of a row whose first token is in column ``pad``.

        Parameters
        ----------
        ids
            Of all columns up to ``first + n``, where :attr:`reads_ids`.
        """
        w = self.where
        column = np.arange(first, first + n)
        own = column - pad
        mask = own >= 0
        later = own >= self.n_known
        known = mask & ~later
        mask[known] = self.known[own[known]]
        mask[later] &= self.rest
        if self.reads_ids and mask[later].any():
            assert ids is not None
            mask[later] &= self._written(ids, column[later], pad)
        if w.window is not None:
            mask &= (own >= w.window[0]) & (own < w.window[1])
        if w.generated is not None:
            start = pad + self.n_known if self.start is None else self.start
            mask &= (column >= start) == w.generated
        return mask

    def _written(
        self, ids: Sequence[int], columns: Int[np.ndarray, " n"], pad: int
    ) -> Bool[np.ndarray, " n"]:
        """Whether report tokens fit by their role and sentence, given those before them."""
        w = self.where
        begin = pad + self.report_start if self.tokens is not None else (self.start or 0)
        out = np.ones(len(columns), dtype=bool)
        for i, column in enumerate(columns):
            if column < begin:  # of a prompt whose roles are not known
                out[i] = False
                continue
            if len(set(w.roles) & set(_WRITTEN)) == 1:
                said = self.tokenizer.decode([ids[column]]).strip()
                grounds = TOKEN_PATTERN.fullmatch(said) is not None
                out[i] &= grounds == (Role.GROUNDING in w.roles)
            if w.sentences:
                out[i] &= sentence_of_last(self.tokenizer, ids[begin : column + 1]) in w.sentences
        return out

    def settled(self, pad: int) -> int | None:
        """Column from which on every token has one answer; None if it is never so."""
        if self.reads_ids or self.where.window is not None:
            return None
        return max(pad + self.n_known, self.start or 0)

    def patches(self) -> Bool[np.ndarray, "films P"]:
        """Chosen patches of each film of the prompt, in the order the model reads them."""
        assert self.tokens is not None
        image = self.tokens.of_role(Role.IMAGE)
        chosen = self.mask(0, self.n_known, 0, None) & image
        if not chosen.any():
            raise ConfigError(
                f"{self.where} chooses no image patch, and this SAE reads films; choose patches"
            )
        film = self.tokens.view[image]
        n_films = 1 + int((np.diff(film) != 0).sum())
        return chosen[image].reshape(n_films, -1)


def sentence_of_last(tokenizer: Any, ids: Sequence[int]) -> int:
    """Number of the sentence in which the last of a report's tokens lies, as `hooks.roles` counts.

    It depends on no later token, so it is known while the report is written.
    """
    text = tokenizer.decode(ids)
    # A token that shows no character lies after those before it.
    last = max(len(text) - 1, len(tokenizer.decode(ids[:-1])))
    return sum(end.end() <= last for end in _SENTENCE_END.finditer(text))


def section_of(tokens: Tokens, tokenizer: Any) -> np.ndarray:
    """Name of the section that each token of a prompt is given under, or an empty string."""
    out = np.full(len(tokens), "", dtype=object)
    clinical = tokens.of_role(Role.CLINICAL)
    for start in np.flatnonzero(np.diff(clinical, prepend=False) & clinical):
        stop = start + int(np.argmin(np.append(clinical[start:], False)))
        before = tokenizer.decode(tokens.ids[max(0, start - 12) : start].tolist())
        heading = re.search(r"([A-Z_]+)\s*:\s*$", before)
        name = heading[1].lower() if heading else ""
        if name in get_args(Section):
            out[start:stop] = name
    return out


class Mask:
    """Which tokens of a forward pass are edited, for rows that may differ.

    Parameters
    ----------
    rows
        One for each row of the batch, or one for all.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.everywhere = all(row.where.everywhere for row in rows)
        self.reads_ids = any(row.reads_ids for row in rows)
        self._pads: list[int] = []
        self._settled: tuple[int, Tensor | bool] | None = None

    def read_prompt(self, n: int, attention_mask: Any) -> None:
        """Learn where each of ``n`` rows begins; called whenever a prompt is run."""
        self._settled = None
        if attention_mask is None:
            self._pads = [0] * n
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            self._pads = attention_mask.to(torch.int8).argmax(dim=1).tolist()
        else:
            raise ConfigError(
                "positions were asked for, and the attention mask is not one number for each "
                "token, so padding is not seen; generate with the dynamic cache"
            )

    def known_pads(self, n: int) -> bool:
        """Whether :meth:`read_prompt` was called for a batch of ``n`` rows."""
        return len(self._pads) == n

    def check_ids(self, ids: Tensor) -> None:
        """The prompt that is run is the one that positions were resolved against."""
        for i, got in enumerate(ids.tolist()):
            row, pad = self._row(i, len(ids)), self._pads[i]
            if row.tokens is None:
                continue
            got, want = got[pad : pad + row.n_known], row.tokens.ids[: len(got) - pad].tolist()
            if got != want:
                at = next((j for j, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), 0)
                raise ConfigError(
                    f"row {i} of the batch has other tokens than positions were given for (first "
                    f"at position {at}); give the `tokens` of the prompts that are run, in order"
                )

    def _row(self, i: int, n: int) -> Row:
        if n % len(self.rows):
            raise ConfigError(
                f"positions are given for {len(self.rows)} rows and the model runs {n}; give them "
                "for each row of the batch, or once for all"
            )
        return self.rows[i * len(self.rows) // n]

    def of(
        self, n: int, first: int, length: int, ids: Tensor | None, device: torch.device
    ) -> Bool[Tensor, "N T"] | bool:
        """Chosen among ``length`` columns from ``first`` on; True or False where all agree.

        Parameters
        ----------
        ids
            Of all columns so far, where :attr:`reads_ids`.
        """
        if self._settled is not None and length == 1 and first >= self._settled[0]:
            return self._settled[1]
        listed = None if ids is None else ids.tolist()
        masks = [
            self._row(i, n).mask(first, length, pad, None if listed is None else listed[i])
            for i, pad in enumerate(self._pads)
        ]
        chosen = np.stack(masks)
        if chosen.all() or not chosen.any():
            mask = bool(chosen.all())
        else:
            mask = torch.from_numpy(chosen).to(device)
        if length == 1:
            settled = [self._row(i, n).settled(pad) for i, pad in enumerate(self._pads)]
            known = [column for column in settled if column is not None]
            if len(known) == n and first >= max(known):
                self._settled = (max(known), mask)
        return mask
