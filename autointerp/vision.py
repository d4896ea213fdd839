"""What a vision language model is asked about an image latent: films, plain and under activations.

Films are patient data, and no redaction cleans their pixels: a client sends them to this machine
only, or to the host that its configuration names for images
(:attr:`autointerp.client.EndpointConfig.allow_remote_images`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from autointerp.client import Request
from autointerp.evidence import film_evidence, side_by_side
from autointerp.explainers import FIRES, MAX_TOKENS, SILENT_HEAD, Explanation, shown
from autointerp.explaining import film_of
from autointerp.features import IMAGES, SILENT, Example, Features
from hooks.files import ConfigError
from hooks.studies import Study

VISION = (
    "Below are chest films. Each picture shows a film above, and the same film below, coloured "
    "where one feature of a neural network is on, from violet (weak) to yellow (strong). The "
    "feature is strongly on in the films of the first group, and off or barely on in those of the "
    "second. Name the one concept, a finding, device, structure or artefact, that the coloured "
    "places of the first group share and the second group has not, in at most eight words. If "
    "there is none, the label is null. Answer with a JSON object with label, confidence from 0 to "
    "1, and evidence."
)


@dataclass(frozen=True)
class VisionConfig:
    """What is shown."""

    n_on: int = 6
    """Films on which the latent is strongly on, strongest first, one a study."""
    n_off: int = 4
    """Films on which it is off or barely on, one a study."""
    height: int = 384
    """Pixels of a film; the picture is twice as high."""

    def __post_init__(self) -> None:
        if self.n_on < 1 or self.n_off < 0 or self.height < 1:
            raise ConfigError(
                f"n_on {self.n_on}, n_off {self.n_off}, height {self.height}: show at least one "
                "film of one pixel, and no negative number of silent ones"
            )


def vision_request(
    features: Features,
    latent: int,
    studies: Mapping[str, Study],
    size: int,
    modality: str | None = None,
    config: VisionConfig | None = None,
) -> Request | None:
    """Films with and without a latent; ``None`` where it is dense, or there is none to show.

    Parameters
    ----------
    size
        Side of the square that the model's processor crops to, such as 518.
    modality
        The film; by default the one on which the latent fires most often.

    Notes
    -----
    A study without a record is left out. All films of a latent share one colour scale, which ends
    at its strongest film.
    """
    config = config or VisionConfig()
    film = modality or film_of(features, latent)
    if film is None or film not in IMAGES or features.dense(latent):
        return None
    on, off = shown(features, latent, film)
    on = _one_a_study(sorted(on, key=lambda one: -one.peak), studies, config.n_on)
    silent_first = sorted(off, key=lambda one: (one.kind not in SILENT, one.peak))
    used = {one.study for one in on}
    off = [one for one in silent_first if one.study not in used]
    off = _one_a_study(off, studies, config.n_off)
    if not on:
        return None
    maximum = on[0].peak
    parts: list[dict[str, Any]] = [_text(f"{VISION}\n\n{FIRES}")]
    parts += [_picture(one, studies, size, maximum, config.height) for one in on]
    parts.append(_text(SILENT_HEAD))
    parts += [_picture(one, studies, size, maximum, config.height) for one in off]
    return Request([{"role": "user", "content": parts}], MAX_TOKENS, Explanation)


def data_url(image: Image.Image) -> str:
    """An image inside a URL, as JPEG."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _one_a_study(
    examples: Sequence[Example], studies: Mapping[str, Study], most: int
) -> list[Example]:
    first: dict[str, Example] = {}
    for one in examples:
        if one.study in studies:
            first.setdefault(one.study, one)
    return list(first.values())[:most]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(
    example: Example, studies: Mapping[str, Study], size: int, maximum: float, height: int
) -> dict[str, Any]:
    film = film_evidence(example, studies[example.study], size, maximum)
    return {"type": "image_url", "image_url": {"url": data_url(side_by_side([film], height))}}
