"""Which films a page can hold, and how finely: the best picture that fits the bytes there are."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from autointerp.views import FilmView
from hooks.files import StudyError
from hooks.film_files import LADDER, Rung, StoredFilm, encode
from hooks.images import read_image

SAMPLE = 12
"""Films encoded to learn what a rung costs."""
SAFETY = 1.1
"""The sample may be easier to encode than the rest."""
HALVING = 0.5
"""What a further film of a latent is worth beside the film before it."""


class FilmSet(NamedTuple):
    """The films of a page."""

    films: dict[str, StoredFilm]
    rung: Rung
    left_out: int
    """Films that were asked for and did not fit."""


def ranking(wanted: Sequence[Sequence[str]]) -> list[str]:
    """All films, so ordered that the first few show most of most latents.

    A latent's first film counts 1, every further one half of the one before; films are taken
    greedily, which is within 1 − 1/e of the best choice (Nemhauser et al. 1978).

    Parameters
    ----------
    wanted
        Films of each latent, most wanted first.

    >>> ranking([["a", "b"], ["a"], ["c"]])
    ['a', 'c', 'b']
    """
    names = list(dict.fromkeys(film for films in wanted for film in films))
    place = {name: i for i, name in enumerate(names)}
    owners: list[list[int]] = [[] for _ in names]
    for latent, films in enumerate(wanted):
        for film in dict.fromkeys(films):
            owners[place[film]].append(latent)
    worth = [1.0] * len(wanted)
    # Gains only fall, so an old gain that still leads after an update is the best (lazy greedy).
    queue = [(-float(len(latents)), i) for i, latents in enumerate(owners)]
    heapq.heapify(queue)
    order: list[str] = []
    while queue:
        old, best = heapq.heappop(queue)
        gain = -sum(worth[latent] for latent in owners[best])
        if gain > old:
            heapq.heappush(queue, (gain, best))
            continue
        for latent in owners[best]:
            worth[latent] *= HALVING
        order.append(names[best])
    return order


def store(films: Mapping[str, FilmView], wanted: Sequence[Sequence[str]], n_bytes: int) -> FilmSet:
    """Encode the films that fit ``n_bytes``, most wanted first.

    The rung is the finest on which a sample says that all films fit; if none is, the last, with
    as many films as it holds.
    """
    order = [name for name in ranking(wanted) if films[name].image is not None]
    sample = order[:: max(1, len(order) // SAMPLE)][:SAMPLE]
    rung = LADDER[-1]
    for rung in LADDER:
        sizes = [len(encode(read(films[name]), rung).url) for name in sample]
        if not sizes or SAFETY * float(np.mean(sizes)) * len(order) <= n_bytes:
            break
    stored: dict[str, StoredFilm] = {}
    left = n_bytes
    for name in order:
        film = encode(read(films[name]), rung)
        left -= len(film.url)
        if left < 0:
            break
        stored[name] = film
    return FilmSet(stored, rung, len(order) - len(stored))


def read(film: FilmView) -> Image.Image:
    """The film's picture, as the model reads it."""
    if film.image is None:
        raise StudyError(f"the film {film.caption!r} is not at hand; give the study's record")
    return film.image if isinstance(film.image, Image.Image) else read_image(film.image)
