"""A tiny MAIRA-2 checkpoint, studies and activations, made afresh for each test session."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hooks.grounding import TOKENS
from hooks.harvest import HarvestConfig, harvest
from hooks.maira2 import Maira2Config, Maira2ForConditionalGeneration, load_model
from hooks.processor import GROUNDING_TASK, IMAGE_TOKEN, PHRASE_TASK, TASK, Maira2Processor
from hooks.studies import read_folder

torch.set_num_threads(2)
SITE = "llm.1.resid_post"
REPORTS = (
    "The heart is enlarged. There is a small left pleural effusion.",
    "Lungs are clear. No pneumothorax.",
    "Heart size is normal. A nodule lies in the right upper zone.",
    "An endotracheal tube is in place. Lungs are clear.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the prompt grammar, with MAIRA-2's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", IMAGE_TOKEN, *TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TASK, GROUNDING_TASK, PHRASE_TASK, *REPORTS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, **text: int) -> Path:
    """A random MAIRA-2 of small sizes, sharded, in the released layout, with its processor."""
    processor = Maira2Processor(tokenizer, image_size=42, patch_size=14)
    torch.manual_seed(5)
    config = Maira2Config(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 42,
            "patch_size": 14,
            "out_features": ["stage2"],
            "reshape_hidden_states": False,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **text,
        },
        image_token_index=processor.image_token_id,
        image_seq_length=9,
    )
    model = Maira2ForConditionalGeneration(config)
    with torch.no_grad():  # larger than the initial 0.02, so that attention is not uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)
    return folder


def write_studies(folder: Path, n: int, films: int = 3) -> Path:
    """``n`` studies over a few films; every third has a lateral, every fourth a prior."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(films):
        pixels = rng.integers(0, 255, (48 + 2 * i, 60), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"film{i}.png")
    lines = []
    for i in range(n):
        study = {
            "id": f"s{i}",
            "frontal": f"film{i % films}.png",
            "indication": f"Chest pain {i}.",
            "report": f"{REPORTS[i % 4]} Number {i}.",
            "patient": f"p{i // 2}",
            "labels": ["Effusion"] if i % 4 == 0 else [],
        }
        if i % 3 == 1:
            study["lateral"] = "film1.png"
        if i % 4 == 1:
            study |= {"prior": "film2.png", "prior_report": "Clear."}
        lines.append(json.dumps(study))
    (folder / "studies.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer)


@pytest.fixture(scope="session")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="session")
def processor(checkpoint):
    return Maira2Processor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def studies_folder(tmp_path_factory):
    return write_studies(tmp_path_factory.mktemp("studies"), 24)


@pytest.fixture(scope="session")
def studies(studies_folder):
    return read_folder(studies_folder)


@pytest.fixture(scope="session")
def activations(tmp_path_factory, model, processor, studies):
    """A finished activation folder: report and clinical tokens after decoder layer 1."""
    out = tmp_path_factory.mktemp("harvest") / "acts"
    return harvest(model, processor, studies, HarvestConfig((SITE,), studies_per_part=7), out)
