"""Weights in no known layout, recognised by names and shapes; nothing is guessed in silence.

Names are matched by their endings, so wrappers like ``module.`` or ``ae.`` do not matter. The
orientation of a matrix follows from the lengths of the biases, or, where both lengths are equal,
from its name (``*.weight`` is a linear layer's, ``[out, in]``). ``b_dec`` is taken to be
subtracted before encoding, unless a configuration says ``apply_b_dec_to_input: false``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hooks.files import FormatError
from sae.formats.given import Given
from sae.formats.labels import model_of, site_of_hook
from sae.formats.tensors import Tensors, load_tensors, read_config, whole_numbers
from sae.formats.weights import Weights, assemble
from sae.model import MatryoshkaSAE

NAMES = {
    "encoder": ("w_enc", "encoder.weight", "encoder.linear.weight", "enc.weight"),
    "b_enc": ("b_enc", "encoder.bias", "encoder.linear.bias", "enc.bias", "latent_bias"),
    "decoder": ("w_dec", "decoder.weight", "decoder.linear.weight", "dec.weight"),
    "b_dec": ("b_dec", "decoder.bias", "decoder.linear.bias", "dec.bias", "pre_bias"),
    "threshold": ("threshold", "thresholds"),
    "group_sizes": ("group_sizes",),
    "k": ("k",),
}
"""Endings of tensor names, in lower case, by what they are."""
REQUIRED = ("encoder", "b_enc", "decoder", "b_dec")


def read(weights: Path, config: Path | None, given: Given) -> MatryoshkaSAE:
    """Read weights whose layout no library is known to write.

    Raises
    ------
    FormatError
        Lists every tensor found and says what is missing or ambiguous, and what to give.
    """
    tensors = load_tensors(weights)
    content = read_config(config)
    found = {role: _one(tensors, role, names) for role, names in NAMES.items()}
    missing = [role for role in REQUIRED if found[role] is None]
    if missing:
        _fail(tensors, f"no tensor for {', '.join(missing)} (known names: {_known(missing)})")
    names = {role: str(name) for role, name in found.items()}
    b_enc, b_dec = tensors.values[names["b_enc"]], tensors.values[names["b_dec"]]
    f, d = b_enc.numel(), b_dec.numel()
    encoder = _oriented(tensors, names["encoder"], f, d, linear_is_latent_major=True)
    decoder = _oriented(tensors, names["decoder"], f, d, linear_is_latent_major=False)

    if _said(content, "input_unit_norm", bool, config):
        _fail(tensors, "its inputs were normalised token by token, which weights cannot express")
    groups, k = None, None
    if found["group_sizes"] is not None:
        stored = tensors.values[found["group_sizes"]].flatten().tolist()
        groups = whole_numbers(stored, "group_sizes", weights)
    elif (said := _said(content, "group_sizes", list, config)) is not None:
        groups = whole_numbers(said, "group_sizes", config)
    if found["k"] is not None:
        k = tensors.whole(found["k"])
    else:
        said = [_said(content, name, int, config) for name in ("k", "top_k")]
        k = next((value for value in said if value is not None), None)
    activation = given.activation or _activation(tensors, content, found, groups, config)
    unset = activation == "topk" or found["threshold"] is None
    threshold = torch.zeros(())
    if found["threshold"] is not None:
        threshold = tensors.values[names["threshold"]]
        threshold = threshold.reshape(()) if threshold.numel() == 1 else threshold
        unset = unset or bool((threshold < 0).all())
    elif activation == "threshold" and given.threshold is None:
        _fail(tensors, "no threshold; give threshold (0 keeps every positive latent)")
    if activation == "topk" and k is None and given.k is None:
        _fail(tensors, "no k for top-k; give k")
    normalised = _said(content, "normalize_activations", object, config)
    if normalised not in (None, False, "none") and given.norm_scale is None:
        _fail(
            tensors,
            f"its configuration says normalize_activations {normalised!r}; give norm_scale (the "
            "factor, or 1 if the weights already take raw activations)",
        )

    factors = [key for key in tensors.values if key.split(".")[-1] == "norm_factor"]
    if factors and given.norm_scale is None:
        factor = tensors.values[factors[0]].tolist()
        _fail(
            tensors,
            f"{factors[0]} is {factor}; give norm_scale (1 / factor if its biases were not "
            "multiplied by it before saving, else 1)",
        )
    value = Weights(encoder, b_enc.flatten(), decoder, b_dec.flatten(), threshold)
    subtracted = _said(content, "apply_b_dec_to_input", bool, config)
    if subtracted is False:  # absent means: it does, as nearly all do; recorded as an assumption
        value = value.with_input_bias()
    hook, model = (_said(content, name, str, config) for name in ("hook_name", "lm_name"))
    facts: dict[str, Any] = {
        "activation": activation,
        "site": site_of_hook(hook),
        "model": model_of(model),
    }
    facts |= {} if k is None else {"k": k}
    facts |= {} if groups is None else {"group_sizes": groups}
    origin = {
        "format": "inspected",
        "class": "unknown",
        "file": weights.name,
        "folded": "not known; taken as raw",
        "names": {role: name for role, name in found.items() if name is not None},
        "subtracts_b_dec": "taken as true" if subtracted is None else subtracted,
    }
    return assemble(weights, value, given, facts, origin, threshold_unset=unset)


def _one(tensors: Tensors, role: str, names: tuple[str, ...]) -> str | None:
    hits = [
        key
        for key in tensors.values
        if any(key.lower() == name or key.lower().endswith(f".{name}") for name in names)
    ]
    if len(hits) > 1:
        _fail(tensors, f"{len(hits)} tensors could be the {role}: {', '.join(hits)}")
    return hits[0] if hits else None


def _oriented(tensors: Tensors, name: str, f: int, d: int, linear_is_latent_major: bool) -> Tensor:
    """The matrix as ``[F, d]``."""
    matrix = tensors.values[name]
    shape = tuple(matrix.shape)
    if shape not in ((f, d), (d, f)):
        _fail(tensors, f"{name} is {list(shape)}, the biases say {f} latents of width {d}")
    if f != d:
        return matrix if shape == (f, d) else matrix.mT
    linear = name.lower().endswith(".weight")
    return matrix if linear == linear_is_latent_major else matrix.mT


def _activation(
    tensors: Tensors,
    content: Mapping[str, Any],
    found: Mapping[str, str | None],
    groups: list[int] | None,
    config: Path | None,
) -> str:
    words = " ".join(
        str(_said(content, name, str, config) or "").lower()
        for name in ("dict_class", "architecture", "activation", "activation_fn", "sae_type")
    )
    thresholded = ("matryoshka", "batchtopk", "batch_topk", "batch-topk", "jump")
    if groups is not None or any(word in words for word in thresholded):
        return "threshold"
    if "topk" in words:
        return "topk"
    if found["threshold"] is not None and found["k"] is None:
        return "threshold"
    _fail(tensors, "nothing says how latents are selected; give activation (threshold or topk)")


def _said(content: Mapping[str, Any], name: str, kind: type, config: Path | None) -> Any:
    """The value of a key at any depth; two different ones are an error."""
    values = [value for value in _deep(content, name) if isinstance(value, kind)]
    if any(value != values[0] for value in values):
        raise FormatError(f"{config} says {name} {values}; keep the one that is meant")
    return values[0] if values else None


def _deep(content: Mapping[str, Any], name: str) -> Iterator[Any]:
    for key, value in content.items():
        if key == name:
            yield value
        if isinstance(value, Mapping):
            yield from _deep(value, name)


def _known(roles: list[str]) -> str:
    return "; ".join(f"{role}: {', '.join(NAMES[role])}" for role in roles)


def _fail(tensors: Tensors, reason: str) -> NoReturn:
    raise FormatError(f"{tensors.path}: {reason}; it holds {tensors.listing()}")
