"""Train the mini model from a seed: the encoder on masks and labels, then the language side.

    python -m phantom.train --out phantom/weights

Only the encoder ever sees a label. The projector and the language model, which follow with the
encoder frozen as in MAIRA-2 (arXiv 2406.04449, section 3), learn from the words of the reports
alone, so that whatever a probe or a dictionary finds there was put there by reading films.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.files import versions, write_json
from hooks.processor import Maira2Processor
from phantom.corpus import Corpus, Example, make_corpus, mixed
from phantom.factors import LABELS, PhantomError
from phantom.model import build, processor

TRAINING_SEEDS = 2**62
"""Seeds of training studies start here, far from those of any evaluation."""
GATE_SEEDS = 2**61
"""Seeds of the studies on which the encoder is judged before the language side starts."""

LOSSES = {
    "encoder": [
        "binary cross-entropy of patch tokens against mask coverage (vision_tower)",
        "smooth L1 of patch tokens against the box of the finding that covers them (vision_tower)",
        "binary cross-entropy of the mean patch token against labels (vision_tower)",
        "binary cross-entropy of the class token against labels (vision_tower)",
    ],
    "language": [
        "next-token cross-entropy of report tokens (multi_modal_projector, language_model, "
        "lm_head; vision_tower frozen)"
    ],
}
"""Every loss there is, by stage, with the parts it trains."""


@dataclass(frozen=True)
class PhantomTrainConfig:
    """Sizes of one training run."""

    n_studies: int = 40_000
    encoder_steps: int = 2_000
    encoder_batch: int = 64
    encoder_lr: float = 1.5e-3
    steps: int = 5_000
    batch: int = 16
    lr: float = 1.3e-3
    weight_decay: float = 0.02
    patch_weight: float = 4.0
    """Weight of covered against uncovered patches."""
    gate: float = 0.8
    """F1 that a linear reading of the encoder must reach on every label."""
    seed: int = 0


def train(config: PhantomTrainConfig, out: Path, choose: Any = mixed) -> dict[str, Any]:
    """Train, and write the checkpoint and `training.json` into `out`; returns that record.

    Raises:
        PhantomError: the encoder fails its gate, which no language training would mend.
    """
    began = time.perf_counter()
    log = _Log(began)
    seeds = range(TRAINING_SEEDS, TRAINING_SEEDS + config.n_studies)
    corpus = make_corpus(seeds, choose)
    log(f"{config.n_studies} studies, {len(corpus.pixels)} films drawn")
    model, words = build(config.seed), processor()
    reader = Reader(model.config.vision_config.hidden_size)
    curve = train_encoder(model.model.vision_tower, reader, corpus, words, config, log)
    gate = encoder_f1(model.model.vision_tower, reader, words, choose)
    log(f"encoder F1 {gate}")
    failed = {label: f1 for label, f1 in gate.items() if f1 < config.gate}
    if failed:
        raise PhantomError(
            f"the encoder reads {failed} below F1 {config.gate}; train it longer "
            "(encoder_steps) before the language side"
        )
    features = encode(model.model.vision_tower, corpus.pixels, words)
    log("films encoded")
    curve += train_language(model, corpus, features, config, log)
    words.save_pretrained(out)
    model.save_pretrained(out)
    record = {
        "config": asdict(config),
        "losses": LOSSES,
        "encoder_f1": gate,
        "curve": curve,
        "seconds": round(time.perf_counter() - began),
        "versions": versions(),
    }
    write_json(out / "training.json", record)
    return record


class _Log:
    def __init__(self, began: float) -> None:
        self.began = began

    def __call__(self, text: str) -> None:
        print(f"{time.perf_counter() - self.began:6.0f} s  {text}", flush=True)  # noqa: T201


class Reader(nn.Module):
    """Linear readings of the encoder's tokens; trained with it, and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n = len(LABELS)
        self.patch = nn.Linear(width, n)
        self.box = nn.Linear(width, 4 * n)
        self.pooled = nn.Linear(width, 3 * n)
        self.cls = nn.Linear(width, 3 * n)


def normalised(pixels: np.ndarray, words: Maira2Processor) -> Tensor:
    """uint8 (B, H, W) to the model's pixel values, float32 (B, 3, H, W)."""
    plane = torch.from_numpy(pixels).float().div_(255).sub_(words.image_mean).div_(words.image_std)
    return plane[:, None].expand(-1, 3, -1, -1)


def train_encoder(
    tower: nn.Module,
    reader: Reader,
    corpus: Corpus,
    words: Maira2Processor,
    config: PhantomTrainConfig,
    log: _Log,
) -> list[dict[str, Any]]:
    """Stage one: patches learn what covers them and its box, the mean patch and CLS the labels."""
    parameters = [*tower.parameters(), *reader.parameters()]
    optimiser = _adamw(parameters, config.encoder_lr, config.weight_decay)
    weight = torch.tensor(config.patch_weight)
    order = _epochs(len(corpus.pixels), config.encoder_batch, config.seed)
    curve, sums = [], np.zeros(4)
    for step in range(config.encoder_steps):
        _set_rate(optimiser, config.encoder_lr, step, config.encoder_steps)
        rows = next(order)
        tokens = tower(normalised(corpus.pixels[rows], words)).feature_maps[-1]
        patches = tokens[:, 1:]
        coverage = torch.from_numpy(corpus.coverage[rows]).float().div_(255).transpose(1, 2)
        states = torch.from_numpy(corpus.states[rows]).float().flatten(1)
        boxes = torch.from_numpy(corpus.boxes[rows])
        seen = F.binary_cross_entropy_with_logits(
            reader.patch(patches), coverage, pos_weight=weight
        )
        corners = reader.box(patches).unflatten(-1, (len(LABELS), 4))
        off = F.smooth_l1_loss(
            corners, boxes[:, None].expand_as(corners), reduction="none", beta=0.05
        ).sum(-1)
        share = coverage / coverage.sum().clamp_min(1)
        losses = (
            2 * seen,
            (off * share).sum(),
            _label_loss(reader.pooled(patches.mean(1)), states),
            _label_loss(reader.cls(tokens[:, 0]), states) * 0.3,
        )
        _step(optimiser, sum(losses[1:], losses[0]), parameters)
        sums += [float(loss.detach()) for loss in losses]
        if (step + 1) % 100 == 0:
            patch, box, pooled, cls = (sums / 100).round(4).tolist()
            sums[:] = 0
            curve.append(
                {"stage": "encoder", "step": step + 1, "patch": patch, "box": box}
                | {"pooled": pooled, "cls": cls}
            )
            log(f"encoder {curve[-1]}")
    return curve


def _label_loss(logits: Tensor, states: Tensor) -> Tensor:
    known = states >= 0
    return F.binary_cross_entropy_with_logits(logits[known], states[known])


@torch.no_grad()
def encoder_f1(
    tower: nn.Module, reader: Reader, words: Maira2Processor, choose: Any, n: int = 1000
) -> dict[str, float]:
    """F1 of the linear reading of the mean patch token on frontal films of new studies."""
    fresh = make_corpus(range(GATE_SEEDS, GATE_SEEDS + n), choose)
    frontal = [example.films[0] for example in fresh.examples]
    features = encode(tower, fresh.pixels[frontal], words).float()
    said = reader.pooled(features.mean(1))[:, : len(LABELS)] > 0
    true = torch.from_numpy(fresh.states[frontal, 0]) == 1
    hits = 2 * (said & true).sum(0) / (said.sum(0) + true.sum(0))
    return {
        label: round(float(f1), 4)
        for label, f1, count in zip(LABELS, hits, true.sum(0), strict=True)
        if count
    }


@torch.no_grad()
def encode(tower: nn.Module, pixels: np.ndarray, words: Maira2Processor) -> Tensor:
    """Layernormed patch tokens of films: float16 (films, patches, width)."""
    out = []
    for start in range(0, len(pixels), 256):
        tokens = tower(normalised(pixels[start : start + 256], words)).feature_maps[-1]
        out.append(tokens[:, 1:].half())
    return torch.cat(out)


def train_language(
    model: Any, corpus: Corpus, features: Tensor, config: PhantomTrainConfig, log: _Log
) -> list[dict[str, Any]]:
    """Stage two: the projector and the language model learn to write the reports."""
    core = model.model
    parameters = [
        *core.multi_modal_projector.parameters(),
        *core.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimiser = _adamw(parameters, config.lr, config.weight_decay)
    image = model.config.image_token_index
    batches = _batches(corpus.examples, config.batch, config.seed)
    curve: list[dict[str, Any]] = []
    recent: dict[str, list[float]] = {}
    for step in range(config.steps):
        _set_rate(optimiser, config.lr, step, config.steps)
        batch = next(batches)
        ids, learned = _padded(batch)
        embedded = core.language_model.embed_tokens(ids)
        films = features[[film for example in batch for film in example.films]].float()
        projected = core.multi_modal_projector(films)
        where = (ids == image)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(where, projected)
        # Padding is on the right, so causal attention needs no mask.
        hidden = core.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
        loss = F.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])
        _step(optimiser, loss, parameters)
        kind = f"{len(batch[0].films)} films"
        recent.setdefault(kind, []).append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            means = {kind: round(float(np.mean(recent[kind])), 4) for kind in sorted(recent)}
            recent.clear()
            curve.append({"stage": "language", "step": step + 1, **means})
            log(f"language {curve[-1]}")
    return curve


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded ids, and which of them are learned: both (batch, longest)."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
        learned[row, example.prompt : len(example.ids)] = True
    return ids, learned


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches of examples of about one length."""
    rng = np.random.default_rng([seed, 2])
    while True:
        order = rng.permutation(len(examples))
        pools = np.array_split(order, max(1, len(order) // (64 * size)))
        for pool in pools:
            by_length = sorted(pool, key=lambda i: (len(examples[i].ids), i))
            starts = range(0, len(by_length) - size + 1, size)
            for start in rng.permutation(np.array(starts)):
                yield [examples[i] for i in by_length[start : start + size]]


def _epochs(n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            yield np.sort(order[start : start + size])


def _adamw(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> Any:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def _set_rate(optimiser: Any, lr: float, step: int, steps: int) -> None:
    """Warm up over 100 steps (or a tenth), then one cosine down to 2%."""
    warm = min(1.0, (step + 1) / min(100, steps / 10))
    cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimiser.param_groups:
        group["lr"] = lr * warm * cosine


def _step(optimiser: Any, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
