"""EleutherAI/sparsify 1.3: ``sae.safetensors`` beside ``cfg.json``; top-k of each token.

It knows no normalisation of activations: its weights take what the hook gives.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hooks.files import FormatError, write_json
from sae.formats.given import Given
from sae.formats.labels import KEY, own_facts, own_record
from sae.formats.tensors import field, load_tensors, read_config
from sae.formats.weights import Weights, assemble
from sae.model import MatryoshkaSAE


def read(weights: Path, config: Path, given: Given) -> MatryoshkaSAE:
    """Read one hook point's folder.

    Raises
    ------
    FormatError
        If it is a transcoder, has a skip connection, or selects by anything but top-k.
    """
    content = read_config(config)
    for name in ("transcode", "skip_connection", "signed"):
        if field(content, name, bool, config, False):
            raise FormatError(f"{config} says {name}: that is no plain autoencoder, not readable")
    activation = field(content, "activation", str, config, "topk")
    if activation != "topk":
        raise FormatError(f"{config} says activation {activation!r}; this library reads topk")
    tensors = load_tensors(weights)
    enc, b_enc, dec, b_dec = tensors.take("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    if "W_skip" in tensors.values:
        raise FormatError(f"{weights} holds W_skip, a skip connection; not readable")
    k, d_in = field(content, "k", int, config), field(content, "d_in", int, config)
    if k is None and given.k is None:
        raise FormatError(f"{config} lacks k; give k")
    if d_in not in (None, b_dec.numel()):
        raise FormatError(f"{config} says d_in {d_in}, {weights} holds {tensors.listing()}")
    value = Weights(enc, b_enc, dec, b_dec, torch.zeros(()))
    facts: dict[str, Any] = {"site": _site(config.parent.name)}
    facts |= own_facts(content, config) | {"activation": "topk", "k": k}
    origin = {
        "format": "sparsify",
        "class": "SparseCoder",
        "file": weights.name,
        "folded": "not needed",
    }
    return assemble(weights, value, given, facts, origin, threshold_unset=True)


def _site(folder: str) -> str:
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)(\.mlp)?", folder)
    return f"llm.{found[1]}.{'mlp_out' if found[2] else 'resid_post'}" if found else ""


def write(sae: MatryoshkaSAE, folder: Path) -> None:
    """Write ``sae.safetensors`` and ``cfg.json``.

    Raises
    ------
    FormatError
        If the dictionary selects by a threshold, which the format cannot say.
    """
    config, value = sae.config, Weights.of(sae)
    if config.activation != "topk":
        raise FormatError(
            "sparsify selects the k largest of each token, this dictionary by a threshold; "
            "convert with activation='topk' (--activation topk), which changes what is active"
        )
    expansion = config.n_latents // config.d_model
    described = {
        "activation": "topk",
        "expansion_factor": max(1, expansion),
        "normalize_decoder": True,
        "num_latents": config.n_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_model,
    }
    write_json(folder / "cfg.json", described | {KEY: own_record(config)})
    tensors = {
        "encoder.weight": value.encoder,
        "encoder.bias": value.b_enc,
        "W_dec": value.decoder,
        "b_dec": value.b_dec,
    }
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "sae.safetensors")
