"""Example sentences for chosen latents: what they fire on, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError
from hooks.roles import Role
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE


class Example(NamedTuple):
    """A sentence of one report: the one with its strongest token for a latent, or any one."""

    study: str
    patient: str
    token_ids: list[int]
    activations: list[float]

    @property
    def peak(self) -> float:
        """Largest activation in the sentence; 0 where the latent is silent."""
        return max(self.activations)


class LatentExamples(NamedTuple):
    """Examples of one latent, split so that no patient is on both sides."""

    latent: int
    explain: list[Example]
    """Strongest first; what an explainer may see."""
    contrast: list[Example]
    """As many sentences of reports in which the latent is silent, of the same patients' side."""
    positives: list[Example]
    """Held-out sentences on which the latent fires, spread over its range."""
    negatives: list[Example]
    """Held-out sentences of reports in which the latent is silent throughout."""
    reference: float
    """99th percentile of the latent where it fires; the unit of steering strength."""


@torch.no_grad()
def latent_activations(
    sae: MatryoshkaSAE, folder: ActivationFolder, latents: Sequence[int], batch: int = 8192
) -> Float[Tensor, "n_tokens n"]:
    """Activations of a few latents on every row of the folder."""
    for latent in latents:
        if not 0 <= latent < sae.config.n_latents:
            raise ConfigError(f"latent {latent} is outside 0–{sae.config.n_latents - 1}")
    folder.check_trained(sae.config.policy)
    site = folder.check_site(sae.config.site)
    pieces = [
        sae.encode_some(
            folder.rows(site, start, min(start + batch, folder.n_tokens)).to(sae.W_dec), latents
        ).cpu()
        for start in range(0, folder.n_tokens, batch)
    ]
    return torch.cat(pieces)


def reference_activation(sae: MatryoshkaSAE, folder: ActivationFolder, latent: int) -> float:
    """99th percentile of a latent where it fires in ``folder``; 0 if it never does."""
    return _p99(latent_activations(sae, folder, [latent])[:, 0].numpy())


def _p99(values: np.ndarray) -> float:
    fired = values[values > 0]
    return float(np.quantile(fired, 0.99)) if len(fired) else 0.0


def collect_examples(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    latents: Sequence[int],
    *,
    n_explain: int = 10,
    n_score: int = 20,
    heldout: float = 0.2,
    max_tokens: int = 48,
    seed: int = 0,
) -> list[LatentExamples]:
    """Examples of each latent from report tokens.

    Parameters
    ----------
    n_explain
        Sentences shown to an explainer, the strongest of the patients not held out.
    n_score
        Held-out sentences, half of them positives; fewer where the data has fewer.
    max_tokens
        A longer sentence is cut around its strongest token.
    """
    activations = latent_activations(sae, folder, latents).numpy()
    reports = _Reports(folder, heldout, max_tokens)
    return [
        reports.examples(latent, activations[:, i], n_explain, n_score, seed)
        for i, latent in enumerate(latents)
    ]


class _Reports:
    """The report rows of a folder, as contiguous stretches of one study each."""

    def __init__(self, folder: ActivationFolder, heldout: float, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.sentences = folder.column("sentence")
        self.token_ids = folder.column("token_id")
        self.patients = folder.column("patient")
        self.studies = folder.column("study")
        is_report = folder.column("role") == Role.REPORT.name.lower()
        rows = np.flatnonzero(is_report)
        if len(rows) == 0:
            raise ConfigError(
                f"{folder.folder} keeps no report tokens (policy "
                f"{folder.manifest['harvest']['policy']!r}); harvest with policy 'published'"
            )
        # A study's report may be broken by grounding tokens; a stretch never spans two studies.
        sequences = folder.column("sequence")[rows]
        starts = np.flatnonzero(np.diff(sequences, prepend=-1))
        self.stretches = np.split(rows, starts[1:])
        side = folder.heldout(heldout)
        self.is_heldout = np.array([bool(side[stretch[0]]) for stretch in self.stretches])

    def examples(
        self, latent: int, values: np.ndarray, n_explain: int, n_score: int, seed: int
    ) -> LatentExamples:
        rng = np.random.default_rng([seed, latent])
        peaks = np.array([values[stretch].max() for stretch in self.stretches])
        seen = np.flatnonzero(~self.is_heldout & (peaks > 0))
        seen = seen[np.argsort(-peaks[seen], kind="stable")][:n_explain]
        unseen = rng.permutation(np.flatnonzero(~self.is_heldout & (peaks == 0)))[:n_explain]
        firing = np.flatnonzero(self.is_heldout & (peaks > 0))
        firing = firing[np.argsort(-peaks[firing], kind="stable")]
        count = min(n_score // 2, len(firing))
        spread = firing[np.linspace(0, len(firing) - 1, count).astype(int)] if count else []
        silent = np.flatnonzero(self.is_heldout & (peaks == 0))
        silent = rng.permutation(silent)[: n_score - n_score // 2]
        return LatentExamples(
            latent=latent,
            explain=[self._sentence(i, values, None) for i in seen],
            contrast=[self._sentence(i, values, rng) for i in unseen],
            positives=[self._sentence(i, values, None) for i in spread],
            negatives=[self._sentence(i, values, rng) for i in silent],
            reference=_p99(values),
        )

    def _sentence(self, index: int, values: np.ndarray, rng: np.random.Generator | None) -> Example:
        """The sentence of the peak, or of a random token when ``rng`` is given."""
        rows = self.stretches[index]
        centre = int(rng.integers(len(rows))) if rng else int(values[rows].argmax())
        own = np.flatnonzero(self.sentences[rows] == self.sentences[rows[centre]])
        first = max(own[0], min(centre - self.max_tokens // 2, own[-1] + 1 - self.max_tokens))
        window = rows[first : min(own[-1] + 1, first + self.max_tokens)]
        return Example(
            study=str(self.studies[rows[0]]),
            patient=str(self.patients[rows[0]]),
            token_ids=self.token_ids[window].tolist(),
            activations=values[window].tolist(),
        )
