"""What a dictionary is measured beside, at its own L0: PCA, random directions, other dictionaries.

PCA has as many components, other dictionaries get a threshold for it, random ones fire as often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from hooks.files import ConfigError
from hooks.store import ActivationFolder
from sae.baselines import fit_pca, random_dictionary
from sae.calibrate import calibrate_threshold
from sae.intervals import DRAWS
from sae.model import MatryoshkaSAE


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on whom."""

    heldout: float = 0.2
    """Share of patients."""
    ks: tuple[int, ...] = (1, 2, 5, 10)
    """Latents of the probes."""
    least: int = 5
    """Studies with a label, and without, that each side must have for a probe."""
    draws: int = DRAWS
    """Resamples of patients behind an interval."""
    sample_rows: int = 8192
    """Held-out rows on which the random dictionary's firing rates are set."""
    batch: int = 4096
    seed: int = 0


class Code(NamedTuple):
    """Anything that encodes rows and puts them together again."""

    encode: Callable[[Tensor], Tensor]
    """Rows ``[n, d]`` to features ``[n, m]``, 0 or above."""
    decode: Callable[[Tensor], Tensor]
    """Features back to rows."""
    n_features: int
    l0: float | None = None
    """Fixed, or None to count what fires."""
    sae: MatryoshkaSAE | None = None

    def reconstruct(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What is left of rows, for a model to go on with."""
        return self.decode(self.encode(x))


def code_of(sae: MatryoshkaSAE) -> Code:
    """A dictionary at inference."""

    def encode(x: Tensor) -> Tensor:
        return sae.encode(x.to(sae.W_dec))

    return Code(encode, sae.decode, sae.config.n_latents, None, sae)


def codes(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    config: EvaluationConfig,
    others: Mapping[str, MatryoshkaSAE],
) -> dict[str, Code]:
    """The dictionary under the name ``sae``, and all that stands beside it at its L0.

    The thresholds of ``others`` are changed. PCA's components are those of training patients.

    Raises
    ------
    ConfigError
        If another dictionary is of another site, or has a name that is taken.
    """
    site = sae.config.site
    heldout = folder.heldout(config.heldout)
    if not heldout.any() or heldout.all():
        raise ConfigError(
            f"{folder.folder}: {int(heldout.sum())} of {len(heldout)} rows are of held-out "
            "patients; change the held-out share, or harvest more studies"
        )
    l0 = _l0(sae, folder, heldout, config.batch)
    if l0 <= 0:
        raise ConfigError("no latent of the dictionary fires on held-out rows; train for longer")
    rank = min(max(round(l0), 1), sae.config.d_model)
    pca = fit_pca(folder, site, ~heldout, rank, config.batch)
    sample = _rows(folder, site, heldout, config.sample_rows).to(sae.W_dec)
    found = {
        "sae": code_of(sae),
        "pca": Code(pca.encode, pca.decode, 2 * rank, float(rank)),
        "random": code_of(random_dictionary(sae, sample, config.seed)),
    }
    for name, other in others.items():
        if name in found:
            raise ConfigError(f"the name {name!r} is taken by {sorted(found)}; give another one")
        if other.config.site != site:
            raise ConfigError(
                f"{name} is a dictionary of site {other.config.site!r}, not of {site!r}; compare "
                "dictionaries of one site"
            )
        with torch.no_grad():
            other.threshold.fill_(
                calibrate_threshold(other, folder, heldout, l0, config.batch).threshold
            )
        found[name] = code_of(other)
    return found


@torch.no_grad()
def _l0(sae: MatryoshkaSAE, folder: ActivationFolder, mask: np.ndarray, batch: int) -> float:
    active = 0
    for x, _ in batches_of(folder, sae.config.site, mask, batch):
        active += int((sae.encode(x.to(sae.W_dec)) > 0).sum())
    return active / int(mask.sum())


def batches_of(
    folder: ActivationFolder, site: str, mask: Bool[np.ndarray, " n"], batch: int
) -> Iterator[tuple[Float[Tensor, "b d"], Int64[Tensor, " b"]]]:
    """Chosen rows, and their numbers, in order."""
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        chosen = torch.from_numpy(mask[start:stop])
        if chosen.any():
            where = chosen.nonzero().flatten() + start
            yield folder.rows(site, start, stop)[chosen].float(), where


def _rows(folder: ActivationFolder, site: str, mask: np.ndarray, most: int) -> Tensor:
    """At most that many of the chosen rows, evenly spread over them."""
    numbers = np.flatnonzero(mask)
    numbers = numbers[:: max(1, -(-len(numbers) // most))]
    spread = np.zeros_like(mask)
    spread[numbers] = True
    return torch.cat([x for x, _ in batches_of(folder, site, spread, 4096)])
