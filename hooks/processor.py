"""MAIRA-2's prompts and image preprocessing, with the role of every token.

The Hub repository's own processor is remote code. :func:`load_processor` uses it when the caller
trusts it and it loads, and checks that both build the same tokens; otherwise the grammar below,
which is the input format the weights were trained on, stands alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hooks.files import CheckpointError, StudyError
from hooks.grounding import Box, GroundedPhrase, parse_grounded, uncrop_box
from hooks.images import pixel_values, to_grey
from hooks.roles import Piece, Role, Span, Tokens, View, assign_roles

if TYPE_CHECKING:
    from transformers import BatchFeature

log = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
MISSING = "N/A"
TASK = (
    " Provide a structured description of the findings in the radiology study in comparison to"
    " the prior frontal image."
)
GROUNDING_TASK = (
    " Each finding should be described as a self-contained plain-text sentence. If the finding is"
    " groundable, locate the finding in the current frontal chest X-ray image, with bounding boxes"
    " indicating all locations where it can be seen in the current frontal image. Otherwise,"
    " generate just the ungrounded finding without bounding boxes."
)
PHRASE_TASK = (
    " Repeat the following finding as a grounded phrase with bounding boxes indicating all"
    " locations where it can be seen in the given chest X-ray image. Finding: "
)
_OPENING = "You are an expert radiology assistant tasked with interpreting a chest X-ray study. "
CHAT_TEMPLATE = (
    f"{_OPENING}"
    "{% for message in messages %}"
    "{{ ' ' + message['role'].upper() + ': ' }}"
    "{{ ' ' if message['role'] == 'user' else '' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
"""Used where the checkpoint's tokenizer carries no chat template of its own."""


def reporting_pieces(
    *,
    has_lateral: bool,
    has_prior: bool,
    indication: str | None,
    technique: str | None,
    comparison: str | None,
    prior_report: str | None,
    grounded: bool,
) -> list[Piece]:
    """The user turn of a reporting prompt; see the module docstring."""
    if prior_report and not has_prior:
        log.warning(
            "prior_report is not used: the prompt has a place for it only with a prior film"
        )

    def fixed(text: str) -> Piece:
        return Piece(text, Role.BOILERPLATE)

    def clinical(text: str | None) -> Piece:
        return Piece(text or MISSING, Role.CLINICAL if text else Role.BOILERPLATE)

    def film(view: View) -> Piece:
        return Piece(IMAGE_TOKEN, Role.IMAGE, view)

    alone = not has_lateral and not has_prior
    pieces = [fixed("Given the current frontal image" + (" only" if alone else ""))]
    pieces.append(film(View.FRONTAL))
    if has_lateral:
        joiner = " the current lateral image" if has_prior else " and the current lateral image"
        pieces += [fixed(joiner), film(View.LATERAL)]
    if has_prior:
        pieces += [fixed(" and the prior frontal image"), film(View.PRIOR)]
        pieces += [fixed(" PRIOR_REPORT: "), clinical(prior_report)]
    pieces.append(fixed(TASK + (GROUNDING_TASK if grounded else "")))
    for heading, section in (
        (" INDICATION: ", indication),
        (" TECHNIQUE: ", technique),
        (" COMPARISON: ", comparison),
    ):
        pieces += [fixed(heading), clinical(section)]
    return pieces


def phrase_pieces(phrase: str) -> list[Piece]:
    """The user turn of a phrase-grounding prompt."""
    return [
        Piece("Given the current frontal image", Role.BOILERPLATE),
        Piece(IMAGE_TOKEN, Role.IMAGE, View.FRONTAL),
        Piece(PHRASE_TASK, Role.BOILERPLATE),
        Piece(phrase, Role.CLINICAL),
    ]


class Encoding(NamedTuple):
    """A prompt ready for the model: its tokens with roles, and its films in order."""

    tokens: Tokens
    films: list[Image.Image]


class Maira2Processor:
    """Text and films in, model inputs out; same method names as the Hub's processor.

    Parameters
    ----------
    tokenizer
        A fast tokenizer that knows ``<image>`` as one token.
    image_size, patch_size
        In pixels; ``(image_size / patch_size)²`` tokens stand for one film.
    image_mean, image_std
        Normalisation of pixels scaled to 0–1.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 518,
        patch_size: int = 14,
        image_mean: float = 0.5307,
        image_std: float = 0.2583,
    ) -> None:
        if not tokenizer.is_fast:
            raise CheckpointError(
                "the tokenizer is not a fast one, so token roles cannot be traced; add its "
                "tokenizer.json to the checkpoint"
            )
        self.tokenizer = tokenizer
        self.image_size, self.patch_size = image_size, patch_size
        self.image_mean, self.image_std = image_mean, image_std
        self.patches_per_image = (image_size // patch_size) ** 2
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise CheckpointError(
                f"the tokenizer has no {IMAGE_TOKEN} token; add it as a special one"
            )
        self.hub_processor: Any = None

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Maira2Processor:
        """Tokenizer, image size and normalisation of a checkpoint folder or Hub repository."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import cached_file

        from hooks.maira2 import checkpoint_errors

        with checkpoint_errors(source):
            config: Any = AutoConfig.from_pretrained(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source} has no tokenizer that loads ({error.__class__.__name__}); add "
                "tokenizer.json and tokenizer_config.json"
            ) from None
        kwargs: dict[str, float] = {}
        path = cached_file(
            str(source), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        if path:
            preprocessing = json.loads(Path(path).read_text())
            kwargs = {
                key: preprocessing[key][0]
                for key in ("image_mean", "image_std")
                if key in preprocessing
            }
        vision = config.vision_config
        return cls(tokenizer, vision.image_size, vision.patch_size, **kwargs)

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer and ``preprocessor_config.json`` into ``folder``."""
        self.tokenizer.save_pretrained(folder)
        side = {"height": self.image_size, "width": self.image_size}
        settings = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": self.image_size},
            "crop_size": side,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [self.image_mean] * 3,
            "image_std": [self.image_std] * 3,
            "resample": 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))

    def tokenize_reporting(
        self,
        *,
        has_lateral: bool = False,
        has_prior: bool = False,
        indication: str | None = None,
        technique: str | None = None,
        comparison: str | None = None,
        prior_report: str | None = None,
        grounded: bool = False,
        assistant_text: str | None = None,
    ) -> Tokens:
        """The tokens of a reporting prompt, with roles; films are only counted.

        ``assistant_text`` teacher-forces a report; without it the prompt ends where generation
        starts.
        """
        pieces = reporting_pieces(
            has_lateral=has_lateral,
            has_prior=has_prior,
            indication=indication,
            technique=technique,
            comparison=comparison,
            prior_report=prior_report,
            grounded=grounded,
        )
        return self._tokenize(pieces, assistant_text)

    def encode_reporting(
        self,
        frontal: Image.Image,
        lateral: Image.Image | None = None,
        prior: Image.Image | None = None,
        indication: str | None = None,
        technique: str | None = None,
        comparison: str | None = None,
        prior_report: str | None = None,
        grounded: bool = False,
        assistant_text: str | None = None,
    ) -> Encoding:
        """Tokens with roles, and films, of a reporting prompt; see :meth:`tokenize_reporting`."""
        tokens = self.tokenize_reporting(
            has_lateral=lateral is not None,
            has_prior=prior is not None,
            indication=indication,
            technique=technique,
            comparison=comparison,
            prior_report=prior_report,
            grounded=grounded,
            assistant_text=assistant_text,
        )
        films = [to_grey(film) for film in (frontal, lateral, prior) if film is not None]
        if self.hub_processor is not None:
            theirs = self.hub_processor.format_and_preprocess_reporting_input(
                current_frontal=frontal,
                current_lateral=lateral,
                prior_frontal=prior,
                indication=indication,
                technique=technique,
                comparison=comparison,
                prior_report=prior_report,
                get_grounding=grounded,
                assistant_text=assistant_text,
                return_tensors="pt",
            )
            self._check_same_tokens(tokens, theirs["input_ids"][0])
        return Encoding(tokens, films)

    def encode_phrase(
        self, frontal: Image.Image, phrase: str, assistant_text: str | None = None
    ) -> Encoding:
        """Tokens with roles, and the film, of a phrase-grounding prompt."""
        tokens = self._tokenize(phrase_pieces(phrase), assistant_text)
        return Encoding(tokens, [to_grey(frontal)])

    def format_and_preprocess_reporting_input(
        self,
        current_frontal: Image.Image,
        current_lateral: Image.Image | None = None,
        prior_frontal: Image.Image | None = None,
        indication: str | None = None,
        technique: str | None = None,
        comparison: str | None = None,
        prior_report: str | None = None,
        get_grounding: bool = False,
        assistant_text: str | None = None,
    ) -> BatchFeature:
        """``input_ids``, ``attention_mask`` ``[1, n]``; ``pixel_values`` ``[films, 3, s, s]``."""
        return self.model_inputs(
            self.encode_reporting(
                current_frontal,
                current_lateral,
                prior_frontal,
                indication,
                technique,
                comparison,
                prior_report,
                get_grounding,
                assistant_text,
            )
        )

    def format_and_preprocess_phrase_grounding_input(
        self, frontal_image: Image.Image, phrase: str, assistant_text: str | None = None
    ) -> BatchFeature:
        """As :meth:`format_and_preprocess_reporting_input`, for one phrase."""
        return self.model_inputs(self.encode_phrase(frontal_image, phrase, assistant_text))

    @staticmethod
    def convert_output_to_plaintext_or_grounded_sequence(text: str) -> str | list[GroundedPhrase]:
        """See :func:`hooks.grounding.parse_grounded`."""
        return parse_grounded(text)

    @staticmethod
    def adjust_box_for_original_image_size(box: Box, width: int, height: int) -> Box:
        """See :func:`hooks.grounding.uncrop_box`."""
        return uncrop_box(box, width, height)

    def pixel_values(self, films: Sequence[Image.Image]) -> Tensor:
        """``[n_films, 3, image_size, image_size]`` float32."""
        if self.hub_processor is not None:
            images = self.hub_processor.image_processor(images=list(films), return_tensors="pt")
            return images["pixel_values"]
        planes = [
            pixel_values(film, self.image_size, self.image_mean, self.image_std) for film in films
        ]
        return torch.stack(planes)

    def model_inputs(self, encoding: Encoding) -> BatchFeature:
        """Tensors of one encoding, as ``model(**inputs)`` and ``model.generate`` take them."""
        from transformers import BatchFeature

        ids = torch.from_numpy(encoding.tokens.ids)[None]
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": self.pixel_values(encoding.films),
            }
        )

    def _tokenize(self, pieces: list[Piece], assistant_text: str | None) -> Tokens:
        text, spans = self._render(pieces, assistant_text)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        return assign_roles(
            encoded["input_ids"], encoded["offset_mapping"], text, spans, self.patches_per_image
        )

    def _render(self, pieces: list[Piece], assistant_text: str | None) -> tuple[str, list[Span]]:
        """The prompt, with one placeholder a film, and where each piece lies in it."""
        turns: list[list[Piece]] = [pieces]
        if assistant_text is not None:
            turns.append([Piece(assistant_text, Role.REPORT)])
        for piece in (piece for turn in turns for piece in turn):
            if piece.role is not Role.IMAGE and IMAGE_TOKEN in piece.text:
                raise StudyError(f"text holds {IMAGE_TOKEN!r}, which stands for a film; remove it")
        template = self.tokenizer.chat_template or CHAT_TEMPLATE
        if template == CHAT_TEMPLATE:
            rendered = render_own(turns, self.tokenizer.eos_token)
        else:
            messages = [
                {"role": role, "content": _content(turn)}
                for role, turn in zip(("user", "assistant"), turns, strict=False)
            ]
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=assistant_text is None,
                tokenize=False,
            )
        if self.tokenizer.bos_token and rendered.startswith(self.tokenizer.bos_token):
            rendered = rendered.removeprefix(self.tokenizer.bos_token)  # the tokenizer adds it

        spans, cursor = [], 0
        for piece in (piece for turn in turns for piece in turn):
            found = rendered.find(piece.text, cursor)
            if found < 0:
                raise StudyError(
                    f"the chat template changes the prompt: {piece.text[:40]!r} is not in what it "
                    "rendered; use a template that keeps text as it is"
                )
            cursor = found + len(piece.text)
            spans.append(Span(found, cursor, piece.role, piece.view))
        return rendered, spans

    def _check_same_tokens(self, tokens: Tokens, theirs: Tensor) -> None:
        mine = torch.from_numpy(tokens.ids)
        if mine.shape == theirs.shape and bool((mine == theirs).all()):
            return
        n = min(len(mine), len(theirs))
        differs = (mine[:n] != theirs[:n]).nonzero()
        at = int(differs[0]) if len(differs) else n
        raise CheckpointError(
            f"this library and the checkpoint's own processor build different prompts from token "
            f"{at} on ({len(mine)} and {len(theirs)} tokens); load without trust_remote_code, or "
            "report the checkpoint's revision"
        )


def render_own(turns: Sequence[Sequence[Piece]], eos_token: str | None) -> str:
    """What :data:`CHAT_TEMPLATE` makes of a user's turn, and perhaps the assistant's after it.

    The template engine takes ten times as long.
    """
    said = ["".join(piece.text for piece in turn) for turn in turns]
    user = f"{_OPENING} USER:  {said[0]} "
    return user + (" ASSISTANT: " + (f"{said[1]}{eos_token or ''}" if len(said) > 1 else ""))


def _content(turn: list[Piece]) -> list[dict[str, Any]]:
    """Chat content parts; the Hub's template reads ``index``, ``text`` and ``type``."""
    parts: list[dict[str, Any]] = []
    films = 0
    for piece in turn:
        if piece.role is Role.IMAGE:
            parts.append({"index": films, "text": None, "type": "image"})
            films += 1
        else:
            parts.append({"index": None, "text": piece.text, "type": "text"})
    return parts


def load_processor(source: str | Path, trust_remote_code: bool = False) -> Maira2Processor:
    """The processor of a checkpoint, checked against the Hub's own where that runs.

    Parameters
    ----------
    trust_remote_code
        Also load the repository's own (remote-code) processor; every prompt is then compared
        with it, token by token. If it does not load, that is logged once.
    """
    from transformers import AutoProcessor

    processor = Maira2Processor.from_pretrained(source)
    if trust_remote_code:
        try:
            own: Any = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
            log.warning("the checkpoint's own processor does not load (%s); using ours", error)
        else:
            if hasattr(own, "format_and_preprocess_reporting_input"):
                processor.hub_processor = own
            else:
                log.warning("the checkpoint's own processor has no reporting input; using ours")
    return processor
