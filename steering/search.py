"""A stored index of studies by what their latents do, searched by latent or by example.

One row stands for one study and one kind of token: its frontal, lateral or prior film, the prompt's
clinical text, or the report. It holds the largest activation of every latent that fires there.

Letters: R rows of the index, F latents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file

from hooks.files import (
    ConfigError,
    FolderError,
    atomic_path,
    file_record,
    is_sealed,
    nearest,
    open_sealed,
    read_json,
    seal,
    write_json,
)
from hooks.provenance import untrained_parts
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE
from steering.sentences import content_of
from steering.weights import film_weights

KIND = "index"
FORMAT_VERSION = 2
REMEDY = "run `maira-sae index` to make it"
SHARED = 3
"""Latents that are named for a likeness."""
_FILES = ("config.json", "rows.json", "index.safetensors")


class Hit(NamedTuple):
    """A study that was found."""

    study: str
    patient: str
    score: float
    latents: tuple[tuple[int, float], ...] = ()
    """What found it, the most important first: latents with their share of their largest activation
    in the index, or of a likeness with their part of it."""


@torch.no_grad()
def build_index(
    sae: MatryoshkaSAE, folder: ActivationFolder, out: Path, batch: int = 8192
) -> Index:
    """Summarise every study of an activation folder into a sealed folder ``out``.

    Raises
    ------
    FolderError
        If ``out`` is finished and holds the index of other activations.
    """
    folder.check_trained(sae.config.policy)
    site = folder.check_site(sae.config.site)
    config = {
        "site": site,
        "n_latents": sae.config.n_latents,
        "source": folder.manifest["files"],
        "untrained": list(untrained_parts(folder.manifest["model"]["id"])),
    }
    if is_sealed(out):
        if read_json(out / "config.json") != config:
            raise FolderError(f"{out} is the index of other activations; give a new folder")
        return Index(out)
    role, view = folder.column("role"), folder.column("view")
    kind = np.where(role == "image", view, np.where(role == "grounding", "report", role))
    study, patient = folder.column("study"), folder.column("patient")
    keys = list(zip(study, patient, kind, strict=True))
    names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    owner = torch.tensor([names[key] for key in keys])
    values = torch.zeros(len(names), sae.config.n_latents)
    for start in range(0, folder.n_tokens, batch):
        stop = min(start + batch, folder.n_tokens)
        z = sae.encode(folder.rows(site, start, stop).to(sae.W_dec)).cpu().float()
        values.scatter_reduce_(0, owner[start:stop, None].expand_as(z), z, reduce="amax")
    if float(values.max()) > torch.finfo(torch.float16).max:
        raise ConfigError(f"an activation of {float(values.max())} does not fit float16")
    row, latent = values.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(names))
    tensors = {
        "starts": torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        "latents": latent.int(),
        "values": values[row, latent].half(),
    }
    write_json(out / "config.json", config)
    write_json(out / "rows.json", [list(key) for key in names])
    with atomic_path(out / "index.safetensors") as temporary:
        save_file(tensors, temporary)
    seal(out, KIND, FORMAT_VERSION, {name: file_record(out / name) for name in _FILES})
    return Index(out)


class Index:
    """A finished index."""

    def __init__(self, folder: Path) -> None:
        open_sealed(folder, KIND, FORMAT_VERSION, REMEDY)
        self.folder = folder
        config = read_json(folder / "config.json")
        self.site: str = config["site"]
        self.n_latents: int = config["n_latents"]
        self.untrained: tuple[str, ...] = tuple(config["untrained"])
        """Parts of the model that its record calls untrained."""
        self.rows: list[tuple[str, str, str]] = [tuple(r) for r in read_json(folder / "rows.json")]
        """Study, patient and kind of token of each row."""
        self._tensors = load_file(folder / "index.safetensors")

    @cached_property
    def kinds(self) -> list[str]:
        """``frontal``, ``report`` …: what rows there are."""
        return list(dict.fromkeys(kind for _, _, kind in self.rows))

    def take(self, kind: str) -> tuple[list[tuple[str, str]], Float[torch.Tensor, "R F"]]:
        """Studies with their patients, and their summaries, of one kind of token."""
        if kind not in self.kinds:
            raise ConfigError(
                f"{self.folder} has no {kind!r}{nearest(kind, self.kinds)}; it has {self.kinds}"
            )
        starts, chosen = self._tensors["starts"].tolist(), []
        places = [i for i, row in enumerate(self.rows) if row[2] == kind]
        out = torch.zeros(len(places), self.n_latents)
        for place, i in enumerate(places):
            own = slice(starts[i], starts[i + 1])
            out[place, self._tensors["latents"][own].long()] = self._tensors["values"][own].float()
            chosen.append(self.rows[i][:2])
        return chosen, out

    def by_latents(self, latents: Sequence[int], k: int = 10, kind: str = "frontal") -> list[Hit]:
        """Studies in which the strongest of some latents is strongest, as a label may name several.

        Each latent counts in units of its largest activation in the index.
        """
        for latent in latents:
            if not 0 <= latent < self.n_latents:
                raise ConfigError(f"latent {latent} is outside 0–{self.n_latents - 1}")
        if not latents:
            raise ConfigError("no latent was given; name at least one")
        names, values = self.take(kind)
        some = values[:, list(latents)]
        shares = some / some.amax(0).clamp_min(1e-12)
        hits = _top(names, shares.amax(1), k, set())
        at = {name: i for i, (name, _) in enumerate(names)}
        return [
            hit._replace(latents=_strongest(latents, shares[at[hit.study]], len(latents)))
            for hit in hits
        ]

    def like(self, study: str, k: int = 10, kind: str = "frontal") -> list[Hit]:
        """Studies of other patients most like one of the index."""
        names, values = self.take(kind)
        at = {name: i for i, (name, _) in enumerate(names)}
        if study not in at:
            raise ConfigError(f"{self.folder} has no {kind} of study {study!r}{nearest(study, at)}")
        return self.near(values[at[study]], k, kind, {names[at[study]][1]})

    def near(
        self,
        query: Float[torch.Tensor, " F"],
        k: int = 10,
        kind: str = "frontal",
        without: Collection[str] = (),
    ) -> list[Hit]:
        """Studies most like the largest activations of a film, patients in ``without`` left out."""
        if len(query) != self.n_latents:
            raise ConfigError(
                f"the query has {len(query)} latents, {self.folder} has {self.n_latents}; give "
                "those of the dictionary that made it"
            )
        names, values = self.take(kind)
        parts = _parts(values, query)
        hits = _top(names, parts.sum(1), k, without)
        at = {name: i for i, (name, _) in enumerate(names)}
        every = range(self.n_latents)
        return [
            hit._replace(latents=_strongest(every, parts[at[hit.study]] / hit.score, SHARED))
            for hit in hits
        ]


def latents_named(names: Mapping[int, str], asked: str) -> list[int]:
    """Latents whose label says what is asked for, equal labels first.

    A label says it if it has every word of the question and denies as the question does.

    >>> latents_named({1: "small pleural effusion", 2: "no pleural effusion"}, "pleural effusion")
    [1]

    Raises
    ------
    ConfigError
        If there is none.
    """
    words, denied = content_of(asked)
    found = []
    for latent, label in names.items():
        said, denies = content_of(label)
        if words and words <= said and denied == denies:
            found.append((said != words, latent))
    if not found:
        raise ConfigError(
            f"no label of {len(names)} says {asked!r}{nearest(asked, names.values())}; give words "
            "of a label, or numbers of latents"
        )
    return [latent for _, latent in sorted(found)]


def _strongest(
    latents: Sequence[int], shares: Float[torch.Tensor, " n"], k: int
) -> tuple[tuple[int, float], ...]:
    order = shares.argsort(descending=True, stable=True)[:k].tolist()
    return tuple((latents[i], float(shares[i])) for i in order if shares[i] > 0)


def similarity(
    values: Float[torch.Tensor, "R F"],
    query: Float[torch.Tensor, " F"],
) -> Float[torch.Tensor, " R"]:
    """Cosine of latents, each with its weight (:func:`steering.weights.film_weights`)."""
    return _parts(values, query).sum(1)


def _parts(
    values: Float[torch.Tensor, "R F"],
    query: Float[torch.Tensor, " F"],
) -> Float[torch.Tensor, "R F"]:
    """What each latent adds to the likeness."""
    weight = film_weights(values)
    a, b = values * weight, torch.minimum(query, values.amax(0)) * weight
    return a * b / (a.norm(dim=1, keepdim=True) * b.norm()).clamp_min(1e-12)


def _top(
    names: Sequence[tuple[str, str]], scores: torch.Tensor, k: int, without: Collection[str]
) -> list[Hit]:
    """The best ``k`` with a score above 0, ties in order, patients in ``without`` left out."""
    if k < 1:
        raise ConfigError(f"{k} studies were asked for; ask for at least 1")
    order = scores.argsort(descending=True, stable=True).tolist()
    hits = (
        Hit(names[i][0], names[i][1], float(scores[i])) for i in order if names[i][1] not in without
    )
    return [hit for hit in hits if hit.score > 0][:k]
