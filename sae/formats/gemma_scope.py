"""Gemma Scope: ``params.npz`` with a JumpReLU dictionary that takes raw activations.

``b_dec`` is not subtracted before encoding there; on reading it moves into ``b_enc``, exactly.
"""

from __future__ import annotations

import re
from pathlib import Path

from hooks.files import FormatError
from sae.formats.given import Given
from sae.formats.tensors import Tensors, load_tensors
from sae.formats.weights import Weights, assemble
from sae.model import MatryoshkaSAE


def read(weights: Path, given: Given) -> MatryoshkaSAE:
    """Read a ``params.npz``; the layer is taken from the folders above it.

    Raises
    ------
    FormatError
        If an array is missing, or it was fine-tuned with a scaling factor.
    """
    loaded = load_tensors(weights)
    names = {re.sub("^w_", "W_", name): value for name, value in loaded.values.items()}
    tensors = Tensors(weights, names)
    enc, b_enc, dec, b_dec, threshold = tensors.take(
        "W_enc", "b_enc", "W_dec", "b_dec", "threshold"
    )
    factor = names.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise FormatError(f"{weights} holds a scaling_factor other than 1; not readable")
    value = Weights(enc.mT, b_enc, dec, b_dec, threshold).with_input_bias()
    origin = {
        "format": "gemma_scope",
        "class": "JumpReLU",
        "file": weights.name,
        "folded": "not needed",
    }
    facts = {"site": _site(weights), "activation": "threshold"}
    return assemble(weights, value, given, facts, origin)


def _site(weights: Path) -> str:
    """From folders like ``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``.

    >>> _site(Path("gemma-scope-2b-pt-mlp/layer_5/width_16k/average_l0_50/params.npz"))
    'llm.5.mlp_out'
    """
    path = weights.as_posix()
    layer = re.search(r"/layer_(\d+)/", path)
    kind = re.search(r"gemma-scope-[\w.-]+-(res|mlp)\b", path)
    places = {"res": "resid_post", "mlp": "mlp_out"}
    return f"llm.{layer[1]}.{places[kind[1]]}" if layer and kind else ""
