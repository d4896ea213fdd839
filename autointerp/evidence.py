"""Evidence about a latent that an explainer, a page or a notebook can show.

Pure functions: examples of a features folder and study records in, strings, Pillow images and
plain dataclasses out. Films are read from the paths that the study records give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from autointerp.features import Example
from hooks.files import ConfigError, StudyError
from hooks.grounding import Box
from hooks.images import Crop, read_image
from hooks.studies import Study

OPACITY = 0.65
"""Of a patch at the top of the scale; a patch at zero is left as it is."""
BOX_COLOUR = (255, 255, 255)
PANELS = ("frontal", "lateral", "prior")
# Viridis (Smith and van der Walt 2015): equally spaced to the eye, and to colour-blind eyes.
_SCALE = np.array(
    [
        *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
        *((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
    ],
    dtype=np.float64,
)


def marked_text(example: Example, tokenizer: Any, least: float = 0.3) -> str:
    """The example's text, each run of strong tokens as ``<<words>>``.

    A token is strong from ``least`` of the example's peak on; a silent example has none.
    """
    out, inside = [], False
    pieces = token_texts(example, tokenizer)
    for piece, value in zip(pieces, example.values, strict=True):
        strong = value > 0 and value >= least * example.peak
        if strong and not inside:
            lead = len(piece) - len(piece.lstrip())
            piece = f"{piece[:lead]}<<{piece[lead:]}"
        if inside and not strong:
            out.append(">>")
        inside = strong
        out.append(piece)
    return ("".join(out) + (">>" if inside else "")).strip()


def token_texts(example: Example, tokenizer: Any) -> list[str]:
    """The text that each token adds; joined they are the whole text."""
    if example.view is not None:
        raise ConfigError(f"a {example.modality} example is a film; ask for its overlay instead")
    return added_texts(example.token_ids, tokenizer)


def added_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the decoded text; joined they are the whole text."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        texts.append(whole[len(before) :])
        before = whole
    return texts


def patch_map(example: Example) -> Float[np.ndarray, "rows columns"]:
    """The activations of a film's patches; NaN where the harvest kept none."""
    if example.patch_shape is None:
        raise ConfigError(f"a {example.modality} example has no patches; ask for its text instead")
    return np.array(example.values, dtype=np.float64).reshape(example.patch_shape)


def on_film(
    patches: Float[np.ndarray, "rows columns"], width: int, height: int, size: int
) -> Float[np.ndarray, "height width"]:
    """Each pixel of the original film with the value of its patch; NaN where the model saw none."""
    crop = Crop.of(width, height, size)
    rows, columns = patches.shape
    y = np.floor((np.arange(height) + 0.5 - crop.top) / crop.side * rows).astype(int)
    x = np.floor((np.arange(width) + 0.5 - crop.left) / crop.side * columns).astype(int)
    out = patches[np.ix_(y.clip(0, rows - 1), x.clip(0, columns - 1))]
    out[(y < 0) | (y >= rows)] = np.nan
    out[:, (x < 0) | (x >= columns)] = np.nan
    return out


def overlay(
    film: Image.Image, values: Float[np.ndarray, "height width"], maximum: float
) -> Image.Image:
    """A film under its values: colour and opacity grow with magnitude, ``maximum`` at the top.

    Pixels that are zero or NaN keep the film's grey, so silence cannot be taken for a finding.
    """
    if values.shape != (film.height, film.width):
        raise ConfigError(
            f"values are {values.shape}, the film is {(film.height, film.width)}; map the patches "
            "with on_film first"
        )
    share = np.nan_to_num(values / maximum if maximum > 0 else values * 0).clip(0, 1)
    place = share * (len(_SCALE) - 1)
    low = np.floor(place).astype(int).clip(max=len(_SCALE) - 2)
    colour = _SCALE[low] + (_SCALE[low + 1] - _SCALE[low]) * (place - low)[..., None]
    weight = (OPACITY * share)[..., None]
    grey = np.asarray(film.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray((grey * (1 - weight) + colour * weight).round().astype(np.uint8))


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy with boxes, given as fractions of the whole film, outlined."""
    out = image.convert("RGB")
    pen = ImageDraw.Draw(out)
    line = max(1, round(min(out.size) / 200))
    for box in boxes:
        wide, high = out.width - 1, out.height - 1
        corners = (box.x_min * wide, box.y_min * high, box.x_max * wide, box.y_max * high)
        pen.rectangle([round(c) for c in corners], outline=BOX_COLOUR, width=line)
    return out


@dataclass(frozen=True)
class FilmEvidence:
    """One film of a study with a latent's activations on it."""

    study: str
    view: str
    film: Image.Image
    """As it was read, in grey, at its original size."""
    heat: Image.Image
    """The same film under the activations, with known boxes."""
    values: np.ndarray
    """Activation of each of the film's pixels, NaN outside what the model saw."""
    peak: float
    boxes: tuple[Box, ...]


def film_evidence(
    example: Example, study: Study, size: int, maximum: float | None = None
) -> FilmEvidence:
    """A film example over its original film.

    Parameters
    ----------
    size
        Side of the square the processor crops to, such as 518.
    maximum
        Top of the colour scale: the latent's maximum, so that films can be compared; by default
        this example's own peak.

    Raises
    ------
    StudyError
        If the study is another one, or has no such film.
    """
    path: Path | None = getattr(study, example.view) if example.view else None
    if study.id != example.study or path is None:
        raise StudyError(
            f"study {study.id} has no {example.modality} film of {example.study}; give the record "
            "of the example's own study"
        )
    film = read_image(path)
    values = on_film(patch_map(example), film.width, film.height, size)
    boxes = known_boxes(study) if example.view == "frontal" else ()
    heat = overlay(film, values, example.peak if maximum is None else maximum)
    heat = draw_boxes(heat, boxes)
    return FilmEvidence(study.id, example.view or "", film, heat, values, example.peak, boxes)


def known_boxes(study: Study) -> tuple[Box, ...]:
    """Boxes that readers drew on the frontal film."""
    return tuple(box for sentence in study.sentences for box in sentence.boxes or ())


def side_by_side(films: Sequence[FilmEvidence], height: int = 384) -> Image.Image:
    """Frontal, lateral and prior of one study in a row, each plain above its overlay."""
    if not films:
        raise ConfigError("there are no films to lay out; give at least one")
    ordered = sorted(films, key=lambda one: PANELS.index(one.view))
    pairs = [(one.film.convert("RGB"), one.heat) for one in ordered]
    widths = [max(1, round(height * film.width / film.height)) for film, _ in pairs]
    out = Image.new("RGB", (sum(widths), 2 * height))
    x = 0
    for pair, width in zip(pairs, widths, strict=True):
        for row, image in enumerate(pair):
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            out.paste(resized, (x, row * height))
        x += width
    return out


@dataclass(frozen=True)
class StudyEvidence:
    """What a latent does in one study, and what its report says."""

    study: str
    patient: str
    peak: float
    """Largest activation among the study's examples."""
    modalities: tuple[str, ...]
    """Where it fires, strongest first."""
    report: str | None
    labels: tuple[str, ...]


def by_study(examples: Iterable[Example], studies: Mapping[str, Study]) -> list[StudyEvidence]:
    """Examples gathered by study, maximum over tokens and films, strongest first.

    A study without a record has no report and no labels.
    """
    own: dict[str, dict[str, float]] = {}
    patients: dict[str, str] = {}
    for example in examples:
        peaks = own.setdefault(example.study, {})
        peaks[example.modality] = max(example.peak, peaks.get(example.modality, 0.0))
        patients[example.study] = example.patient
    found = []
    for name, peaks in own.items():
        record = studies.get(name)
        fired = sorted((m for m in peaks if peaks[m] > 0), key=lambda m: -peaks[m])
        found.append(
            StudyEvidence(
                name,
                patients[name],
                max(peaks.values()),
                tuple(fired),
                record.report if record else None,
                record.labels if record else (),
            )
        )
    return sorted(found, key=lambda one: (-one.peak, one.study))


@dataclass(frozen=True)
class OutputTokens:
    """Tokens that writing a latent's direction makes likelier, and less likely."""

    promoted: tuple[tuple[str, float], ...]
    """Token and change of its logit, largest first."""
    suppressed: tuple[tuple[str, float], ...]


@torch.no_grad()
def output_tokens(
    direction: Float[Tensor, " d"],
    norm_weight: Float[Tensor, " d"],
    lm_head: Float[Tensor, "vocabulary d"],
    decode: Callable[[list[int]], str],
    n: int = 10,
) -> OutputTokens:
    """The logit lens of a decoder direction: ``lm_head @ (norm_weight · direction)``.

    The final RMS norm's weight is applied, its division by the length of the stream is not: that
    scales all logits alike. Their mean is taken off, since a softmax does not see it. Layers
    between the site and the head are skipped, so for early sites this is a hint, not an effect.
    For sites of a vision tower there is no such path: do not call it there.
    """
    logits = lm_head.float() @ (norm_weight.float() * direction.float())
    logits = logits - logits.mean()
    n = min(n, len(logits))

    def named(sign: int) -> tuple[tuple[str, float], ...]:
        best = (sign * logits).topk(n)
        return tuple((decode([i]), float(logits[i])) for i in best.indices.tolist())

    return OutputTokens(named(1), named(-1))


def model_output_tokens(
    model: Any, site: str, direction: Float[Tensor, " d"], tokenizer: Any, n: int = 10
) -> OutputTokens | None:
    """:func:`output_tokens` of a model's own head; ``None`` for a site outside its text tower."""
    if not site.startswith("llm."):
        return None
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    head = model.get_output_embeddings().weight
    return output_tokens(
        direction.to(head.device), text.norm.weight, head, lambda ids: tokenizer.decode(ids), n
    )
