"""What a few latents together know of a factor: k-sparse probes (Gurnee et al. 2023,
arXiv 2305.01610), and from them how many latents a dictionary splits a factor into.

Letters: n rows, F latents, L factors, k latents of a probe.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hooks.files import ConfigError
from sae.latent_scores import Sides, auroc, best_threshold, f1, split
from sae.latents import Latents

MARGIN = 0.03
"""By how much one more latent must raise the F1 to count as a part of a split factor; the value
of Chanin et al. 2024 (arXiv 2409.14507)."""
_RIDGE = 1e-3  # on standardised weights, beside the mean loss: finite where classes separate
_STEPS = 50


class ProbeScore(NamedTuple):
    """A logistic regression on k latents as the sign of one factor."""

    latents: tuple[int, ...]
    """In the order in which they were chosen."""
    weights: tuple[float, ...]
    """On the activations as they are."""
    bias: float
    auroc: float
    """On held-out rows."""
    f1: float
    """On held-out rows, at the threshold of best F1 on training rows."""
    n: int
    """Held-out rows."""
    n_positive: int
    """Held-out rows that carry the factor."""


def sparse_probes(
    latents: Tensor | Latents,
    truth: Bool[Tensor, "n L"],
    heldout: Bool[Tensor, " n"],
    ks: Sequence[int] = (1, 2, 5),
) -> list[dict[int, ProbeScore]]:
    """Logistic regressions on k latents, fitted on training rows and measured on held-out ones.

    Latents are chosen one after another on training rows: the next is the one whose activations
    correlate most, in absolute value, with what the regression on those before it leaves over
    (truth minus its probability). For k = 1 that is the latent of greatest mean difference in
    units of its standard deviation, the choice of Gurnee et al. and of SAEBench but for the unit;
    for more, it does not spend its latents on copies of the first.

    Args:
        latents: activations [n, F].
        truth: which rows carry which factor.
        heldout: which rows are held out; no patient on both sides.
        ks: numbers of latents.

    Returns:
        For each factor, in the order of the columns of `truth`, its probe by k. A dictionary with
        fewer than k latents that vary gives as many as it has.

    Raises:
        ConfigError: the numbers of rows differ, a factor has one class on a side, or a k is
            below 1.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"probes of {tuple(ks)} latents asked for; use at least 1")
    sides = split(latents, truth, heldout)
    found = []
    for factor in range(truth.shape[1]):
        probes: dict[int, ProbeScore] = {}
        for k, probe in enumerate(_grow(sides, factor), start=1):
            probes |= {asked: probe for asked in ks if asked >= k}
            if k == max(ks):
                break
        found.append({k: probes[k] for k in ks})
    return found


class Splitting(NamedTuple):
    """Into how many latents a dictionary splits a factor."""

    n_latents: int
    latents: tuple[int, ...]
    f1s: tuple[float, ...]
    """F1 of the probes on 1, 2, … latents; the last, if there is one more, adds too little."""


def splitting(
    latents: Tensor | Latents,
    factor: Bool[Tensor, " n"],
    heldout: Bool[Tensor, " n"],
    margin: float = MARGIN,
    most: int = 10,
) -> Splitting:
    """The number of latents from which one more raises the held-out F1 by less than a margin.

    After section 4 of Chanin et al. 2024 (arXiv 2409.14507), with the probes of `sparse_probes`.
    A factor of which nothing is known (F1 at chance) counts as one latent: look at `f1s[0]`.

    Args:
        latents: activations [n, F].
        factor: which rows carry it.
        heldout: which rows are held out.
        margin: in F1.
        most: latents to try at most.

    Raises:
        ConfigError: as `sparse_probes`.
    """
    if most < 1:
        raise ConfigError(f"at most {most} latents asked for; use at least 1")
    sides = split(latents, factor[:, None], heldout)
    chosen: tuple[int, ...] = ()
    scores: list[float] = []
    for probe in _grow(sides, 0):
        scores.append(probe.f1)
        if len(scores) > 1 and scores[-1] - scores[-2] < margin:
            break
        chosen = probe.latents
        if len(chosen) == most:
            break
    return Splitting(len(chosen), chosen, tuple(scores))


def _grow(sides: Sides, factor: int) -> Iterator[ProbeScore]:
    """Probes on one latent, on two, and so on while any latent left varies; at least one."""
    truth, test_truth = sides.train_truth[:, factor].double(), sides.test_truth[:, factor]
    train, n = sides.train, len(truth)
    row, values = train.rows.long(), train.values.double()
    mean = train.sums(values) / n
    variance = train.sums(values.square()) / n - mean.square()
    # Below this, rounding is all that a constant latent's variance consists of.
    varies = variance > 1e-9 * mean.square()
    spread = variance.clamp_min(0).sqrt()
    residual = truth - truth.mean()
    chosen: list[int] = []
    while not chosen or len(chosen) < int(varies.sum()):
        fit = train.sums(values * residual[row]) / n - mean * residual.mean()
        score = torch.where(varies, (fit / spread).abs(), -1.0)
        score.index_fill_(0, torch.tensor(chosen, dtype=torch.long), -2.0)
        chosen.append(int(score.argmax()))
        x = train.dense(chosen).double()
        weights, bias = _fit(x, truth)
        residual = truth - torch.sigmoid(x @ weights + bias)
        logits = sides.test.dense(chosen).double() @ weights + bias
        threshold = best_threshold(x @ weights + bias, sides.train_truth[:, factor])
        yield ProbeScore(
            latents=tuple(chosen),
            weights=tuple(weights.tolist()),
            bias=float(bias),
            auroc=float(auroc(logits[:, None], test_truth)[0]),
            f1=f1(logits >= threshold, test_truth),
            n=len(test_truth),
            n_positive=int(test_truth.sum()),
        )


def _fit(x: Float[Tensor, "n k"], truth: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Weights and bias of least mean cross-entropy, with a ridge on standardised weights."""
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    z = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    ridge = torch.full((z.shape[1],), _RIDGE, dtype=x.dtype)
    ridge[-1] = 0

    def loss(w: Tensor) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(z @ w, truth)
        return fit + (ridge * w.square()).sum() / 2

    w = torch.zeros(z.shape[1], dtype=x.dtype)
    w[-1] = torch.logit(truth.mean())
    now = loss(w)
    for _ in range(_STEPS):
        p = torch.sigmoid(z @ w)
        slope = z.T @ (p - truth) / len(z) + ridge * w
        curve = (z.T * (p * (1 - p))) @ z / len(z) + torch.diag(ridge + 1e-12)
        step = torch.linalg.solve(curve, slope)
        length = 1.0
        while (after := loss(w - length * step)) > now and length > 1e-6:
            length /= 2  # Newton's step may overshoot; the loss is convex, so a shorter one helps
        if not after < now:
            break
        w, now, gain = w - length * step, after, now - after
        if gain < 1e-12:
            break
    weights = w[:-1] / spread
    return weights, w[-1] - weights @ mean
