"""What an edit has to beat: directions from labels, and directions and latents from chance.

All of them go where an :class:`~steering.edits.Edit` goes, in the same units: give a
:class:`~steering.edits.Push` or another ``Edit`` in its place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.files import ConfigError
from sae.model import MatryoshkaSAE
from steering.edits import Edit, Push


def _sides(
    x: Float[Tensor, "n d"], has: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "p d"], Float[Tensor, "q d"]]:
    if len(x) != len(has) or not bool(has.any()) or bool(has.all()):
        raise ConfigError(
            f"{len(x)} rows with {len(has)} labels, {int(has.sum())} of them positive; give one "
            "label a row, and rows of both kinds"
        )
    x = x.double()
    return x[has], x[~has]


def mean_difference(
    x: Float[Tensor, "n d"], has: Bool[Tensor, " n"], strength: float = 1.0
) -> Push:
    """From the mean of the rows without a concept to that of the rows with it (strength 1).

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> mean_difference(x, torch.tensor([False, True])).direction
    tensor([2., 0.])
    """
    with_it, without = _sides(x, has)
    difference = with_it.mean(0) - without.mean(0)
    return Push(difference.float(), strength, float(difference.norm()), "mean difference")


def probe_direction(
    x: Float[Tensor, "n d"],
    has: Bool[Tensor, " n"],
    strength: float = 1.0,
    l2: float = 1e-2,
    iterations: int = 50,
) -> Push:
    """The weights of a logistic probe; strength 1 moves the lower mean's logit to the higher's.

    Parameters
    ----------
    l2
        Penalty on the squared weights of features that are divided by their common scale; the two
        classes weigh the same.
    iterations
        Newton steps, at most.
    """
    _sides(x, has)
    x = x.double()
    centre, scale = x.mean(0), x.std().clamp_min(1e-12)
    features = torch.cat([(x - centre) / scale, torch.ones(len(x), 1).double()], dim=1)
    y = has.double()
    weight = torch.where(has, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    penalty = torch.full((features.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 1e-9  # the offset is free, but for what keeps the matrix regular
    w = torch.zeros(features.shape[1], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        logit = features @ w
        each = torch.nn.functional.binary_cross_entropy_with_logits(logit, y, reduction="none")
        return (weight * each).sum() + (penalty * w * w).sum() / 2

    for _ in range(iterations):
        p = torch.sigmoid(features @ w)
        gradient = features.T @ (weight * (p - y)) + penalty * w
        curvature = (features * (weight * p * (1 - p))[:, None]).T @ features
        step = torch.linalg.solve(curvature + torch.diag(penalty), gradient)
        size = 1.0
        while size > 1e-6 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
        if float(step.norm()) < 1e-8:
            break
    direction = w[:-1] / w[:-1].norm()
    with_it, without = _sides(x, has)
    apart = float((with_it.mean(0) - without.mean(0)) @ direction)
    if apart <= 0:
        raise ConfigError("the probe found nothing that tells the rows apart; give other rows")
    return Push(direction.float(), strength, apart, "probe")


def random_direction(sae: MatryoshkaSAE, edit: Edit | Push, seed: int = 0) -> Push:
    """A random direction as long as what ``edit`` adds: its target times its latent's direction.

    Raises
    ------
    ConfigError
        For scale and ablate, whose length depends on the activation; and if the length is 0.
    """
    if isinstance(edit, Push):
        length = abs(edit.strength * edit.reference)
    else:
        length = abs(edit.target) * float(sae.W_dec[edit.latent].detach().norm())
    if length == 0:
        raise ConfigError(
            f"'{edit}' adds no fixed length, so none can be matched; compare with matched_latent, "
            "or give an edit whose target is not 0"
        )
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(sae.config.d_model, generator=generator)
    return Push(direction, 1.0, length, f"random direction {seed}")


def matched_latent(
    latent: int, firing_rates: Float[Tensor, " F"], seed: int = 0, among: int = 20
) -> int:
    """A random other latent that fires about as often: one of those nearest in log rate.

    Give it the edit of the first, with its own reference.

    Parameters
    ----------
    firing_rates
        Share of tokens on which each latent fires, as :func:`sae.measure` gives them.
    among
        How many of the nearest latents the draw is from.

    >>> matched_latent(0, torch.tensor([0.1, 0.9, 0.1, 0.9]), among=1)
    2
    """
    rates = firing_rates.double().cpu()
    if not 0 <= latent < len(rates) or rates[latent] <= 0:
        raise ConfigError(f"latent {latent} of {len(rates)} never fires, so no other matches it")
    distance = (rates.clamp_min(1e-300).log() - rates[latent].log()).abs()
    distance[rates <= 0] = torch.inf
    distance[latent] = torch.inf
    near = distance.argsort(stable=True)[: min(among, int(distance.isfinite().sum()))]
    if not len(near):
        raise ConfigError(f"no latent but {latent} ever fires; there is nothing to compare with")
    generator = torch.Generator().manual_seed(seed)
    return int(near[torch.randint(len(near), (1,), generator=generator)])
