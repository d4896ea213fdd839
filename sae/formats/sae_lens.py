"""SAELens 6: ``sae_weights.safetensors`` beside ``cfg.json``; configurations before 6.0 as well.

SAELens folds the scale of its inputs into the matrices before it saves (``normalize_activations``
is then ``none``). Where it has not, ``norm_scale`` is needed: the factor is not in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hooks.files import FormatError, nearest, write_json
from sae.formats.given import Given
from sae.formats.labels import KEY, hook_of_site, model_of, own_facts, own_record, site_of_hook
from sae.formats.tensors import Tensors, field, load_tensors, read_config, whole_numbers
from sae.formats.weights import Weights, assemble
from sae.model import MatryoshkaSAE

ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu")
WRITTEN_FOR = "6.54.12"


def read(weights: Path, config: Path, given: Given) -> MatryoshkaSAE:
    """Read a folder that ``save_model`` or ``save_inference_model`` wrote.

    Raises
    ------
    FormatError
        If the architecture is another one, activations were normalised token by token, or a
        scale is needed and not given.
    """
    content = read_config(config)
    name = _architecture(content, config)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(
            f"{config} says architecture {name!r}{nearest(name, ARCHITECTURES)}; "
            f"this library reads {known}"
        )
    given = _normalisation(content, config, given)
    if field(content, "reshape_activations", str, config, "none") != "none":
        raise FormatError(f"{config} reshapes attention heads; no site of this library does")
    tensors = load_tensors(weights)
    if any(bool((tensors.values[n] != 1).any()) for n in _FACTORS if n in tensors.values):
        raise FormatError(f"{weights} holds a fine-tuned scaling factor; not readable")
    value, activation, unset = _weights(tensors, name)
    if not field(content, "apply_b_dec_to_input", bool, config, True):
        value = value.with_input_bias()
    rescale = field(content, "rescale_acts_by_decoder_norm", bool, config, False)

    def fold(value: Weights, scale: float) -> Weights:
        # The threshold of rescaled activations contains the decoder's norm, as SAELens has it.
        threshold = value.threshold / scale if rescale else value.threshold
        return replace(value.matrices_folded(scale), threshold=threshold)

    if given.norm_scale is not None:
        value = fold(value, given.norm_scale)
    if rescale:
        value = value.unit_decoder(scale_threshold=False)
    facts = _facts(content, config, name) | {"activation": activation}
    origin = {
        "format": "sae_lens",
        "class": name,
        "file": weights.name,
        "folded": "matrices" if given.norm_scale is not None else "not needed, or by SAELens",
    }
    if given.norm_scale is not None:
        facts |= {"norm_scale": given.norm_scale, "origin": origin}
    rest = replace(given, norm_scale=None)
    return assemble(weights, value, rest, facts, origin, threshold_unset=unset)


_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def _architecture(content: Mapping[str, Any], config: Path) -> str:
    function = content.get("activation_fn", content.get("activation_fn_str", "relu"))
    if function == "topk":  # before 6.0, top-k was an activation function of "standard"
        return "topk"
    if function != "relu":
        raise FormatError(f"{config} says activation function {function!r}; only relu is readable")
    return str(field(content, "architecture", str, config, "standard"))


def _normalisation(content: Mapping[str, Any], config: Path, given: Given) -> Given:
    said = content.get("normalize_activations")
    if said in (None, False, "none"):
        return given
    if said not in (True, "expected_average_only_in"):
        raise FormatError(
            f"{config} says normalize_activations {said!r}, which differs from token to token and "
            "cannot be folded into weights; train without it, or with expected_average_only_in"
        )
    if given.norm_scale is None:
        raise FormatError(
            f"{config} says normalize_activations {said!r} but not the scale; give norm_scale "
            "(sqrt(d_in) / mean norm of the activations it was trained on)"
        )
    return given


def _weights(tensors: Tensors, name: str) -> tuple[Weights, str, bool]:
    """Weights, activation, and whether the file lacks a threshold."""
    enc, b_enc, dec, b_dec = tensors.take("W_enc", "b_enc", "W_dec", "b_dec")
    if name in ("batchtopk", "matryoshka_batchtopk"):
        (threshold,) = tensors.take("topk_threshold")
    elif name == "jumprelu":
        (threshold,) = tensors.take("threshold")
    else:
        threshold = torch.zeros(())
    activation = "topk" if name == "topk" else "threshold"
    value = Weights(enc.mT, b_enc, dec, b_dec, threshold.to(dec.dtype))
    return value, activation, name == "topk"


def _facts(content: Mapping[str, Any], config: Path, name: str) -> dict[str, Any]:
    metadata = field(content, "metadata", dict, config, dict(content))
    training = field(metadata, "training_architecture_details", dict, config, {})
    arguments = field(content, "activation_fn_kwargs", dict, config, {})
    facts: dict[str, Any] = {
        "site": site_of_hook(metadata.get("hook_name", metadata.get("hook_point"))),
        "model": model_of(metadata.get("model_name")),
    }
    for source in (training, arguments, content):
        if name != "standard" and (k := source.get("k")) is not None:
            if not isinstance(k, (int, float)):
                raise FormatError(f"{config} says k {k!r}, expected a number; correct it")
            facts["k"] = round(k)  # BatchTopK allows fractions there
    widths = training.get("matryoshka_widths") or content.get("matryoshka_widths")
    if widths:
        widths = whole_numbers(widths, "matryoshka_widths", config)
        facts["group_sizes"] = [after - before for before, after in pairwise([0, *widths])]
    return facts | own_facts(metadata, config)


def write(sae: MatryoshkaSAE, folder: Path) -> None:
    """Write ``sae_weights.safetensors`` and ``cfg.json``.

    A threshold becomes architecture ``jumprelu``, given to every latent; top-k becomes ``topk``.
    Prefixes, policy and provenance travel in the metadata.
    """
    config, value = sae.config, Weights.of(sae)
    described = {
        "d_in": config.d_model,
        "d_sae": config.n_latents,
        "dtype": str(value.decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": WRITTEN_FOR,
            "model_name": config.model.get("id", ""),
            "hook_name": hook_of_site(config.site),
            KEY: own_record(config),
        },
    }
    tensors = {
        "W_enc": value.encoder.mT,
        "b_enc": value.b_enc,
        "W_dec": value.decoder,
        "b_dec": value.b_dec,
    }
    if config.activation == "topk":
        described |= {
            "architecture": "topk",
            "k": config.k,
            "rescale_acts_by_decoder_norm": False,
        }
    else:
        described["architecture"] = "jumprelu"
        tensors["threshold"] = value.per_latent_threshold()
    write_json(folder / "cfg.json", described)
    named = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(named, folder / "sae_weights.safetensors")
