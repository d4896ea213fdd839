"""Films of one part of a harvest: pixel values read ahead, image features computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Planes = Mapping[Path, np.ndarray]
"""Pixel values ``[channels, s, s]`` of each film; one channel stands for three equal ones."""


def stack_films(planes: Sequence[np.ndarray], model: Any) -> Float[Tensor, "films 3 s s"]:
    """Pixel values on the model's device and in its dtype."""
    pixels = torch.from_numpy(np.stack(planes)).to(model.device, model.dtype)
    return pixels.expand(-1, 3, -1, -1)


class Films:
    """Projected image features of the films that prompts refer to.

    A film is computed with the first batch that needs it and kept until the last one has had it, as
    when one study's film is another's prior.

    """

    def __init__(self, model: Any, planes: Planes) -> None:
        self._model, self._planes = model, planes
        self._left: Counter[Path] = Counter()
        self._features: dict[Path, Tensor] = {}

    def expect(self, uses: Sequence[Sequence[Path]]) -> None:
        """Say which films will be asked for, in any order and batching."""
        self._left.update(film for films in uses for film in films)

    def features(self, films: Sequence[Path]) -> Float[Tensor, "films patches d"]:
        """Features of ``films``, in order; each is one of its uses."""
        new = [film for film in dict.fromkeys(films) if film not in self._features]
        if new:
            pixels = stack_films([self._planes[film] for film in new], self._model)
            found = self._model.model.get_image_features(pixel_values=pixels).pooler_output
            if new == list(films) and all(self._left[film] == 1 for film in new):
                self._left.subtract(new)
                return torch.stack(list(found))
            self._features.update(zip(new, found, strict=True))
        chosen = torch.stack([self._features[film] for film in films])
        self._left.subtract(films)
        for film in set(films):
            if self._left[film] <= 0:
                del self._features[film]
        return chosen
