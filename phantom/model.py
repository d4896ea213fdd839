"""The mini model: MAIRA-2's shape, small enough to train on two cores and to ship.

A DINOv2 backbone, the four-layer projector and a Llama, with MAIRA-2's prompt grammar and its
grounding tokens. One word is one token.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hooks.processor import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    MISSING,
    PHRASE_TASK,
    Maira2Processor,
    reporting_pieces,
)
from phantom.draw import FILM_SIZE, PATCH_SIZE
from phantom.language import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hooks.maira2 import Maira2ForConditionalGeneration

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped checkpoint, in the released key layout."""

_TEMPLATE_WORDS = CHAT_TEMPLATE.split("{%")[0] + "USER: ASSISTANT:"
_TEXT_STD = 0.05
_IMAGE_STD = 0.25  # of the projector's output at the start, where films must not drown in words


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token for each word of the reports and of the prompts; decoding joins them by blanks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[.,:]"), behavior="isolated"),
        ]
    )
    pieces = reporting_pieces(
        has_lateral=True,
        has_prior=True,
        indication=None,
        technique=None,
        comparison=None,
        prior_report=None,
        grounded=True,
    )
    texts = [piece.text for piece in pieces if piece.text != IMAGE_TOKEN]
    texts += [_TEMPLATE_WORDS, PHRASE_TASK, "and the current lateral image only", MISSING]
    words = [word for text in texts for word, _ in split.pre_tokenize_str(text)]
    tokens = vocabulary(extra=words)
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = split
    backend.add_special_tokens([token for token in tokens if token.startswith("<")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def processor() -> Maira2Processor:
    """The processor of the mini model."""
    return Maira2Processor(tokenizer(), FILM_SIZE, PATCH_SIZE)


def build(seed: int = 0) -> "Maira2ForConditionalGeneration":
    """An untrained mini model: 2.3 million parameters, float32."""
    from hooks.maira2 import Maira2Config, Maira2ForConditionalGeneration

    words = processor()
    config = Maira2Config(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": FILM_SIZE,
            "patch_size": PATCH_SIZE,
            "out_features": ["stage4"],
            "reshape_hidden_states": False,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(words.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": _TEXT_STD,
            "bos_token_id": words.tokenizer.bos_token_id,
            "eos_token_id": words.tokenizer.eos_token_id,
            "pad_token_id": words.tokenizer.pad_token_id,
        },
        image_token_index=words.image_token_id,
        image_seq_length=words.patches_per_image,
    )
    torch.manual_seed(seed)
    model = Maira2ForConditionalGeneration(config)
    _initialise_projector(model.model.multi_modal_projector.layers)
    return model


def _initialise_projector(layers: nn.Sequential) -> None:
    """Keep the variance of unit inputs through the GELUs, and leave with `_IMAGE_STD`."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linears):
        nn.init.orthogonal_(layer.weight, gain=1.5 if i else 1.0)
        nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(linears[-1].weight, gain=1.5 * _IMAGE_STD)


def load(
    folder: Path = WEIGHTS,
) -> "tuple[Maira2ForConditionalGeneration, Maira2Processor]":
    """The shipped model (or one trained since) in evaluation mode, and its processor."""
    from hooks.maira2 import load_model

    return load_model(folder, dtype=torch.float32), Maira2Processor.from_pretrained(folder)
