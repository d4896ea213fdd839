"""Load whatever can be harvested: MAIRA-2, another LLaVA, an image encoder, a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hooks.maira2 import Maira2Config, check_dtype, checkpoint_errors, load_model

Sees = Literal["studies", "films", "texts"]


class Loaded(NamedTuple):
    """A model in evaluation mode, and what it takes."""

    model: Any
    sees: Sees
    """``studies``: films and text, as MAIRA-2; ``films``: an image encoder alone; ``texts``: a
    language model alone."""


def load_any(
    source: str | Path, dtype: torch.dtype | str = "auto", device_map: Any = None
) -> Loaded:
    """A checkpoint of any architecture that has sites, by what its configuration says.

    Raises
    ------
    CheckpointError
        If it cannot be loaded.
    ConfigError
        If there is no such dtype.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers import AutoModelForImageTextToText as AutoLlava

    check_dtype(dtype)
    with checkpoint_errors(source):
        config: Any = AutoConfig.from_pretrained(source)
    if isinstance(config, Maira2Config):
        return Loaded(load_model(source, dtype, device_map), "studies")
    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    sees: Sees = "studies" if both else "films" if hasattr(config, "patch_size") else "texts"
    loader = {"studies": AutoLlava, "films": AutoModel, "texts": AutoModelForCausalLM}[sees]
    with checkpoint_errors(source):
        model = loader.from_pretrained(source, dtype=dtype, device_map=device_map)
    return Loaded(model.eval(), sees)
