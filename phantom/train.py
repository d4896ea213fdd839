"""Train the mini model from a seed: the encoder on masks and labels, then the language side.

    python -m phantom.train --out phantom/weights

Only the encoder ever sees a label. The projector and the language model follow with the encoder
frozen, as in MAIRA-2 (arXiv 2406.04449), and learn from the words of the reports alone: what a
probe or a dictionary finds there was put there by reading films.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hooks.files import versions, write_json
from phantom import encoder
from phantom.corpus import Choose, Example, easy, make_corpus, mixed, normalised
from phantom.encoder import EncoderConfig, Reader, adamw, set_rate, take_step
from phantom.factors import PhantomError
from phantom.model import build, processor

TRAINING_SEEDS = 2**62
"""Seeds of training studies start here, far from those of any evaluation."""
GATE_SEEDS = 2**61
"""Seeds of the studies on which the encoder is judged before the language side starts."""
LOSSES = {
    "encoder": list(encoder.LOSSES),
    "language": [
        "next-token cross-entropy of report tokens (multi_modal_projector, language_model, lm_head)"
    ],
}
"""Every loss there is, by stage, with the parts that it trains."""


@dataclass(frozen=True)
class Pass:
    """One cosine of stage two."""

    steps: int
    lr: float


@dataclass(frozen=True)
class PhantomTrainConfig:
    """Sizes of one training run."""

    n_studies: int = 40_000
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    gate: float = 0.85
    """F1 that the encoder's patches must reach on every finding (`encoder.encoder_f1`)."""
    language: Pass = field(default_factory=lambda: Pass(steps=8_000, lr=1.3e-3))
    boxes: Pass = field(default_factory=lambda: Pass(steps=1_000, lr=6e-4))
    """A second pass over grounded studies and half as many others: places take longest to learn."""
    batch: int = 8
    weight_decay: float = 0.02
    seed: int = 0


QUICK = PhantomTrainConfig(
    n_studies=2_000,
    encoder=EncoderConfig(steps=550),
    gate=0.0,
    language=Pass(steps=400, lr=1.3e-3),
    boxes=Pass(steps=0, lr=0.0),
)
"""Two minutes, enough for the studies of `easy`."""
QUICK_FLOOR = 0.8
"""F1 in reports that it reaches, at least, for each finding of `easy`."""


def train(config: PhantomTrainConfig, out: Path, choose: Choose = mixed) -> dict[str, Any]:
    """Train, and write the checkpoint and `training.json` into `out`; returns that record.

    Raises:
        PhantomError: the encoder fails its gate, which no language training would mend.
    """
    began = time.perf_counter()

    def log(what: object) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", flush=True)  # noqa: T201

    seeds = range(TRAINING_SEEDS, TRAINING_SEEDS + config.n_studies)
    corpus = make_corpus(seeds, choose)
    log(f"{config.n_studies} studies, {len(corpus.pixels)} films drawn")
    model, words = build(config.seed), processor()
    tower = model.model.vision_tower
    reader = Reader(tower.config.hidden_size)
    encoder.initialise(tower, normalised(corpus.pixels[:1500], words))
    curve = encoder.train_encoder(tower, reader, corpus, words, config.encoder, log)
    fresh = make_corpus(range(GATE_SEEDS, GATE_SEEDS + 1000), choose)
    gate = encoder.encoder_f1(tower, reader, fresh, words)
    log(f"encoder F1 {gate}")
    failed = {label: f1 for label, f1 in gate.items() if f1 < config.gate}
    if failed:
        raise PhantomError(
            f"the encoder reads {failed} below F1 {config.gate}; train it longer "
            "(EncoderConfig.steps) before the language side"
        )
    features = encoder.encode(tower, corpus.pixels, words)
    log("films encoded")
    every = corpus.examples
    grounded = [example for example in every if example.grounded]
    others = [example for example in every if not example.grounded][: len(grounded) // 2]
    curve += train_language(model, every, features, config.language, config, log)
    curve += train_language(model, grounded + others, features, config.boxes, config, log)
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


def train_language(
    model: Any,
    examples: Sequence[Example],
    features: Tensor,
    cosine: Pass,
    config: PhantomTrainConfig,
    log: Callable[[object], None],
) -> list[dict[str, Any]]:
    """Stage two: the projector and the language model learn to write the reports.

    Args:
        model: the mini model, its encoder trained.
        examples: prompts with reports.
        features: what the encoder makes of every film, (films, patches, width).
        cosine: how many steps, and the highest learning rate.
        config: everything else.
        log: where the curve is told.

    Returns:
        Mean losses of every hundred steps, by number of films.
    """
    core = model.model
    parameters = [
        *core.multi_modal_projector.parameters(),
        *core.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimiser = adamw(parameters, config.weight_decay)
    batches = _batches(examples, config.batch, config.seed)
    curve: list[dict[str, Any]] = []
    recent: dict[str, list[float]] = {}
    for step in range(cosine.steps):
        set_rate(optimiser, cosine.lr, step, cosine.steps)
        batch = next(batches)
        ids, learned = _padded(batch)
        embedded = core.language_model.embed_tokens(ids)
        films = features[[film for example in batch for film in example.films]].float()
        where = (ids == model.config.image_token_index)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(where, core.multi_modal_projector(films))
        # Padding is on the right, so causal attention needs no mask.
        hidden = core.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
        loss = F.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])
        take_step(optimiser, loss, parameters)
        recent.setdefault(f"{len(batch[0].films)} films", []).append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            means = {kind: round(float(np.mean(recent[kind])), 4) for kind in sorted(recent)}
            recent.clear()
            curve.append({"stage": "language", "step": step + 1, **means})
            log(curve[-1])
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
        for pool in np.array_split(order, max(1, len(order) // (64 * size))):
            by_length = sorted(pool, key=lambda i: (len(examples[i].ids), i))
            starts = np.arange(0, len(by_length) - size + 1, size)
            for start in rng.permutation(starts):
                yield [examples[i] for i in by_length[start : start + size]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m phantom.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--quick", action="store_true", help="two minutes, three easy findings")
    given = parser.parse_args(arguments)
    if given.quick:
        train(QUICK, given.out, easy)
    else:
        train(PhantomTrainConfig(), given.out)


if __name__ == "__main__":
    main()
