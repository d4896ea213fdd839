"""The unit of an edit's strength: how strong a latent is where it fires, for each kind of token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooks.files import (
    ConfigError,
    FolderError,
    nearest,
    read_json,
    reject_unknown_keys,
    write_json,
)
from hooks.html import facts
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE
from steering.edits import Edit, Mode

ALL = "all"
"""Name under which the reference over tokens of every role stands."""


@dataclass(frozen=True)
class References:
    """Reference activations of some latents, by role; write them beside the SAE."""

    site: str
    quantile: float
    """Of the activations where the latent fires."""
    values: Mapping[int, Mapping[str, float]]
    """By latent and role (``image``, ``report`` …, and ``all``); 0 where it never fires."""
    n: Mapping[str, int]
    """Tokens of each role."""

    def of(self, latent: int, role: str = ALL) -> float:
        """The reference of a latent on tokens of a role.

        Raises
        ------
        ConfigError
            If the latent was not measured or there were no tokens of that role.
        """
        if latent not in self.values:
            raise ConfigError(
                f"latent {latent} has no reference; measured are {sorted(self.values)}: measure it "
                "with measure_references"
            )
        by_role = self.values[latent]
        if role not in by_role:
            raise ConfigError(
                f"no reference for role {role!r}{nearest(role, by_role)}; there are {list(by_role)}"
            )
        return by_role[role]

    def edit(self, latent: int, strength: float, mode: Mode = "add", role: str = ALL) -> Edit:
        """An edit whose strength is in units of the latent's own reference."""
        return Edit(latent, strength, self.of(latent, role), mode)

    def _repr_html_(self) -> str:
        rows = {f"latent {latent}": by_role for latent, by_role in self.values.items()}
        shown = {
            name: ", ".join(f"{role} {value:.3g}" for role, value in by_role.items())
            for name, by_role in rows.items()
        }
        return facts(f"References at {self.site}, quantile {self.quantile}", shown)

    def save(self, path: Path) -> None:
        """Write one JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> References:
        """Read what :meth:`save` wrote."""
        found: Any = read_json(path)
        wanted = ("site", "quantile", "values", "n")
        reject_unknown_keys(found, wanted, str(path))
        if missing := [name for name in wanted if name not in found]:
            raise FolderError(f"{path} lacks {missing}; measure the references again")
        values = {int(latent): by_role for latent, by_role in found["values"].items()}
        return cls(found["site"], found["quantile"], values, found["n"])


@torch.no_grad()
def measure_references(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    latents: Sequence[int],
    quantile: float = 0.99,
    batch: int = 8192,
) -> References:
    """References of ``latents`` over a folder's tokens, of each role and of all.

    >>> from phantom.tour import activations, dictionary
    >>> measure_references(dictionary(), activations(), [3, 5]).n["all"] == activations().n_tokens
    True
    """
    for latent in latents:
        if not 0 <= latent < sae.config.n_latents:
            raise ConfigError(f"latent {latent} is outside 0–{sae.config.n_latents - 1}")
    if not 0 < quantile <= 1:
        raise ConfigError(f"quantile {quantile} is outside 0–1; 0.99 is customary")
    folder.check_trained(sae.config.policy)
    site = folder.check_site(sae.config.site)
    pieces = []
    for start in range(0, folder.n_tokens, batch):
        x = folder.rows(site, start, min(start + batch, folder.n_tokens)).to(sae.W_dec)
        pieces.append(sae.encode_some(x, latents).float().cpu())
    z = torch.cat(pieces).numpy()
    role = folder.column("role")
    names = [r.name.lower() for r in Role if (role == r.name.lower()).any()]
    masks = {**{name: role == name for name in names}, ALL: np.ones(len(role), dtype=bool)}
    values = {
        latent: {name: _quantile(z[mask, i], quantile) for name, mask in masks.items()}
        for i, latent in enumerate(latents)
    }
    return References(site, quantile, values, {name: int(m.sum()) for name, m in masks.items()})


def _quantile(values: np.ndarray, quantile: float) -> float:
    fired = values[values > 0]
    return float(np.quantile(fired, quantile)) if len(fired) else 0.0
