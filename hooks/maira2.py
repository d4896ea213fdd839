"""MAIRA-2 (microsoft/maira-2, arXiv 2406.04449) on transformers 5, without remote code.

The model is a LLaVA with two differences: image features are the DINOv2 backbone's *layernormed*
feature map (stock LLaVA takes the hidden state before that norm), and the projector is a
four-layer GELU MLP. Importing this module registers both classes with transformers' Auto classes
and teaches its loader the released key layout (``language_model.model.*`` …), so

    Maira2ForConditionalGeneration.from_pretrained("microsoft/maira-2", dtype="bfloat16")

works with ``generate``, the key-value cache and ``device_map``. ``save_pretrained`` writes the
released layout back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Dinov2Backbone,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    WeightRenaming,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hooks.files import CheckpointError, ConfigError, nearest

RELEASED_VISION = {
    "model_type": "dinov2",
    "hidden_size": 768,
    "image_size": 518,
    "patch_size": 14,
    "out_features": ["stage12"],
    "apply_layernorm": True,
    "reshape_hidden_states": False,
}
RELEASED_TEXT = {
    "model_type": "llama",
    "vocab_size": 32207,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "linear", "factor": 1.5, "rope_theta": 10000.0},
}


@strict
class Maira2Config(LlavaConfig):
    """LLaVA's configuration plus the depth of the projector; defaults are the released model's."""

    model_type = "maira2"

    image_token_index: int = 32204
    image_seq_length: int = 1369
    vision_feature_layer: int = -1
    projector_n_layers: int = 4
    """Linear layers in the projector, GELU between them."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = dict(RELEASED_VISION)
        if self.text_config is None:
            self.text_config = dict(RELEASED_TEXT)
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        if vision.model_type != "dinov2":
            raise ConfigError(
                f"vision_config.model_type is {vision.model_type!r}; MAIRA-2's is 'dinov2'"
            )
        if vision.reshape_hidden_states:
            raise ConfigError(
                "vision_config.reshape_hidden_states is true; set it to false, image features are "
                "token sequences"
            )
        if self.projector_n_layers < 1:
            raise ConfigError(f"projector_n_layers is {self.projector_n_layers}; it must be >= 1")

    @property
    def patch_grid(self) -> int:
        """Patches along one side of the square image."""
        return self.vision_config.image_size // self.vision_config.patch_size  # pyright: ignore


class Maira2Projector(nn.Module):
    """Vision width to text width: Linear, then ``n - 1`` times [activation, Linear]."""

    def __init__(self, config: Maira2Config) -> None:
        super().__init__()
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size  # pyright: ignore
        bias = config.multimodal_projector_bias
        layers: list[nn.Module] = [nn.Linear(vision, text, bias=bias)]
        for _ in range(config.projector_n_layers - 1):
            layers += [ACT2FN[config.projector_hidden_act], nn.Linear(text, text, bias=bias)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image_features: Tensor) -> Tensor:
        """``[n_images, n_patches, d_vision]`` to ``[n_images, n_patches, d_text]``."""
        return self.layers(image_features)


class Maira2Model(LlavaModel):
    """Vision backbone, projector and language model, without the language-model head."""

    config: Maira2Config

    def __init__(self, config: Maira2Config) -> None:
        super(LlavaModel, self).__init__(config)  # LLaVA's own parts are never built
        self.vision_tower = Dinov2Backbone(config.vision_config)  # pyright: ignore
        self.multi_modal_projector = Maira2Projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Project the backbone's layernormed feature map.

        Parameters
        ----------
        pixel_values
            ``[n_images, 3, height, width]``.
        vision_feature_layer
            Index into the backbone's ``feature_maps`` (not its hidden states).

        Returns
        -------
        BaseModelOutputWithPooling
            ``pooler_output`` is a list with one ``[n_patches, d_text]`` tensor per image;
            ``last_hidden_state`` the feature map ``[n_images, n_patches, d_vision]``.
        """
        for ignored in ("return_dict", "image_sizes"):
            kwargs.pop(ignored, None)
        layer = (
            self.config.vision_feature_layer
            if vision_feature_layer is None
            else vision_feature_layer
        )
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        features = self.vision_tower(pixel_values, **kwargs).feature_maps[layer]
        if strategy == "default":
            features = features[:, 1:]
        projected = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=list(projected),  # pyright: ignore[reportArgumentType]
        )


class Maira2ForConditionalGeneration(LlavaForConditionalGeneration):
    """MAIRA-2 with its language-model head; same outputs as transformers' LLaVA."""

    config: Maira2Config
    config_class = Maira2Config

    def __init__(self, config: Maira2Config) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = Maira2Model(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint of the released layout from a folder or the Hub.

        Takes what transformers' ``from_pretrained`` takes (``dtype``, ``device_map``,
        ``revision``, ``token``, ``output_loading_info`` …).

        Raises
        ------
        CheckpointError
            If a shard is missing, or if any weight is missing, unexpected or of another shape:
            a partly initialised model never leaves this function.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir():
            _check_folder(source)
        wants_info = kwargs.pop("output_loading_info", False)
        with checkpoint_errors(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                # Reported below, by name; transformers' own error does not name the weight.
                **{**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True},
            )
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = sorted(map(str, info[problem]))
            if keys:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: {len(keys)} {problem.replace('_', ' ')}, "
                    f"first {keys[0]!r}; the files do not fit config.json, download them again"
                )
        return (model, info) if wants_info else model


@contextmanager
def checkpoint_errors(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises for a folder or repository it cannot read into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{source} cannot be loaded ({reason}); give a checkpoint folder or a Hub id, and log "
            "in with `hf auth login` if its weights are gated"
        ) from error


def _check_folder(folder: Path) -> None:
    """Name the file a checkpoint folder lacks before transformers starts to load it."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give a folder that holds a MAIRA-2 checkpoint"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]!r}; "
            "download the checkpoint again"
        )


def _register() -> None:
    AutoConfig.register("maira2", Maira2Config, exist_ok=True)
    AutoModelForImageTextToText.register(
        Maira2Config, Maira2ForConditionalGeneration, exist_ok=True
    )
    AutoModelForCausalLM.register(Maira2Config, Maira2ForConditionalGeneration, exist_ok=True)
    # The backbone's own renamings (DINOv2 attention keys) are transformers' and apply by class.
    register_checkpoint_conversion_mapping(
        "maira2",
        [
            WeightRenaming(r"^language_model\.lm_head", "lm_head"),
            WeightRenaming(r"^language_model\.model", "model.language_model"),
            WeightRenaming(r"^vision_tower", "model.vision_tower"),
            WeightRenaming(r"^multi_modal_projector", "model.multi_modal_projector"),
        ],
        overwrite=True,
    )


_register()


def check_dtype(dtype: torch.dtype | str) -> None:
    """Refuse what is no dtype, before a model is looked for."""
    known = ("auto", "float32", "bfloat16", "float16", "float64")
    if isinstance(dtype, str) and dtype not in known:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, known)}; choose from {known}")


def load_model(
    source: str | Path, dtype: torch.dtype | str = "auto", device_map: Any = None
) -> Maira2ForConditionalGeneration:
    """A checkpoint in evaluation mode, ready to harvest or steer."""
    check_dtype(dtype)
    model = Maira2ForConditionalGeneration.from_pretrained(
        source, dtype=dtype, device_map=device_map
    )
    return model.eval()
