"""Stage one of the mini model's training: the image encoder learns what its patches show."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.processor import Maira2Processor
from phantom.corpus import Corpus, normalised
from phantom.factors import LABELS

LOSSES = (
    "binary cross-entropy of each patch token against the findings that cover it (vision_tower)",
    "smooth L1 of each covered patch token against the box of its finding (vision_tower)",
    "binary cross-entropy of the mean patch token against the findings of the film (vision_tower)",
    "binary cross-entropy of the class token against the findings of the film (vision_tower)",
)
COVERED = 0.25
"""Share of a patch from which on a finding counts as fully there; below, in proportion."""
_COVERED_WEIGHT = 2.0  # of a covered against an uncovered patch
_NOISE_FLOOR = 0.05  # of a patch's whitened directions, in squared pixel values


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of stage one. Small batches learn faster here than large ones, film for film."""

    steps: int = 6_000
    batch: int = 24
    lr: float = 1.5e-3
    weight_decay: float = 0.02
    seed: int = 0


class Reader(nn.Module):
    """Linear readings of the encoder's tokens; trained with it, and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n = len(LABELS)
        self.patch = nn.Linear(width, n)
        self.box = nn.Linear(width, 4 * n)
        self.pooled = nn.Linear(width, 3 * n)
        self.cls = nn.Linear(width, 3 * n)


@torch.no_grad()
def initialise(tower: Any, pixels: Tensor) -> None:
    """Start the encoder where it learns quickly.

    Patch embeddings whiten patches (Coates and Ng 2012, section 2.1: the principal directions of
    the patches, each over its standard deviation), positions are two-dimensional sines, and
    linear layers keep the variance of unit inputs.

    Args:
        tower: a DINOv2 backbone.
        pixels: pixel values of some films, float32 (n, 3, H, W), all channels equal.
    """
    for parameter in tower.encoder.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.9 / math.sqrt(parameter.shape[1]))
    projection = tower.embeddings.patch_embeddings.projection
    width, _, side, _ = projection.weight.shape
    patches = F.unfold(pixels[:, :1], side, stride=side).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    largest = slice(-width, None)
    whiten = directions[:, largest] / (variances[largest] + _NOISE_FLOOR).sqrt()
    weight = 0.5 * whiten.T
    projection.weight.copy_(weight.reshape(width, 1, side, side).expand(-1, 3, -1, -1) / 3)
    projection.bias.copy_(-(weight @ mean))
    grid = pixels.shape[-1] // side
    tower.embeddings.position_embeddings[0, 1:] = 0.5 * _sines(grid, width)


def _sines(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, float32 (grid², width); waves of 4 patches and more."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    waves = 1.5 * float(grid) ** -torch.linspace(0, 1, width // 4)
    angles = [place.reshape(-1, 1) * waves for place in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def train_encoder(
    tower: nn.Module,
    reader: Reader,
    corpus: Corpus,
    words: Maira2Processor,
    config: EncoderConfig,
    log: Any,
) -> list[dict[str, Any]]:
    """Train on every film of the corpus; returns the mean losses of every hundred steps."""
    parameters = [*tower.parameters(), *reader.parameters()]
    optimiser = adamw(parameters, config.weight_decay)
    order = _epochs(len(corpus.pixels), config.batch, config.seed)
    curve, recent = [], []
    for step in range(config.steps):
        set_rate(optimiser, config.lr, step, config.steps)
        rows = next(order)
        losses = _losses(tower, reader, corpus, normalised(corpus.pixels[rows], words), rows)
        take_step(optimiser, torch.stack(losses).sum(), parameters)
        recent.append([float(loss.detach()) for loss in losses])
        if len(recent) == 100:
            means = np.mean(recent, axis=0).round(4).tolist()
            recent.clear()
            named = dict(zip(("patch", "box", "pooled", "cls"), means, strict=True))
            curve.append({"stage": "encoder", "step": step + 1, **named})
            log(curve[-1])
    return curve


def _losses(
    tower: Any, reader: Reader, corpus: Corpus, pixels: Tensor, rows: np.ndarray
) -> list[Tensor]:
    """The four of `LOSSES`, weighted."""
    tokens = tower(pixels).feature_maps[-1]
    patches = tokens[:, 1:]
    shares = torch.from_numpy(corpus.coverage[rows]).float().transpose(1, 2) / 255
    covered = (shares / COVERED).clamp_max(1)
    weight = torch.tensor(_COVERED_WEIGHT)
    seen = F.binary_cross_entropy_with_logits(reader.patch(patches), covered, pos_weight=weight)
    corners = reader.box(patches).unflatten(-1, (len(LABELS), 4))
    boxes = torch.from_numpy(corpus.boxes[rows])[:, None].expand_as(corners)
    off = F.smooth_l1_loss(corners, boxes, reduction="none", beta=0.05).sum(-1)
    states = torch.from_numpy(corpus.states[rows]).float().flatten(1)
    return [
        4 * seen,
        (off * covered).sum() / covered.sum().clamp_min(1),
        _label_loss(reader.pooled(patches.mean(1)), states),
        0.3 * _label_loss(reader.cls(tokens[:, 0]), states),
    ]


def _label_loss(logits: Tensor, states: Tensor) -> Tensor:
    known = states >= 0
    return F.binary_cross_entropy_with_logits(logits[known], states[known])


@torch.no_grad()
def encode(tower: Any, pixels: np.ndarray, words: Maira2Processor) -> Tensor:
    """Layernormed patch tokens of films: float16 (films, patches, width)."""
    return torch.cat(
        [
            tower(normalised(pixels[start : start + 64], words)).feature_maps[-1][:, 1:].half()
            for start in range(0, len(pixels), 64)
        ]
    )


@torch.no_grad()
def encoder_f1(
    tower: nn.Module, reader: Reader, fresh: Corpus, words: Maira2Processor
) -> dict[str, float]:
    """F1 of each finding on frontal films, read as the patch most sure of it.

    The threshold of each is the one that is best on the first half of the studies, the score that
    of the second half.
    """
    frontal = [example.films[0] for example in fresh.examples]
    features = encode(tower, fresh.pixels[frontal], words).float()
    sure = reader.patch(features).amax(1)
    true = torch.from_numpy(fresh.states[frontal, 0]) == 1
    half = len(frontal) // 2
    out = {}
    for i, label in enumerate(LABELS):
        if true[:half, i].any() and true[half:, i].any():
            candidates = sure[:half, i]
            scores = torch.stack([_f1(candidates >= c, true[:half, i]) for c in candidates])
            said = sure[half:, i] >= candidates[scores.argmax()]
            out[label] = round(float(_f1(said, true[half:, i])), 4)
    return out


def _f1(said: Tensor, true: Tensor) -> Tensor:
    return 2 * (said & true).sum() / (said.sum() + true.sum()).clamp_min(1)


def _epochs(n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches of row numbers, each in ascending order."""
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            yield np.sort(order[start : start + size])


def adamw(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def set_rate(optimiser: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Warm up over 100 steps (or a tenth), then one cosine down to 2%."""
    warm = min(1.0, (step + 1) / min(100, steps / 10))
    cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimiser.param_groups:
        group["lr"] = lr * warm * cosine


def take_step(
    optimiser: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[nn.Parameter]
) -> None:
    """One update, the gradient's norm clipped to 1."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
