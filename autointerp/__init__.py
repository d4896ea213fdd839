"""Dictionaries → labels: an LLM names latents, and each name is tested on held-out patients."""

from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.collect import (
    Example,
    LatentExamples,
    collect_examples,
    latent_activations,
    reference_activation,
)
from autointerp.delphi import DelphiConfig, write_delphi_cache
from autointerp.explain import Label, LabelConfig, label_latents, read_labels
from autointerp.score import Detection, detect

__all__ = [
    "Client",
    "DelphiConfig",
    "Detection",
    "EndpointConfig",
    "Example",
    "Label",
    "LabelConfig",
    "LatentExamples",
    "Ledger",
    "collect_examples",
    "detect",
    "label_latents",
    "latent_activations",
    "read_labels",
    "reference_activation",
    "write_delphi_cache",
]
