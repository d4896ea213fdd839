"""Where latents fire on a study's films: a grid of patches for each film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from hooks.processor import Maira2Processor
from hooks.roles import View
from hooks.sites import observe
from hooks.store import ActivationFolder
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.evidence import ReportReader

Grid = Float[np.ndarray, "rows columns"]
FilmHeat = dict[str, Grid]
"""By film: ``frontal``, ``lateral``, ``prior``."""


def sees_patches(sae: MatryoshkaSAE) -> bool:
    """Whether the dictionary was trained on image patches; elsewhere heat would mean nothing."""
    return sae.config.site.startswith(("vision.", "projector")) or sae.config.policy in (
        "patches",
        "all",
    )


@torch.no_grad()
def study_heat(
    model: Any,
    processor: Maira2Processor,
    sae: MatryoshkaSAE,
    study: Study,
    latents: Sequence[int],
) -> dict[int, FilmHeat]:
    """Activations of ``latents`` on every film of a study, by one pass of the model."""
    reader = ReportReader(model, processor, sae, study.model_copy(update={"report": "."}))
    seen: list[torch.Tensor] = []
    with observe(reader.site, seen.append):
        reader.log_probs(1)
    x = reader.of_patches(seen[0]).to(sae.W_dec)
    z = sae.encode_some(x, list(latents)).float().cpu().numpy()
    return {latent: reader.by_film(z[:, i]) for i, latent in enumerate(latents)}


class StoredPatches:
    """The patches of an activation folder; nothing is run but the dictionary."""

    def __init__(self, sae: MatryoshkaSAE, folder: ActivationFolder) -> None:
        self.sae, self.folder = sae, folder
        self.site = folder.check_site(sae.config.site)
        self._view, self._row, self._column = (
            folder.column(name) for name in ("view", "patch_row", "patch_column")
        )
        study, self._image = folder.column("study"), folder.column("role") == "image"
        self._rows: dict[str, tuple[int, int]] = {}
        for i in np.flatnonzero(self._image).tolist():
            first, _ = self._rows.get(study[i], (i, i))
            self._rows[study[i]] = first, i + 1

    @torch.no_grad()
    def heat(self, study: str, latents: Sequence[int]) -> dict[int, FilmHeat]:
        """Activations of ``latents`` on the patches that the folder kept; NaN on others."""
        if study not in self._rows or not latents:
            return {latent: {} for latent in latents}
        first, stop = self._rows[study]
        x = self.folder.rows(self.site, first, stop).to(self.sae.W_dec)
        z = self.sae.encode_some(x, list(latents)).float().cpu().numpy()
        out: dict[int, FilmHeat] = {latent: {} for latent in latents}
        for view in [one.name.lower() for one in View]:
            own = np.flatnonzero(self._image[first:stop] & (self._view[first:stop] == view))
            if not len(own):
                continue
            row, column = self._row[first:stop][own], self._column[first:stop][own]
            for i, latent in enumerate(latents):
                grid = np.full((int(row.max()) + 1, int(column.max()) + 1), np.nan)
                grid[row, column] = z[own, i]
                out[latent][view] = grid
        return out


def film_paths(study: Study) -> Mapping[str, Any]:
    """The films that a study has, by view."""
    named = {view.name.lower(): getattr(study, view.name.lower()) for view in View}
    return {view: path for view, path in named.items() if path is not None}
