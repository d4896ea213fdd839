"""Harvests of towers alone: an image encoder over films, a causal language model over texts.

RAD-DINO (``microsoft/rad-dino``) is the image-only encoder whose architecture MAIRA-2's vision
tower has; any causal language model of transformers serves beside MAIRA-2's. The folders are those
of :func:`hooks.harvest.harvest`: a row per patch with its film and place in it, or a row per token
with its sentence. They resume, share parts between processes and skip in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.batches import length_batches
from hooks.files import CheckpointError, ConfigError, StudyError, fingerprint
from hooks.harvest import Harvest, HarvestConfig, harvest_record
from hooks.images import pixel_plane, read_image
from hooks.prompts import Prompt
from hooks.roles import NONE, Role, Span, Tokens, View, assign_roles
from hooks.rows import Kept, Read, kept_roles, part_rows, read_part, settle
from hooks.sites import capture, resolve_sites, site_width
from hooks.store import DTYPES, ActivationFolder, StudyRows
from hooks.streams import default_streams
from hooks.studies import Skipped, Study


@dataclass(frozen=True)
class FilmScale:
    """How a film becomes pixel values; the defaults are RAD-DINO's, and MAIRA-2's."""

    image_size: int = 518
    """Side of the square that the film is resized and cropped to."""
    mean: float = 0.5307
    std: float = 0.2583

    @classmethod
    def from_pretrained(cls, source: str | Path) -> FilmScale:
        """From ``preprocessor_config.json`` of a checkpoint folder or Hub repository."""
        from transformers.utils import cached_file

        path = cached_file(
            str(source), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            raise CheckpointError(
                f"{source} has no preprocessor_config.json; give a FilmScale of your own"
            )
        found = json.loads(Path(path).read_text())
        size = found.get("crop_size") or found.get("size")
        try:
            side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
            return cls(int(side), found["image_mean"][0], found["image_std"][0])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} names no crop size, mean and standard deviation ({error!r}); give a "
                "FilmScale of your own"
            ) from None


class Text(NamedTuple):
    """One text for a language model."""

    id: str
    text: str
    patient: str | None = None
    """Splits never separate texts of one patient; defaults to the text's own id."""


def harvest_films(
    encoder: Any,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
    scale: FilmScale | None = None,
    strict: bool = False,
) -> ActivationFolder:
    """Write the activations of an image encoder over the films of ``studies``.

    Parameters
    ----------
    encoder
        An image encoder of transformers alone, such as ``Dinov2Model``.
    config
        Sites are ``vision`` sites; the policy must keep image tokens (``patches``).

    Raises
    ------
    ConfigError
        If the policy keeps no patches, or the size does not fit the encoder's.
    """
    folder = films_job(encoder, studies, config, out, scale, strict).run()
    assert folder is not None  # alone, there is nobody to wait for
    return folder


def films_job(
    encoder: Any,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
    scale: FilmScale | None = None,
    strict: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Harvest:
    """One process's share of :func:`harvest_films`, see :class:`hooks.harvest.Harvest`."""
    scale = scale or FilmScale()
    maker = _FilmMaker(encoder, studies, config, scale, strict)
    record = {**harvest_record(encoder, studies, config), "scale": asdict(scale)}
    return Harvest.of(maker, record, config, out, rank, world)


def harvest_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    config: HarvestConfig,
    out: Path,
    max_tokens: int = 2048,
    strict: bool = False,
) -> ActivationFolder:
    """Write the activations of a causal language model over ``texts``.

    Every token has the role ``report``, added special tokens ``boilerplate``. A text of more than
    ``max_tokens`` tokens is skipped, and named in ``skipped.jsonl``.

    Raises
    ------
    StudyError
        If there are no texts, two have one id, or one is too long and ``strict``.
    """
    folder = texts_job(model, tokenizer, texts, config, out, max_tokens, strict).run()
    assert folder is not None
    return folder


def texts_job(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    config: HarvestConfig,
    out: Path,
    max_tokens: int = 2048,
    strict: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Harvest:
    """One process's share of :func:`harvest_texts`, see :class:`hooks.harvest.Harvest`."""
    maker = _TextMaker(model, tokenizer, texts, config, max_tokens, strict)
    record = {**harvest_record(model, (), config), "max_tokens": max_tokens}
    record["studies_sha256"] = maker.texts_sha256
    return Harvest.of(maker, record, config, out, rank, world)


class _FilmRunner:
    """What :mod:`hooks.rows` needs of a runner, for an encoder without a language model."""

    def __init__(self, model: Any, scale: FilmScale, batch_tokens: int) -> None:
        side, rest = divmod(scale.image_size, model.config.patch_size)
        if rest:
            raise ConfigError(
                f"films of {scale.image_size} pixels do not divide into patches of "
                f"{model.config.patch_size}; give a multiple"
            )
        self.model, self.batch_tokens, self._scale, self._side = model, batch_tokens, scale, side
        self.patches = side**2

    def plane(self, film: Path) -> np.ndarray:
        """Pixel values ``[1, s, s]`` of one film; reads the file."""
        scale = self._scale
        return pixel_plane(read_image(film), scale.image_size, scale.mean, scale.std)[None]

    def prompt(self, sequence: int, study: Study) -> Prompt:
        """A token for each patch of the study's films."""
        films = (study.frontal, study.lateral, study.prior)
        views = [view for view, film in zip(View, films, strict=True) if film is not None]
        n = len(views) * self.patches
        row, column = np.divmod(np.arange(self.patches), self._side)
        tokens = Tokens(
            ids=np.full(n, NONE, dtype=np.int64),
            role=np.full(n, Role.IMAGE, dtype=np.int8),
            view=np.repeat(np.array(views, dtype=np.int16), self.patches),
            row=np.tile(row.astype(np.int16), len(views)),
            column=np.tile(column.astype(np.int16), len(views)),
            sentence=np.full(n, NONE, dtype=np.int16),
        )
        return Prompt(sequence, study, tokens)

    def see(self, pixel_values: Tensor) -> Any:
        """Run the encoder."""
        return self.model(pixel_values=pixel_values)


class _Tower:
    """Sites of a model, and what is kept of them."""

    def __init__(self, model: Any, n: int, config: HarvestConfig, stream: str) -> None:
        if n == 0:
            raise StudyError("there is nothing to harvest; give at least one study or text")
        self.sites = resolve_sites(model, config.sites)
        if self.sites[0].stream != stream:
            raise ConfigError(
                f"{self.sites[0].name!r} is a {self.sites[0].stream} site, and this model sees "
                f"{'films' if stream == 'vision' else 'texts'}; harvest MAIRA-2 with `harvest`"
            )
        self.kept = Kept(
            kept_roles(config.policy, self.sites), config.patches, DTYPES[config.dtype]
        )
        self.names = [site.name for site in self.sites]
        self.widths = {site.name: site_width(model, site) for site in self.sites}
        self.n_studies, self.size = n, config.studies_per_part
        self.device: torch.device = model.device
        self.streams = default_streams(model)


class _FilmMaker(_Tower):
    def __init__(
        self,
        model: Any,
        studies: Sequence[Study],
        config: HarvestConfig,
        scale: FilmScale,
        strict: bool,
    ) -> None:
        super().__init__(model, len(studies), config, "vision")
        self._runner: Any = _FilmRunner(model, scale, config.tokens_on(model.device))
        self._studies, self._strict = studies, strict

    def read(self, part: int) -> Read:
        first = part * self.size
        return read_part(
            self._runner, self._studies[first : first + self.size], first, self._strict
        )

    def rows(self, read: Read) -> list[StudyRows]:
        return part_rows(self._runner, self.sites, read, self.kept)


class _ReadTexts(NamedTuple):
    """A part's texts, tokenised."""

    texts: list[tuple[int, Text, Tokens]]
    skipped: list[Skipped]


class _TextMaker(_Tower):
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[Text],
        config: HarvestConfig,
        max_tokens: int,
        strict: bool,
    ) -> None:
        super().__init__(model, len(texts), config, "text")
        ids = [text.id for text in texts]
        if len(set(ids)) < len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise StudyError(f"two texts have the id {twice!r}; make ids unique")
        if not tokenizer.is_fast:
            raise CheckpointError("the tokenizer is not a fast one; add its tokenizer.json")
        settle(tokenizer)
        self._model, self._tokenizer, self._texts = model, tokenizer, texts
        self._max_tokens, self._strict = max_tokens, strict
        self._batch_tokens = config.tokens_on(model.device)
        self.texts_sha256 = fingerprint([list(text) for text in texts])

    def read(self, part: int) -> _ReadTexts:
        first = part * self.size
        found, skipped = [], []
        for sequence, text in enumerate(self._texts[first : first + self.size], first):
            encoded = self._tokenizer(text.text, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            if 0 < len(ids) <= self._max_tokens:
                span = Span(0, len(text.text), Role.REPORT)
                found.append((sequence, text, assign_roles(ids, offsets, text.text, [span], 1)))
                continue
            reason = f"length: {len(ids)} tokens, at most {self._max_tokens} are taken"
            if self._strict:
                raise StudyError(f"text {text.id!r}: {reason}; cut it into shorter ones")
            skipped.append(Skipped(text.id, reason))
        return _ReadTexts(found, skipped)

    @torch.no_grad()
    def rows(self, read: _ReadTexts) -> list[StudyRows]:
        found: dict[int, StudyRows] = {}
        with capture(self.sites) as run:
            for batch in self._batches(read.texts):
                longest = max(len(tokens) for _, _, tokens in batch)
                ids = torch.full((len(batch), longest), self._tokenizer.pad_token_id or 0)
                mask = torch.zeros_like(ids)
                for i, (_, _, tokens) in enumerate(batch):
                    ids[i, : len(tokens)] = torch.from_numpy(tokens.ids)
                    mask[i, : len(tokens)] = 1
                device = self._model.device
                values = run(self._model, input_ids=ids.to(device), attention_mask=mask.to(device))
                for i, (sequence, text, tokens) in enumerate(batch):
                    own = {name: v[i, : len(tokens)] for name, v in values.items()}
                    found[sequence] = self._rows_of(sequence, text, tokens, own)
        return [found[sequence] for sequence, _, _ in read.texts]

    def _batches(
        self, texts: Sequence[tuple[int, Text, Tokens]]
    ) -> Iterator[list[tuple[int, Text, Tokens]]]:
        lengths = [len(tokens) for _, _, tokens in texts]
        for chosen in length_batches(lengths, self._batch_tokens):
            yield [texts[i] for i in chosen]

    def _rows_of(
        self, sequence: int, text: Text, tokens: Tokens, values: dict[str, Tensor]
    ) -> StudyRows:
        chosen = np.flatnonzero(tokens.of_role(*self.kept.roles))
        rows = torch.from_numpy(chosen)
        return StudyRows(
            study=text.id,
            patient=text.patient or text.id,
            sequence=sequence,
            positions=chosen,
            tokens=tokens.take(chosen),
            activations={
                name: v[rows.to(v.device)].to(self.kept.dtype).cpu() for name, v in values.items()
            },
        )
