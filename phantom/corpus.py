"""What the mini model is trained on: films with their truth, and prompts with their reports."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooks.images import to_grey
from hooks.processor import Maira2Processor
from hooks.roles import Role
from phantom.draw import Film
from phantom.factors import BANDS, LABELS, generator, parts
from phantom.study import PhantomStudy, sample_study

GROUNDED_RATE = 0.3
"""How often a study is read with the prompt that asks for boxes."""
_CHUNK = 250

Choose = Callable[[int], PhantomStudy]
"""From a seed to the study that has it."""


@dataclass(frozen=True)
class Example:
    """One prompt with its report, as token ids, and the films it is about."""

    ids: np.ndarray
    """int64 (n,): the prompt, the report and the end token."""
    prompt: int
    """Tokens of the prompt; those that follow are learned."""
    films: tuple[int, ...]
    """Rows of `Corpus.pixels`, in the order of the prompt."""
    grounded: bool
    """Whether the report has boxes."""


@dataclass(frozen=True)
class Corpus:
    """Films as arrays over all studies, and one example for each study."""

    pixels: np.ndarray
    """uint8 (films, size, size), scaled as the processor scales them."""
    coverage: np.ndarray
    """uint8 (films, 14, patches): how much of a patch a finding covers, in 255ths."""
    boxes: np.ndarray
    """float32 (films, 14, 4): corners as fractions; zero where there is no finding."""
    states: np.ndarray
    """int8 (films, 3, 14): present, subtle, and of the second grade of its kind; -1 for the last
    two where the finding is absent or cannot be so."""
    examples: list[Example]


def make_corpus(seeds: Sequence[int], choose: Choose, workers: int = 2) -> Corpus:
    """Draw studies and write their prompts, in parallel; the same seeds give the same bytes."""
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        parts_ = list(pool.map(partial(_chunk, choose=choose), chunks))
    examples, first = [], 0
    for part in parts_:
        for example in part.examples:
            films = tuple(first + film for film in example.films)
            examples.append(replace(example, films=films))
        first += len(part.pixels)

    return Corpus(
        pixels=np.concatenate([part.pixels for part in parts_]),
        coverage=np.concatenate([part.coverage for part in parts_]),
        boxes=np.concatenate([part.boxes for part in parts_]),
        states=np.concatenate([part.states for part in parts_]),
        examples=examples,
    )


def _chunk(seeds: Sequence[int], choose: Choose) -> Corpus:
    from phantom.model import processor

    words = processor()
    films: list[Film] = []
    examples = []
    for seed in seeds:
        study = choose(seed)
        own = study.films()
        grounded = generator(seed, "prompt").random() < GROUNDED_RATE
        places = tuple(range(len(films), len(films) + len(own)))
        examples.append(_example(study, words, grounded, places))
        films += own
    return Corpus(
        pixels=np.stack([grey(film) for film in films]),
        coverage=np.stack([_shares(film) for film in films]),
        boxes=np.stack([_boxes(film) for film in films]),
        states=np.stack([_states(film) for film in films]),
        examples=examples,
    )


def grey(film: Film) -> np.ndarray:
    """The film's pixels as the processor hands them on, before normalisation: uint8 (H, W)."""
    return np.asarray(to_grey(Image.fromarray(film.pixels)))


def normalised(pixels: np.ndarray, words: Maira2Processor) -> Tensor:
    """What `grey` gave, as the model's pixel values: uint8 (B, H, W) to float32 (B, 3, H, W)."""
    plane = torch.from_numpy(pixels).float().div_(255).sub_(words.image_mean).div_(words.image_std)
    return plane[:, None].expand(-1, 3, -1, -1)


def _example(
    study: PhantomStudy, words: Maira2Processor, grounded: bool, films: tuple[int, ...]
) -> Example:
    report = study.report
    tokens = words.tokenize_reporting(
        has_lateral=study.lateral is not None,
        has_prior=study.prior is not None,
        indication=report.indication,
        technique=report.technique,
        comparison=report.comparison,
        grounded=grounded,
        assistant_text=report.grounded if grounded else report.findings,
    )
    first = int(np.argmax(tokens.of_role(Role.REPORT, Role.GROUNDING)))
    return Example(tokens.ids, first, films, grounded)


def _shares(film: Film) -> np.ndarray:
    return np.rint(film.coverage().reshape(len(LABELS), -1) * 255).astype(np.uint8)


def _boxes(film: Film) -> np.ndarray:
    out = np.zeros((len(LABELS), 4), np.float32)
    for label, box in film.boxes.items():
        out[LABELS.index(label)] = box
    return out


def _states(film: Film) -> np.ndarray:
    out = np.full((3, len(LABELS)), -1, np.int8)
    out[0] = film.factors.vector()
    for finding in film.factors.findings:
        place = LABELS.index(finding.label)
        out[1, place] = finding.subtle
        grades = tuple(BANDS[parts(finding.label).kind])
        if len(grades) > 1:
            out[2, place] = grades.index(finding.grade)
    return out


def mixed(seed: int) -> PhantomStudy:
    """Half of the studies as in clinics, half with findings that know nothing of each other."""
    return sample_study(seed, sampler="independent" if seed % 2 else "clinical")


EASY = ("cardiomegaly", "pacemaker", "endotracheal_tube")
"""What the model learns to read within a minute."""


def easy(seed: int) -> PhantomStudy:
    """Single frontal films with at most the three easy findings, each in half of the studies."""
    rates: dict[str, float] = dict.fromkeys(EASY, 0.5)
    return sample_study(seed, sampler="independent", rate=rates, lateral=False, prior=False)
