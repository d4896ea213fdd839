"""Dictionaries → labels: an LLM names latents, and each name is tested on held-out patients."""

from autointerp.activations import latent_activations
from autointerp.batch import BatchConfig
from autointerp.client import Client, EndpointConfig, Ledger, Reply, Request
from autointerp.collect import CollectConfig, collect
from autointerp.delphi import DelphiConfig, write_delphi_cache
from autointerp.features import Example, Features, Stats
from autointerp.label_config import LabelConfig
from autointerp.labellers import Labeller, Llm, Words, labeller_of
from autointerp.labelling import detection_scores, label_latents
from autointerp.labels import Label, read_labels
from autointerp.limits import Estimate, Limits
from autointerp.redact import redact
from autointerp.scores import Score, read_scores, write_scores

__all__ = [
    "BatchConfig",
    "Client",
    "CollectConfig",
    "DelphiConfig",
    "EndpointConfig",
    "Estimate",
    "Example",
    "Features",
    "Label",
    "LabelConfig",
    "Labeller",
    "Ledger",
    "Limits",
    "Llm",
    "Reply",
    "Request",
    "Score",
    "Stats",
    "Words",
    "collect",
    "detection_scores",
    "label_latents",
    "labeller_of",
    "latent_activations",
    "read_labels",
    "read_scores",
    "redact",
    "write_delphi_cache",
    "write_scores",
]
