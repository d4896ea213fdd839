"""Which tokens, patches and sentences carry which factor."""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hooks.grounding import TOKEN_PATTERN
from hooks.roles import NONE, Role, Tokens, View
from phantom.draw import FILM_SIZE, PATCH_SIZE, Film
from phantom.factors import DEVICES, LABELS, PhantomError
from phantom.language import sentences
from phantom.study import PhantomStudy
from phantom.truth import Truth, id_of

if TYPE_CHECKING:
    from hooks.store import ActivationFolder

MEMBERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **{label: (label,) for label in LABELS},
        "device": DEVICES,
        "tube": ("endotracheal_tube", "nasogastric_tube"),
    }
)
"""Every factor with the labels any one of which makes it true."""
FACTORS: tuple[str, ...] = tuple(MEMBERS)
"""The fourteen labels, then device and tube: the columns of every factor table."""
HIERARCHY: tuple[tuple[str, str], ...] = (("device", "tube"), ("tube", "endotracheal_tube"))
"""Parent and child, from the widest factor to the narrowest."""

GRID = FILM_SIZE // PATCH_SIZE
"""Patches along each side of a film, as the mini model reads it."""
CARRIES = 0.05
"""Least share of a patch that a finding covers for the patch to carry it. A nasogastric tube, the
thinnest finding, covered 7 % of its best patch at least, on 85 frontal films."""

_BELONGS = np.array([[label in MEMBERS[factor] for label in LABELS] for factor in FACTORS])


def study_factors(study: PhantomStudy) -> np.ndarray:
    """What the current films show: bool (16,), in the order of `FACTORS`."""
    return _BELONGS @ study.factors.vector().astype(bool)


def film_shares(film: Film, grid: int = GRID) -> np.ndarray:
    """How much of every patch each factor covers.

    Args:
        film: the film.
        grid: patches along each side.

    Returns:
        float32 (16, grid, grid), shares from 0 to 1. A composite factor covers what any of its
        labels covers.

    Raises:
        PhantomError: the film's side is no multiple of the grid.
    """
    if grid < 1 or film.size % grid:
        raise PhantomError(
            f"a film of {film.size} pixels has no grid of {grid} patches a side; choose a grid "
            f"that divides {film.size}"
        )
    step = film.size // grid
    out = np.zeros((len(FACTORS), grid, grid), np.float32)
    for place, members in enumerate(MEMBERS.values()):
        masks = [film.masks[label] for label in members if label in film.masks]
        if masks:
            whole = np.logical_or.reduce(masks).reshape(grid, step, grid, step)
            out[place] = whole.mean((1, 3), dtype=np.float32)
    return out


def sentence_factors(findings: str) -> np.ndarray:
    """What each sentence of a report's findings says is there.

    Args:
        findings: `Report.findings` or `Report.grounded`.

    Returns:
        bool (sentences, 16): present or possible. Denied and resolved findings are not there.

    Raises:
        PhantomError: a sentence is not of the language.

    Example:
        >>> said = sentence_factors("endotracheal tube is seen . no pneumothorax .")
        >>> [[name for name, on in zip(FACTORS, row) if on] for row in said]
        [['endotracheal_tube', 'device', 'tube'], []]
    """
    out = []
    words: list[str] = []
    for token in findings.split():
        if TOKEN_PATTERN.fullmatch(token):
            continue
        words.append(token)
        if token == ".":
            text = " ".join(words)
            words = []
            meaning = sentences().get(text)
            if meaning is None:
                raise PhantomError(f"{text!r} is no sentence of a phantom report; see sentences()")
            seen = [label for label, state in meaning if state.status != "absent"]
            out.append([bool(set(members) & set(seen)) for members in MEMBERS.values()])
    if words:
        raise PhantomError(f"{' '.join(words)!r} ends without a full stop; give whole findings")
    return np.array(out, bool).reshape(len(out), len(FACTORS))


def token_shares(study: PhantomStudy, tokens: Tokens, grid: int = GRID) -> np.ndarray:
    """How much each token is about each factor.

    An image token has the share of its patch that the factor covers, on its own film: frontal,
    lateral or prior. A token of the report (role REPORT) has 1 for what its sentence says is
    present or possible. A grounding token belongs to the sentence whose object it opens or
    closes. Every other token has 0 throughout: leave those out by role before scoring.

    Args:
        study: the study the tokens are of.
        tokens: its tokens in order; those of the report with no gaps between them.
        grid: patches along each side of a film.

    Returns:
        float32 (n_tokens, 16), in the order of `FACTORS`.

    Raises:
        PhantomError: the tokens speak of a film, patch or sentence that the study has not.
    """
    out = np.zeros((len(tokens), len(FACTORS)), np.float32)
    name = id_of(study.seed)
    for view, film in zip(View, (study.frontal, study.lateral, study.prior), strict=True):
        here = (tokens.role == Role.IMAGE) & (tokens.view == view)
        if not here.any():
            continue
        if film is None:
            raise PhantomError(f"{name} has no {view.name.lower()} film; give its own tokens")
        rows, columns = tokens.row[here], tokens.column[here]
        last = max(rows.max(), columns.max())
        if last >= grid:
            raise PhantomError(f"{name} has patch {last} of a grid of {grid}; give the right grid")
        out[here] = film_shares(film, grid)[:, rows, columns].T

    spoken = tokens.of_role(Role.REPORT, Role.GROUNDING)
    if spoken.any():
        said = sentence_factors(study.report.findings)
        own = _own_sentence(tokens)[spoken]
        if own.min() < 0 or own.max() >= len(said):
            raise PhantomError(
                f"{name} has sentences 0 to {len(said) - 1}, its tokens are of {own.min()} to "
                f"{own.max()}; give the tokens of its own report"
            )
        out[spoken] = said[own]
    return out


def _own_sentence(tokens: Tokens) -> np.ndarray:
    """The sentence that each token belongs to.

    `Tokens.sentence` counts full stops. In `<obj> words . <box> … </box> </obj>` what follows the
    stop is numbered with the next sentence, but for that sentence's own `<obj>`, which stands
    right before its first word.
    """
    opens = np.zeros(len(tokens), bool)
    opens[:-1] = (tokens.role[1:] == Role.REPORT) & (tokens.sentence[1:] == tokens.sentence[:-1])
    closes = (tokens.role == Role.GROUNDING) & ~opens
    return tokens.sentence.astype(np.int64) - closes


def token_factors(
    study: PhantomStudy, tokens: Tokens, threshold: float = CARRIES, grid: int = GRID
) -> np.ndarray:
    """Which tokens carry which factor: bool (n_tokens, 16), `token_shares` from a threshold on.

    Raises:
        PhantomError: the threshold is not above 0 and at most 1, or see `token_shares`.
    """
    if not 0 < threshold <= 1:
        raise PhantomError(f"the threshold is {threshold}; give a share above 0, at most 1")
    return token_shares(study, tokens, grid) >= np.float32(threshold)


def folder_factors(
    truth: Truth, folder: "ActivationFolder", threshold: float = CARRIES, grid: int = GRID
) -> np.ndarray:
    """Which rows of an activation folder carry which factor.

    Args:
        truth: how the folder's studies were drawn.
        folder: the activations of phantom studies, teacher-forced on their own reports.
        threshold: see `token_factors`.
        grid: patches along each side of a film.

    Returns:
        bool (n_tokens, 16), a row for each of the folder's. Drawing takes 5 ms a study.

    Raises:
        PhantomError: the folder holds studies that are no phantoms, or of another truth.
    """
    names = folder.column("study")
    roles = {role.name.lower(): int(role) for role in Role}
    views = {view.name.lower(): int(view) for view in View}

    def coded(column: str, codes: Mapping[str, int]) -> np.ndarray:
        return np.array([codes[name] for name in folder.column(column)], np.int8)

    def numbers(column: str) -> np.ndarray:
        values = folder.column(column).astype(np.float64)
        return np.nan_to_num(values, nan=NONE).astype(np.int16)

    tokens = Tokens(
        ids=folder.column("token_id"),
        role=coded("role", roles),
        view=coded("view", views),  # a token without a view reads frontal; its role tells
        row=numbers("patch_row"),
        column=numbers("patch_column"),
        sentence=numbers("sentence"),
    )
    out = np.zeros((len(tokens), len(FACTORS)), bool)
    sequence = folder.column("sequence")
    cuts = [0, *(np.flatnonzero(np.diff(sequence)) + 1), len(sequence)]
    for start, stop in pairwise(cuts):
        study = truth.study(str(names[start]))
        own = tokens.take(slice(start, stop))
        out[start:stop] = token_factors(study, own, threshold, grid)
    return out
