"""What a linear probe reads from the stream itself: the ceiling beside single latents.

Letters: n rows, d width, L factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hooks.files import ConfigError
from sae.latent_scores import auroc

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_STEPS = 200


class DenseProbe(NamedTuple):
    """A logistic regression on all of a stream's coordinates."""

    scores: Float[Tensor, " m"]
    """Logits of the held-out rows."""
    ridge: float
    """Chosen on the training rows alone."""
    auroc: float
    """On held-out rows."""


def dense_probe(
    x: Float[Tensor, "n d"],
    truth: Bool[Tensor, " n"],
    heldout: Bool[Tensor, " n"],
    inner: Bool[Tensor, " n"],
    ridges: Sequence[float] = RIDGES,
) -> DenseProbe:
    """Fit on training rows, with the ridge that does best on the ``inner`` ones among them.

    Coordinates are standardised by the rows a regression is fitted on.

    Args:
        x: one row a study.
        truth: which rows carry the factor.
        heldout: rows that are only scored.
        inner: training rows on which ridges are compared; no patient of the others.
        ridges: weights of the squared norm beside the mean loss.

    Raises:
        ConfigError: a side has one class only, or ``inner`` and ``heldout`` overlap.
    """
    if bool((inner & heldout).any()):
        raise ConfigError(
            f"{int((inner & heldout).sum())} rows are inner and held out; give inner rows of the "
            "training side"
        )
    for name, side in (("fitting", ~heldout & ~inner), ("inner", inner), ("held-out", heldout)):
        found = int(truth[side].sum())
        if found in (0, int(side.sum())):
            raise ConfigError(
                f"{found} of {int(side.sum())} {name} rows carry the factor; give more studies"
            )
    fitting = ~heldout & ~inner

    def gain(ridge: float) -> float:
        scores = _logits(x[fitting], truth[fitting], x[inner], ridge)
        return float(auroc(scores[:, None], truth[inner])[0])

    ridge = max(ridges, key=gain)
    scores = _logits(x[~heldout], truth[~heldout], x[heldout], ridge)
    return DenseProbe(scores, ridge, float(auroc(scores[:, None], truth[heldout])[0]))


def _logits(x: Tensor, truth: Tensor, asked: Tensor, ridge: float) -> Tensor:
    """Logits of ``asked`` by the regression of least penalised loss on ``x``."""
    mean, spread = x.double().mean(0), x.double().std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    z, wanted = (x.double() - mean) / spread, truth.double()
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        fit = F.binary_cross_entropy_with_logits(z @ w[:-1] + w[-1], wanted)
        value = fit + ridge * w[:-1].square().sum() / 2
        value.backward()
        return value

    descent.step(loss)
    w = w.detach()
    return ((asked.double() - mean) / spread) @ w[:-1] + w[-1]
