"""What `maira-sae bench harvest` measures: a model, its inputs, and SAELens' share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooks.batches import length_batches
from hooks.files import ConfigError
from hooks.harvest import Harvest
from hooks.harvest_config import HarvestConfig
from hooks.images import read_image
from hooks.plain import Text, texts_job
from hooks.prompts import PromptRunner
from hooks.roles import Role
from hooks.studies import Study, read_folder

FILM_SIDE = 1024
"""Pixels of the real model's films: crops of the one real film, each at its own place."""


class Subject(Protocol):
    """A harvest and the plain forward passes it needs."""

    name: str
    site: str
    model: Any
    config: HarvestConfig
    tokens: int
    """Of whole prompts."""
    words: list[np.ndarray]
    """Token ids of each prompt that SAELens can take: it reads no films."""

    @property
    def forward(self) -> Callable[..., Any]:
        """What a pass calls."""
        ...

    def inputs(self) -> list[dict[str, Any]]:
        """Of the batches that the harvest makes, in memory."""
        ...

    def job(self, out: Path, repeats: int = 1) -> Harvest:
        """The whole harvest, its inputs ``repeats`` times over under other names."""
        ...

    def text_tower(self) -> tuple[Any, Any]:
        """A causal language model and its tokenizer."""
        ...


@dataclass
class Studies:
    """A MAIRA-2 that reads films and reports."""

    name: str
    site: str
    model: Any
    processor: Any
    studies: Sequence[Study]
    config: HarvestConfig
    tokens: int = field(init=False)
    words: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        tokens = self.config.tokens_on(self.model.device)
        self._runner = PromptRunner(self.model, self.processor, tokens)
        self._prompts = [self._runner.prompt(i, study) for i, study in enumerate(self.studies)]
        self.tokens = sum(len(prompt.tokens) for prompt in self._prompts)
        self.words = [p.tokens.ids[~p.tokens.of_role(Role.IMAGE)] for p in self._prompts]

    @property
    def forward(self) -> Callable[..., Any]:
        return self.model.model

    def inputs(self) -> list[dict[str, Any]]:
        size = self.config.studies_per_part
        return [
            self._runner.inputs(batch)
            for first in range(0, len(self._prompts), size)
            for batch in self._runner.batches(self._prompts[first : first + size])
        ]

    def job(self, out: Path, repeats: int = 1) -> Harvest:
        studies = [
            one.model_copy(update={"id": f"{one.id}-{k}"}) if k else one
            for k in range(repeats)
            for one in self.studies
        ]
        return Harvest(self.model, self.processor, studies, self.config, out, strict=True)

    def text_tower(self) -> tuple[Any, Any]:
        from transformers import LlamaForCausalLM

        text = LlamaForCausalLM(self.model.config.text_config).to(self.model.dtype)
        text.model.load_state_dict(self.model.model.language_model.state_dict())
        text.lm_head.load_state_dict(self.model.lm_head.state_dict())
        return text, self.processor.tokenizer


@dataclass
class Texts:
    """A causal language model that reads texts."""

    name: str
    site: str
    model: Any
    tokenizer: Any
    texts: Sequence[Text]
    config: HarvestConfig
    tokens: int = field(init=False)
    words: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.words = [np.array(self.tokenizer(text.text)["input_ids"]) for text in self.texts]
        self.tokens = sum(map(len, self.words))

    @property
    def forward(self) -> Callable[..., Any]:
        return self.model

    def inputs(self) -> list[dict[str, Any]]:
        size, most = self.config.studies_per_part, self.config.tokens_on(self.model.device)
        batches = []
        for first in range(0, len(self.words), size):
            part = self.words[first : first + size]
            for chosen in length_batches([len(ids) for ids in part], most):
                batches.append(self._padded([part[i] for i in chosen]))
        return batches

    def _padded(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def job(self, out: Path, repeats: int = 1) -> Harvest:
        texts = [
            one._replace(id=f"{one.id}-{k}") if k else one
            for k in range(repeats)
            for one in self.texts
        ]
        return texts_job(self.model, self.tokenizer, texts, self.config, out, strict=True)

    def text_tower(self) -> tuple[Any, Any]:
        return self.model, self.tokenizer


def mini(config: HarvestConfig, n: int, folder: Path, dtype: str = "auto") -> Studies:
    """The phantom's mini model on phantom studies that it was not trained on."""
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from phantom.model import WEIGHTS
    from phantom.truth import write_studies

    device = "auto" if torch.cuda.is_available() else None
    model = load_model(WEIGHTS, dtype=dtype, device_map=device)
    studies = write_studies(folder / "studies", range(900_000, 900_000 + n))
    name = "the phantom's mini model"
    return Studies(name, config.sites[0], model, load_processor(WEIGHTS), studies, config)


def checkpoint(
    config: HarvestConfig,
    site: str | None,
    n: int,
    source: str,
    studies: Path | None,
    dtype: str,
) -> Studies:
    """A MAIRA-2 of the user's on studies of the user's; without a site, two thirds up."""
    from hooks.maira2 import load_model
    from hooks.processor import load_processor

    if studies is None:
        raise ConfigError(
            f"no studies were given for {source}; name their folder with --studies, or give "
            "--model mini, real or smollm2"
        )
    device = "auto" if torch.cuda.is_available() else None
    model = load_model(source, dtype=dtype, device_map=device)
    records = read_folder(studies)[:n]
    layers = model.config.text_config.num_hidden_layers  # pyright: ignore
    config = replace(config, sites=(site or f"llm.{max(0, 2 * layers // 3 - 1)}.resid_post",))
    return Studies(source, config.sites[0], model, load_processor(source), records, config)


def real(config: HarvestConfig, n: int, folder: Path, seed: int = 0) -> Studies:
    """The assembled real towers on Open-i reports, a film of its own for each."""
    from hooks.maira2 import load_model
    from hooks.processor import Maira2Processor
    from maira_sae import real_model

    checkpoint = real_model.build(folder / "model", seed) / "maira2"
    studies = [
        study.model_copy(update={"frontal": path})
        for study, path in zip(_reports(n), _films(n, folder / "films", seed), strict=True)
    ]
    device = "auto" if torch.cuda.is_available() else None
    model = load_model(checkpoint, dtype=torch.float32, device_map=device)
    processor = Maira2Processor.from_pretrained(checkpoint)
    name = "real towers: DINOv2-small, SmolLM2-135M"
    return Studies(name, config.sites[0], model, processor, studies, config)


def smollm2(config: HarvestConfig, n: int) -> Texts:
    """SmolLM2-135M alone on Open-i reports."""
    from maira_sae import real_model

    model, tokenizer = real_model.text_tower()
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    texts = [Text(study.id, study.report or "") for study in _reports(n)]
    return Texts("SmolLM2-135M-Instruct", config.sites[0], model, tokenizer, texts, config)


def _reports(n: int) -> list[Study]:
    from hooks.readers import read_openi
    from maira_sae import real_model

    found = read_openi(real_model.openi_archive(), real_model.film())
    return [study for study in found if study.report][:n]


def _films(n: int, folder: Path, seed: int) -> list[Path]:
    """Crops of the real film as PNG, so that no two studies share a film."""
    from maira_sae import real_model

    folder.mkdir(parents=True)
    whole: Image.Image = read_image(real_model.film())
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(n):
        left = int(rng.integers(0, whole.width - FILM_SIDE + 1))
        top = int(rng.integers(0, whole.height - FILM_SIDE + 1))
        paths.append(folder / f"film-{number:04d}.png")
        box = (left, top, left + FILM_SIDE, top + FILM_SIDE)
        whole.crop(box).save(paths[-1], compress_level=6)
    return paths
