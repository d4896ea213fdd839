"""Edits as other libraries run them: a hook of TransformerLens, an intervention of nnsight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sae.model import MatryoshkaSAE
from steering.edits import Change, Plan


def intervention(
    sae: MatryoshkaSAE, edits: Sequence[Change], device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """From activations at the SAE's site to edited ones, at all positions.

    For nnsight, at the module of the site::

        change = intervention(sae, edits)
        with nn.trace(**inputs):
            layer.output = change(layer.output)
            logits = nn.output.logits.save()
    """
    return Plan(sae, [edits], device).apply


def lens_hook(
    sae: MatryoshkaSAE, edits: Sequence[Change], device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """A hook for ``fwd_hooks=[(hooks.lens.lens_name(sae.config.site), lens_hook(...))]``."""
    change = intervention(sae, edits, device)

    def hook(value: Tensor, hook: Any = None) -> Tensor:
        return change(value)

    return hook
