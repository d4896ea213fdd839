"""Dictionaries → labels: an LLM names latents, and each name is tested on held-out patients."""

from autointerp.batch import BatchConfig
from autointerp.client import Client, EndpointConfig, Ledger, Reply, Request
from autointerp.collect import (
    Example,
    LatentExamples,
    collect_examples,
    latent_activations,
    reference_activation,
)
from autointerp.delphi import DelphiConfig, write_delphi_cache
from autointerp.explain import Label, LabelConfig, label_latents, read_labels
from autointerp.limits import Estimate, Limits
from autointerp.redact import redact
from autointerp.score import Detection, detect

__all__ = [
    "BatchConfig",
    "Client",
    "DelphiConfig",
    "Detection",
    "EndpointConfig",
    "Estimate",
    "Example",
    "Label",
    "LabelConfig",
    "LatentExamples",
    "Ledger",
    "Limits",
    "Reply",
    "Request",
    "collect_examples",
    "detect",
    "label_latents",
    "latent_activations",
    "read_labels",
    "redact",
    "reference_activation",
    "write_delphi_cache",
]
