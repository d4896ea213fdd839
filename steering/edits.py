"""Edits of latents that keep what the dictionary does not explain.

``h' = h + decode(z') − decode(z) = h + Σ_f (z'_f − z_f) · W_dec[f]``, so the reconstruction error
of the SAE never enters the model, and an edit that changes no latent changes nothing. Every mode is
one formula, ``z' = max(gain · z + shift, floor)``, and only the edited latents are computed:

========  =====  ========  ========
mode      gain   shift     floor
========  =====  ========  ========
add       1      target    0
scale     s      0         0
clamp     0      target    0
minimum   1      0         target
ablate    0      0         0
========  =====  ========  ========

with ``target = strength · reference``. A latent that is edited twice in one row is an error: an
edit says what the latent becomes, and the order of two would decide.

Letters: N rows of a batch (beams included), R rows with edits of their own, T tokens, n edited
latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.files import ConfigError, nearest
from sae.model import MatryoshkaSAE

Mode = Literal["add", "scale", "clamp", "minimum", "ablate"]


@dataclass(frozen=True)
class Edit:
    """One latent turned up or down.

    >>> str(Edit(12, 2.0, 35.0)), str(Edit(12, 0.5, mode="scale")), str(Edit(12, mode="ablate"))
    ('add 2.0 × 35.0', 'scale 0.5', 'ablate')
    """

    latent: int
    strength: float | None = None
    """In units of ``reference``; of ``scale`` the factor; ``ablate`` takes none."""
    reference: float | None = None
    """The latent's own scale, see :class:`steering.references.References`. ``scale`` and ``ablate``
    need none."""
    mode: Mode = "add"
    """``add``: z' = z + strength · reference. ``scale``: z' = strength · z. ``clamp``: z' =
    strength · reference. ``minimum``: the larger of that and z. ``ablate``: z' = 0. Never below
    0."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(
                f"unknown edit mode {self.mode!r}{nearest(self.mode, get_args(Mode))}; choose from "
                f"{list(get_args(Mode))}"
            )
        if self.mode == "ablate":
            if self.strength is not None:
                raise ConfigError(
                    f"ablate turns latent {self.latent} off, it takes no strength (given: "
                    f"{self.strength}); leave it out, or use scale or clamp"
                )
            return
        if self.strength is None or not math.isfinite(self.strength):
            raise ConfigError(
                f"{self.mode} of latent {self.latent} has strength {self.strength}; give a number"
            )
        if self.mode == "scale":
            if self.strength < 0:
                raise ConfigError(
                    f"latent {self.latent} is scaled by {self.strength}; activations are never "
                    "negative: scale by 0 or more, or add a negative strength"
                )
            return
        if self.reference is None:
            raise ConfigError(
                f"{self.mode} of latent {self.latent} has no reference activation, the unit of its "
                "strength; give one, such as the 99th percentile where it fires"
            )
        if not 0 < self.reference < math.inf:
            raise ConfigError(
                f"latent {self.latent} has reference activation {self.reference}; it never fires, "
                "so a strength has no unit: choose another latent"
            )

    def __str__(self) -> str:
        if self.mode == "ablate":
            return "ablate"
        unit = (
            ""
            if self.reference is None or self.mode == "scale"
            else f" × {round(self.reference, 4)}"
        )
        return f"{self.mode} {self.strength}{unit}"

    @property
    def target(self) -> float:
        """What is added, clamped to or the least value, in activation units; 0 of other modes."""
        if self.mode in ("scale", "ablate"):
            return 0.0
        assert self.strength is not None and self.reference is not None
        return self.strength * self.reference

    @property
    def line(self) -> tuple[float, float, float]:
        """``gain``, ``shift`` and ``floor``, see the module docstring."""
        if self.mode == "scale":
            assert self.strength is not None
            return self.strength, 0.0, 0.0
        gain = 1.0 if self.mode in ("add", "minimum") else 0.0
        if self.mode == "minimum":
            return gain, 0.0, max(0.0, self.target)
        return gain, self.target, 0.0


@dataclass(frozen=True, eq=False)
class Push:
    """A fixed direction that is added: what baselines do, at the places where edits act."""

    direction: Float[Tensor, " d"]
    """Only where it points counts, not how long it is."""
    strength: float
    """In units of ``reference``."""
    reference: float
    """Length of what strength 1 adds."""
    name: str = "direction"

    def __post_init__(self) -> None:
        norm = float(self.direction.norm())
        if self.direction.ndim != 1 or not 0 < norm < math.inf:
            raise ConfigError(
                f"{self.name} has shape {tuple(self.direction.shape)} and norm {norm}; give one "
                "finite vector that is not 0"
            )
        if not math.isfinite(self.strength) or not 0 < self.reference < math.inf:
            raise ConfigError(
                f"{self.name} has strength {self.strength} and reference {self.reference}; give "
                "finite numbers, the reference above 0"
            )

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """What is added."""
        return self.direction * (self.strength * self.reference / self.direction.norm())


Change = Edit | Push


def check_edits(sae: MatryoshkaSAE, edits: Sequence[Change]) -> None:
    """Every latent exists and is edited once; every direction has the SAE's width."""
    found: dict[int, Edit] = {}
    for edit in edits:
        if isinstance(edit, Push):
            if len(edit.direction) != sae.config.d_model:
                raise ConfigError(
                    f"{edit.name} has {len(edit.direction)} numbers, activations at "
                    f"{sae.config.site!r} have {sae.config.d_model}; give a direction of that site"
                )
            continue
        if not 0 <= edit.latent < sae.config.n_latents:
            raise ConfigError(
                f"latent {edit.latent} does not exist; this SAE has latents "
                f"0–{sae.config.n_latents - 1}"
            )
        if edit.latent in found:
            raise ConfigError(
                f"latent {edit.latent} is edited twice, by '{found[edit.latent]}' and '{edit}'; "
                "give it one edit in each row"
            )
        found[edit.latent] = edit


class Plan:
    """Edits made ready for one device: what is needed of the SAE, copied once.

    Parameters
    ----------
    rows
        Edits of each row; one list is for all rows.
    """

    def __init__(
        self, sae: MatryoshkaSAE, rows: Sequence[Sequence[Change]], device: torch.device | str
    ) -> None:
        for row in rows:
            check_edits(sae, row)
        self.n_rows = len(rows)
        edits = [{e.latent: e for e in row if isinstance(e, Edit)} for row in rows]
        self.latents = sorted({latent for row in edits for latent in row})
        with torch.no_grad():
            chosen = torch.tensor(self.latents, dtype=torch.long, device=sae.W_dec.device)
            rows_dec = sae.W_dec[chosen].to(device)
            # One memory access for each latent: columns of W_enc as rows.
            w_enc = sae.W_enc.T[chosen]
            threshold = sae.threshold[chosen] if sae.threshold.ndim else sae.threshold
            self._w_dec = rows_dec
            self._w_enc = w_enc.to(device).contiguous()
            self._b_enc = (sae.b_enc[chosen] - w_enc @ sae.b_dec).to(device)
            self._threshold = threshold.clamp_min(0).to(device)
        # Which k latents are the largest is not known from the edited ones.
        self._whole = None
        if sae.config.activation == "topk" and self.latents:
            same = sae.W_dec.device == torch.device(device)
            self._whole = sae if same else copy.deepcopy(sae).to(device)
        nothing = (1.0, 0.0, 0.0)
        lines = [[row[f].line if f in row else nothing for f in self.latents] for row in edits]
        made = torch.tensor(lines, dtype=rows_dec.dtype, device=device)
        gain, shift, floor = made.reshape(self.n_rows, 1, -1, 3).unbind(-1)
        zero = torch.zeros(sae.config.d_model, dtype=rows_dec.dtype, device=device)
        pushed = [
            sum((e.vector.to(zero) for e in row if isinstance(e, Push)), zero) for row in rows
        ]
        push = torch.stack(pushed)[:, None]
        self._pushes = any(isinstance(e, Push) for row in rows for e in row)
        self._lines = (gain, shift, floor, push)
        self._spread: dict[int, tuple[Tensor, ...]] = {1: tuple(t[0, 0] for t in self._lines)}

    def encode(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n"]:
        """:meth:`MatryoshkaSAE.encode` of the edited latents."""
        if self._whole is not None:
            return self._whole.encode(h)[..., self.latents]
        pre = torch.nn.functional.linear(h, self._w_enc, self._b_enc)
        return pre * (pre > self._threshold)

    @torch.no_grad()
    def apply(
        self,
        h: Float[Tensor, "*batch d"],
        mask: Bool[Tensor, "N T"] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Float[Tensor, "*batch d"]:
        """Edited activations, in the dtype of ``h``.

        Parameters
        ----------
        mask
            Tokens that are edited; without one, all.
        rows
            Which row's edits each of N rows takes; without it, each row's take as many in a row as
            N is larger than R, as beams and returned sequences lie.
        """
        gain, shift, floor, push = self._for(h, rows)
        x = h.to(self._w_dec.dtype)
        change: Tensor | None = None
        if self.latents:
            z = self.encode(x)
            moved = torch.addcmul(shift, z, gain).clamp_min_(floor).sub_(z)
            if mask is not None:
                moved *= mask[..., None]
            change = moved @ self._w_dec
        if self._pushes:
            pushed = push if mask is None else push * mask[..., None]
            change = pushed if change is None else change + pushed
        return h if change is None else h + change.to(h.dtype)

    def _for(self, h: Tensor, rows: Sequence[int] | None) -> tuple[Tensor, ...]:
        if self.n_rows == 1:
            return self._spread[1]
        if rows is not None:
            return tuple(t[list(rows)] for t in self._lines)
        n = len(h)
        if n % self.n_rows:
            raise ConfigError(
                f"edits are given for {self.n_rows} rows and the model runs {n}; give edits for "
                "each row of the batch, or one list for all"
            )
        if n not in self._spread:
            repeats = n // self.n_rows
            self._spread[n] = tuple(t.repeat_interleave(repeats, 0) for t in self._lines)
        return self._spread[n]


def apply_edits(
    sae: MatryoshkaSAE, edits: Sequence[Change], h: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """Edited activations, in the dtype of ``h``; ``h`` itself when there are no edits.

    >>> from phantom.tour import dictionary
    >>> h = torch.ones(2, 128)
    >>> apply_edits(dictionary(), [], h) is h
    True
    >>> changed = apply_edits(dictionary(), [Edit(3, strength=2.0, reference=1.5)], h) - h
    >>> torch.allclose(changed, 3.0 * dictionary().W_dec[3].expand(2, -1), atol=1e-5)
    True
    """
    return Plan(sae, [edits], h.device).apply(h) if edits else h
