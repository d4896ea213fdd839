"""saprmarks/dictionary_learning 0.1: ``ae.pt`` (a state dict) beside ``config.json``.

Its trainers divide activations by a norm factor and multiply biases and threshold by it before
they save, so a final ``ae.pt`` takes raw activations; the factor itself is not kept. Its
``backup`` files are saved before that and carry the factor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hooks.files import FormatError, nearest, write_json
from sae.formats.given import Given
from sae.formats.labels import KEY, layer_of_site, model_of, own_facts, own_record
from sae.formats.tensors import Tensors, field, load_tensors, read_config, whole_numbers
from sae.formats.weights import Weights, assemble
from sae.model import MatryoshkaSAE


def read(weights: Path, config: Path, given: Given) -> MatryoshkaSAE:
    """Read an ``ae.pt`` by the class that its ``config.json`` names.

    Raises
    ------
    FormatError
        If the class is unknown, a tensor is missing, the two files disagree, or the file was
        saved before its biases were scaled and does not say by how much.
    """
    content = read_config(config)
    trainer = field(content, "trainer", dict, config, {})
    name = field(trainer, "dict_class", str, config)
    if name not in READERS:
        known = ", ".join(READERS)
        raise FormatError(
            f"{config} says trainer.dict_class {name!r}{nearest(str(name), READERS)}; "
            f"this library reads {known}; format='inspected' goes by names and shapes alone"
        )
    tensors = load_tensors(weights)
    folded = "biases, by a factor that is not recorded"
    if any(key.startswith("ae.") for key in tensors.values):
        given = replace(given, norm_scale=_backup_scale(tensors, given))
        own = {k[3:]: v for k, v in tensors.values.items() if k.startswith("ae.")}
        tensors = Tensors(weights, own)
    value, activation = READERS[name](tensors)
    stored, said = tensors.whole("k"), field(trainer, "k", int, config)
    if None not in (stored, said) and stored != said:
        raise FormatError(f"{weights} holds k {stored}, {config} says {said}; not from one run")
    facts: dict[str, Any] = {"site": _site(content), "model": model_of(trainer.get("lm_name"))}
    facts |= own_facts(content, config) | {"activation": activation}
    if stored is not None or said is not None:
        facts["k"] = said if stored is None else stored
    if "group_sizes" in tensors.values:
        sizes = tensors.values["group_sizes"].flatten().tolist()
        facts["group_sizes"] = whole_numbers(sizes, "group_sizes", weights)
    unset = activation == "topk" or bool((value.threshold < 0).all())
    if unset and activation == "threshold":
        folded += "; the threshold was never set, so every positive pre-activation is active"
    origin = {
        "format": "dictionary_learning",
        "class": name,
        "file": weights.name,
        "folded": folded,
    }
    return assemble(weights, value, given, facts, origin, threshold_unset=unset)


def _backup_scale(tensors: Tensors, given: Given) -> float:
    factor = tensors.values.get("norm_factor")
    if factor is None and given.norm_scale is None:
        raise FormatError(
            f"{tensors.path} is a backup, saved before its biases were scaled, without a "
            "norm_factor; give norm_scale (1 / factor, or 1 if activations were not normalised)"
        )
    found = None if factor is None else 1 / float(factor)
    if found is not None:
        given.refuse(tensors.path, "norm_scale")
    return found if found is not None else given.norm_scale or 1.0


def _site(config: dict[str, Any]) -> str:
    trainer, buffer = config.get("trainer", {}), config.get("buffer", {})
    name = str(trainer.get("submodule_name"))
    found = re.fullmatch(r"resid_post_layer_(\d+)", name)
    outputs = not isinstance(buffer, dict) or buffer.get("io", "out") == "out"
    return f"llm.{found[1]}.resid_post" if found and outputs else ""


def _matryoshka(tensors: Tensors) -> tuple[Weights, str]:
    enc, b_enc, dec, b_dec, threshold, _ = tensors.take(
        "W_enc", "b_enc", "W_dec", "b_dec", "threshold", "group_sizes"
    )
    return Weights(enc.mT, b_enc, dec, b_dec, threshold), "threshold"


def _linear(activation: str) -> Callable[[Tensors], tuple[Weights, str]]:
    def read_linear(tensors: Tensors) -> tuple[Weights, str]:
        enc, b_enc, dec, b_dec = tensors.take(
            "encoder.weight", "encoder.bias", "decoder.weight", "b_dec"
        )
        unset = torch.tensor(-1.0)
        if activation == "threshold":
            (unset,) = tensors.take("threshold")
        threshold = tensors.values.get("threshold", unset)
        return Weights(enc, b_enc, dec.mT, b_dec, threshold), activation

    return read_linear


def _standard(tensors: Tensors) -> tuple[Weights, str]:
    enc, b_enc, dec, b_dec = tensors.take(
        "encoder.weight", "encoder.bias", "decoder.weight", "bias"
    )
    plain = Weights(enc, b_enc, dec.mT, b_dec, torch.zeros(()))
    return plain.unit_decoder(scale_threshold=False), "threshold"  # as its own loader does


def _jumprelu(tensors: Tensors) -> tuple[Weights, str]:
    enc, b_enc, dec, b_dec, threshold = tensors.take(
        "W_enc", "b_enc", "W_dec", "b_dec", "threshold"
    )
    return Weights(enc.mT, b_enc, dec, b_dec, threshold).with_input_bias(), "threshold"


READERS: dict[str, Callable[[Tensors], tuple[Weights, str]]] = {
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "BatchTopKSAE": _linear("threshold"),
    "AutoEncoderTopK": _linear("topk"),
    "AutoEncoder": _standard,
    "JumpReluAutoEncoder": _jumprelu,
}


def write(sae: MatryoshkaSAE, folder: Path) -> None:
    """Write ``ae.pt`` and ``config.json`` as that library's trainers leave them.

    A scalar threshold becomes ``MatryoshkaBatchTopKSAE``, top-k ``AutoEncoderTopK``, a threshold
    per latent (or no known k) ``JumpReluAutoEncoder``. ``ae.pt`` is the one pickle this library
    writes: a plain state dict, which ``torch.load(weights_only=True)`` reads.
    """
    config, value = sae.config, Weights.of(sae)
    k = torch.tensor(config.k, dtype=torch.int)
    matrices = {"W_enc": value.encoder.mT, "W_dec": value.decoder, "b_dec": value.b_dec}
    if config.activation == "topk":
        name, trainer = "AutoEncoderTopK", "TopKTrainer"
        state = {
            "k": k,
            "threshold": value.threshold,
            "b_dec": value.b_dec,
            "decoder.weight": value.decoder.mT,
            "encoder.weight": value.encoder,
            "encoder.bias": value.b_enc,
        }
        if value.threshold.ndim:
            raise FormatError(
                "dictionary_learning's top-k has one threshold, this dictionary one a latent; "
                "write it with activation='threshold'"
            )
    elif value.threshold.ndim or config.k == 0:
        name, trainer = "JumpReluAutoEncoder", "JumpReluTrainer"
        shifted = value.without_input_bias()
        threshold = value.per_latent_threshold()
        state = matrices | {"b_enc": shifted.b_enc, "threshold": threshold}
    else:
        name, trainer = "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"
        state = matrices | {
            "b_enc": value.b_enc,
            "threshold": value.threshold,
            "k": k,
            "group_sizes": torch.tensor(config.group_sizes),
        }
    layer = layer_of_site(config.site)
    described = {
        "trainer_class": trainer,
        "dict_class": name,
        "activation_dim": config.d_model,
        "dict_size": config.n_latents,
        "k": config.k,
        "group_sizes": list(config.group_sizes),
        "group_fractions": [size / config.n_latents for size in config.group_sizes],
        "layer": layer,
        "lm_name": config.model.get("id", ""),
        "submodule_name": None if layer is None else f"resid_post_layer_{layer}",
    }
    write_json(folder / "config.json", {"trainer": described, KEY: own_record(config)})
    # A clone of its own: torch.save stores the whole storage behind a view.
    torch.save({n: t.contiguous().clone() for n, t in state.items()}, folder / "ae.pt")
