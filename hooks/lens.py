"""MAIRA-2 in TransformerLens, and the recipe for nnsight, which needs no adapter.

TransformerLens (``TransformerBridge``) is told the names of a model's parts by an architecture
adapter. Its LLaVA adapter looks for a CLIP tower; :class:`Maira2Adapter` describes the DINOv2 one.
:func:`boot` makes a bridge whose hooks give what :mod:`hooks.sites` gives:

======================================  ==============================================
``llm.{i}.{place}``                     ``blocks.{i}.hook_{place}``
``vision.{i}.{place}``                  ``vision_encoder.encoder_layers.{i}.hook_{place}``
``projector``                           ``vision_projector.hook_out``
======================================  ==============================================

::

    bridge = boot("maira-2")
    logits, cache = bridge.run_with_cache(input_ids, pixel_values=pixel_values)
    cache[lens_name("llm.15.resid_post")]

nnsight 0.8 wraps the model as it is. Read a residual, add the direction of an SAE latent, and
generate under that edit::

    from nnsight import NNsight

    nn = NNsight(model)                                  # the model of load_model
    layer = nn.model.language_model.layers[15]
    with nn.trace(**inputs):
        residual = layer.output.save()                   # llm.15.resid_post

    direction = strength * sae.W_dec[latent]
    with nn.trace(**inputs):
        layer.output = layer.output + direction
        logits = nn.output.logits.save()

    with nn.edit() as (tracer, edited):                  # kept, and run at every step
        layer = edited.model.language_model.layers[15]
        for _ in tracer.iter[:]:                         # the prompt, then each token
            layer.output = layer.output + direction
    with edited.trace(fn=model.generate, **inputs, max_new_tokens=300, do_sample=False) as tracer:
        ids = tracer.result.save()                       # nnsight warns as the open loop ends

``tests/hooks/test_lens.py`` and ``tests/hooks/test_nnsight.py`` compare both with our hooks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
    VisionProjectionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.vision_encoder import (
    vision_attention_config,
)
from transformer_lens.model_bridge.sources import build_bridge_from_module

from hooks.files import SiteError
from hooks.maira2 import Maira2ForConditionalGeneration
from hooks.processor import load_processor

ARCHITECTURE = "Maira2ForConditionalGeneration"
LAYERS = {"llm": "blocks", "vision": "vision_encoder.encoder_layers"}


def lens_name(site: str) -> str:
    """The TransformerLens hook at one of our sites.

    >>> lens_name("llm.15.resid_post"), lens_name("vision.3.mlp_out"), lens_name("projector")
    ('blocks.15.hook_resid_post', 'vision_encoder.encoder_layers.3.hook_mlp_out', \
'vision_projector.hook_out')
    """
    if site == "projector":
        return "vision_projector.hook_out"
    tower, _, rest = site.partition(".")
    layer, _, place = rest.partition(".")
    if tower not in LAYERS or not layer.isdigit() or not place:
        raise SiteError(f"{site!r} is no site; write one like llm.15.resid_post")
    return f"{LAYERS[tower]}.{layer}.hook_{place}"


class _Inside(GeneralizedComponent):
    """A part whose output hook runs inside it, before transformers' own hooks on it.

    transformers collects the hidden states that a backbone's feature maps are made of in hooks of
    its own; a change made outside the layer would not reach them.
    """

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        original_component.register_forward_hook(self._hooked, prepend=True)

    def _hooked(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.hook_out(output)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.original_component is not None
        return self.original_component(self.hook_in(hidden_states), *args, **kwargs)


class Dinov2LayerBridge(_Inside):
    """A DINOv2 layer, with the hooks of a pre-norm block; what is added is after LayerScale."""

    is_list_item = True
    hook_aliases = {  # noqa: RUF012
        "hook_resid_pre": "hook_in",
        "hook_attn_out": "attn_scale.hook_out",
        "hook_resid_mid": "ln2.hook_in",
        "hook_mlp_out": "mlp_scale.hook_out",
        "hook_resid_post": "hook_out",
    }

    def __init__(self, name: str, config: Any) -> None:
        def norm(part: str) -> NormalizationBridge:
            # Native: the tower's own epsilon, not the language model's.
            return NormalizationBridge(part, config=config, use_native_layernorm_autograd=True)

        projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        super().__init__(
            name,
            config,
            submodules={
                "ln1": norm("norm1"),
                "attn": AttentionBridge(
                    "attention",
                    config=vision_attention_config(config),
                    submodules={k: LinearBridge(part) for k, part in projections.items()},
                ),
                "attn_scale": GeneralizedComponent("layer_scale1"),
                "ln2": norm("norm2"),
                "mlp": MLPBridge(
                    "mlp",
                    config=config,
                    submodules={"in": LinearBridge("fc1"), "out": LinearBridge("fc2")},
                ),
                "mlp_scale": GeneralizedComponent("layer_scale2"),
            },
        )


class Dinov2Bridge(GeneralizedComponent):
    """A DINOv2 backbone: embeddings, layers, and the norm over its feature maps."""

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(
            name,
            config,
            submodules={
                "embeddings": GeneralizedComponent("embeddings"),
                "encoder_layers": Dinov2LayerBridge("encoder.layer", config),
                "layernorm": NormalizationBridge(
                    "layernorm", config=config, use_native_layernorm_autograd=True
                ),
            },
        )

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        assert self.original_component is not None
        return self.original_component(self.hook_in(pixel_values), **kwargs)


class Maira2Adapter(ArchitectureAdapter):
    """Where TransformerLens finds the parts of a MAIRA-2."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        # Never true while TransformerLens boots: it would load a processor for multimodal models
        # and, where that fails, install torchvision with pip. :func:`wrap` sets it afterwards.
        self.cfg.is_multimodal = False
        self.cfg.attn_implementation = "eager"
        self._set_rms_rotary_defaults()
        self._extract_vision_dims(cfg)
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}

        def norm(part: str) -> RMSNormalizationBridge:
            return RMSNormalizationBridge(part, config=self.cfg)

        text = "model.language_model"
        self.component_mapping = {
            "vision_encoder": Dinov2Bridge("model.vision_tower", self.cfg),
            "vision_projector": VisionProjectionBridge("model.multi_modal_projector"),
            "embed": EmbeddingBridge(f"{text}.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(f"{text}.rotary_emb"),
            "blocks": BlockBridge(
                f"{text}.layers",
                submodules={
                    "ln1": norm("input_layernorm"),
                    "attn": self._build_attention_bridge(),
                    "ln2": norm("post_attention_layernorm"),
                    "mlp": self._gated_mlp(),
                },
            ),
            "ln_final": norm(f"{text}.norm"),
            "unembed": UnembeddingBridge("lm_head", config=self.cfg),
        }


def register() -> None:
    """Make :class:`Maira2Adapter` known to TransformerLens in this process."""
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, Maira2Adapter)
    # `boot_transformers` of TransformerLens 4.3 looks here, and at no registered adapter.
    architecture_adapter_factory.SUPPORTED_ARCHITECTURES[ARCHITECTURE] = Maira2Adapter


def wrap(model: Any, tokenizer: Any = None) -> TransformerBridge:
    """A loaded model as a ``TransformerBridge`` that takes ``pixel_values``.

    For MAIRA-2 and every architecture that TransformerLens has an adapter for. The model is changed
    in place: bridge components take the place of its modules, so sites of :mod:`hooks.sites` are no
    longer found in it. No subprocess is started and nothing is installed.

    Parameters
    ----------
    model
        Loaded with ``attn_implementation="eager"``, as TransformerLens wants it.
    """
    vision = getattr(model.config, "vision_config", None) is not None
    bridge = build_bridge_from_module(
        model.eval(), type(model).__name__, hf_config=model.config, tokenizer=tokenizer
    )
    if vision:
        bridge.cfg.is_multimodal = True
    return bridge


def boot(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TransformerBridge:
    """A MAIRA-2 checkpoint as a ``TransformerBridge``, see :func:`wrap`.

    Raises
    ------
    CheckpointError
        As :func:`hooks.maira2.load_model` does.
    """
    model = Maira2ForConditionalGeneration.from_pretrained(
        source, dtype=dtype, attn_implementation="eager"
    )
    return wrap(model.to(device), load_processor(source).tokenizer)


register()
