"""Prompts through a model in batches of like length; a beginning that prompts share runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooks.batches import length_batches
from hooks.films import Films, stack_films
from hooks.images import pixel_plane, read_image
from hooks.processor import Encoding, Maira2Processor
from hooks.roles import Role, Tokens
from hooks.studies import Study

R = TypeVar("R")


class Prompt(NamedTuple):
    """A study's tokens; ``sequence`` is its number in the run."""

    sequence: int
    study: Study
    tokens: Tokens


Forward = Callable[[Sequence[Prompt], int, Mapping[str, Any]], R]
"""``forward(prompts, start, inputs)``: run the model on ``inputs``, whose row *i* holds prompt *i*
from token ``start`` on, right-padded."""


class Ran(NamedTuple):
    """What one batch gave: ``result`` covers tokens from ``start`` on, ``prefix`` (a batch of one)
    the shared tokens before it, if any."""

    prompts: Sequence[Prompt]
    start: int
    prefix: Any
    result: Any


def study_text(study: Study) -> dict[str, Any]:
    """A study's text, as the processor names it."""
    return {
        "indication": study.indication,
        "technique": study.technique,
        "comparison": study.comparison,
        "prior_report": study.prior_report,
        "grounded": study.grounded,
        "assistant_text": study.report,
    }


def encode_study(processor: Maira2Processor, study: Study, with_report: bool = True) -> Encoding:
    """Tokens and films of one study's prompt, its films read from disk."""

    def film(path: Path | None) -> Image.Image | None:
        return None if path is None else read_image(path)

    text = study_text(study)
    if not with_report:
        text["assistant_text"] = None
    return processor.encode_reporting(
        read_image(study.frontal), film(study.lateral), film(study.prior), **text
    )


class PromptRunner:
    """Tokenises studies and feeds them to a forward function.

    Parameters
    ----------
    batch_tokens
        Padded tokens in one forward pass, at most (a single longer prompt still runs).
    """

    def __init__(self, model: Any, processor: Maira2Processor, batch_tokens: int) -> None:
        self.model, self.processor, self.batch_tokens = model, processor, batch_tokens
        self._plane = lru_cache(maxsize=64)(self.plane)

    def plane(self, film: Path) -> np.ndarray:
        """Pixel values of one film, see :data:`hooks.films.Planes`; reads the file."""
        own = self.processor
        image = read_image(film)
        if own.hub_processor is not None:
            return own.pixel_values([image])[0].numpy()
        # numpy only: threads read films, and each would start a torch thread pool of its own.
        return pixel_plane(image, own.image_size, own.image_mean, own.image_std)[None]

    @property
    def patches(self) -> int:
        """Image patches, and so image tokens, of one film."""
        return self.processor.patches_per_image

    def see(self, pixel_values: Tensor) -> Any:
        """Run the vision tower and the projector, not the language model."""
        return self.model.model.get_image_features(pixel_values=pixel_values)

    def films(self, paths: Sequence[Path]) -> Tensor:
        """Pixel values ``[n, 3, s, s]`` on the model's device and in its dtype."""
        return stack_films([self._plane(path) for path in paths], self.model)

    def prompt(self, sequence: int, study: Study) -> Prompt:
        """Tokenise one study."""
        tokens = self.processor.tokenize_reporting(
            has_lateral=study.lateral is not None,
            has_prior=study.prior is not None,
            **study_text(study),
        )
        return Prompt(sequence, study, tokens)

    def run(
        self, prompts: Sequence[Prompt], forward: Forward[Any], films: Films | None = None
    ) -> Iterator[Ran]:
        """Call ``forward`` on batches until every prompt has run; yields in batch order.

        With ``films``, inputs hold ``inputs_embeds`` with image features in their places, rather
        than token ids and pixel values.
        """
        groups, alone = self._grouped(prompts)
        if films is not None:
            films.expect([group[0].study.films() for group, _ in groups])
            films.expect([prompt.study.films() for prompt in alone])
        for group, shared in groups:
            yield from self._after_prefix(group, shared, forward, films)
        for batch in self.batches(alone):
            inputs = {**self.inputs(batch, films), "use_cache": False}
            yield Ran(batch, 0, None, forward(batch, 0, inputs))

    @staticmethod
    def _grouped(
        prompts: Sequence[Prompt],
    ) -> tuple[list[tuple[list[Prompt], int]], list[Prompt]]:
        """Prompts that share a beginning, with its length; and those that share none."""
        by_films: dict[tuple[Path, ...], list[Prompt]] = {}
        for prompt in prompts:
            by_films.setdefault(prompt.study.films(), []).append(prompt)
        groups, alone = [], []
        for group in by_films.values():
            shared = shared_prefix([prompt.tokens for prompt in group])
            if shared:
                groups.append((group, shared))
            else:
                alone += group
        return groups, alone

    def _after_prefix(
        self, group: list[Prompt], shared: int, forward: Forward[Any], films: Films | None
    ) -> Iterator[Ran]:
        from transformers import DynamicCache

        head = group[0]._replace(tokens=group[0].tokens.take(slice(shared)))
        cache = DynamicCache(config=self.model.config.text_config)
        inputs = {**self.inputs([head], films), "past_key_values": cache, "use_cache": True}
        prefix = forward([head], 0, inputs)
        for batch in self.batches(group, skip=shared):
            ids, mask = self._padded([prompt.tokens.ids for prompt in batch])
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(batch))
            inputs = {
                "input_ids": ids[:, shared:],
                "attention_mask": mask,
                "past_key_values": own,
                "use_cache": True,
            }
            yield Ran(batch, shared, prefix, forward(batch, shared, inputs))

    def batches(self, prompts: Sequence[Prompt], skip: int = 0) -> Iterator[list[Prompt]]:
        """Prompts in batches of like length, ``skip`` tokens of each not counted."""
        lengths = [len(prompt.tokens) - skip for prompt in prompts]
        for chosen in length_batches(lengths, self.batch_tokens):
            yield [prompts[i] for i in chosen]

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and attention mask, ``[batch, longest]``, on the model's device."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
            mask[i, : len(row)] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def inputs(self, batch: Sequence[Prompt], films: Films | None = None) -> dict[str, Tensor]:
        """What the model takes for a batch of whole prompts, see :meth:`run`."""
        ids, mask = self._padded([prompt.tokens.ids for prompt in batch])
        paths = [film for prompt in batch for film in prompt.study.films()]
        if films is None:
            return {"input_ids": ids, "attention_mask": mask, "pixel_values": self.films(paths)}
        embedded = self.model.get_input_embeddings()(ids)
        places = (ids == self.processor.image_token_id)[..., None]
        features = films.features(paths).to(embedded)
        return {"inputs_embeds": embedded.masked_scatter(places, features), "attention_mask": mask}


def shared_prefix(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts begin with, or 0 unless every film lies among them.

    At least one token of each prompt stays outside, so that each has something to compute.
    """
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    first = prompts[0].ids[:shortest]
    same = np.ones(shortest, dtype=bool)
    for prompt in prompts[1:]:
        same &= prompt.ids[:shortest] == first
    shared = shortest if same.all() else int(np.argmin(same))
    films_end = int(np.flatnonzero(prompts[0].of_role(Role.IMAGE))[-1]) + 1
    return shared if shared >= films_end else 0
