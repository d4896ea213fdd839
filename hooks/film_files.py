"""Films inside a page: how finely each is stored. No grey value is windowed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image


class Rung(NamedTuple):
    """One way to store a film."""

    side: int | None
    """Longest side in pixels; ``None`` keeps the film's own size."""
    quality: int | None
    """Of WebP; ``None`` is lossless."""

    @property
    def words(self) -> str:
        """As the page says it."""
        size = "original resolution" if self.side is None else f"at most {self.side} px a side"
        kind = "lossless" if self.quality is None else f"WebP quality {self.quality}"
        return f"{size}, {kind}"


LADDER = (
    Rung(None, None),
    Rung(None, 90),
    Rung(None, 75),
    Rung(1024, 75),
    Rung(768, 70),
    Rung(518, 70),
    Rung(392, 60),
)
"""Best first: quality goes before resolution, and both before films. 518 px is MAIRA-2's input."""


@dataclass(frozen=True)
class StoredFilm:
    """An encoded film."""

    url: str
    """``data:image/webp;base64,…``"""
    width: int
    height: int
    shown: tuple[int, int]
    """Width and height of the stored picture."""


def encode(image: Image.Image, rung: Rung) -> StoredFilm:
    """The film on one rung. Its grey values are not windowed; only lossy rungs change any."""
    shown = image.convert("L")
    if rung.side is not None and max(shown.size) > rung.side:
        scale = rung.side / max(shown.size)
        size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if rung.quality is None:
        shown.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=80)
    else:
        shown.convert("RGB").save(buffer, format="WEBP", quality=rung.quality, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return StoredFilm(f"data:image/webp;base64,{text}", image.width, image.height, shown.size)


def encode_all(
    images: Mapping[str, Image.Image], n_bytes: int, sample: int = 4
) -> tuple[dict[str, StoredFilm], Rung]:
    """All films on the finest rung on which a sample says that they fit; else on the last."""
    names = list(images)
    some = names[:: max(1, len(names) // sample)][:sample]
    rung = LADDER[-1]
    for rung in LADDER:
        size = sum(len(encode(images[name], rung).url) for name in some)
        if size * len(names) <= n_bytes * max(1, len(some)):
            break
    return {name: encode(image, rung) for name, image in images.items()}, rung
