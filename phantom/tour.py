"""A small pipeline made once in this process, for examples: studies, activations, a dictionary."""

from __future__ import annotations

import atexit
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hooks.harvest import HarvestConfig, harvest
from hooks.store import ActivationFolder
from hooks.studies import Study
from phantom.model import load
from phantom.truth import write_studies
from sae.model import MatryoshkaSAE
from sae.train import train
from sae.trainer import TrainConfig

SITE = "llm.3.resid_post"
N_STUDIES = 4


@lru_cache(maxsize=1)
def model() -> tuple[Any, Any]:
    """The shipped model and its processor."""
    return load()


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = TemporaryDirectory(prefix="maira-sae-tour-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@lru_cache(maxsize=1)
def studies() -> list[Study]:
    """Four drawn studies, in a temporary folder that goes when Python ends."""
    return write_studies(_folder() / "studies", range(N_STUDIES))


@lru_cache(maxsize=1)
def activations() -> ActivationFolder:
    """Their activations at :data:`SITE`.

    >>> activations().sites
    ['llm.3.resid_post']
    """
    return harvest(*model(), studies(), HarvestConfig((SITE,)), _folder() / "acts")


@lru_cache(maxsize=1)
def dictionary() -> MatryoshkaSAE:
    """A dictionary of 256 latents after 20 steps: enough to show, far too little to believe."""
    config = TrainConfig(
        SITE,
        expansion=2,
        k=4,
        steps=20,
        batch=128,
        warmup_steps=2,
        heldout=0.3,
        calibration_rows=256,  # else an untrained threshold lets every latent fire everywhere
    )
    return train(activations(), config, _folder() / "sae")
