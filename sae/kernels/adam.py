"""Adam for a dictionary whose decoder rows have unit length, in few passes over memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hooks.files import ConfigError
from sae.kernels.interface import Weights

BLOCK = 2**20
"""Elements updated at once, so that a row is still in the cache from one pass to the next."""


class DictionaryAdam:
    """Adam (arXiv 1412.6980) on the sphere of unit decoder rows.

    One update is exactly: remove from each decoder row's gradient its part along the row; scale all
    gradients so that their joint norm is at most ``clip`` (as ``torch.nn.utils.clip_grad_norm_``);
    ``torch.optim.Adam``; scale every decoder row to unit length. Where torch makes a pass over
    memory for each, here a block of rows goes through all of them while it is in the cache.

    Parameters
    ----------
    weights
        Updated in place.
    """

    def __init__(
        self, weights: Weights, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.weights, self.betas, self.eps = weights, betas, eps
        self.exp_avg, self.exp_avg_sq = weights.zeros(), weights.zeros()
        self.steps = 0

    @torch.no_grad()
    def update(self, gradients: Weights, lr: float, clip: float | None = None) -> None:
        """One step. ``gradients`` are overwritten by what Adam was given."""
        scale = None
        if clip is not None:
            norms = [
                part.norm()
                for i, rows in self._blocks()
                for part in [self._project(gradients, i, rows)]
            ]
            scale = (clip / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
        for i, rows in self._blocks():
            if scale is None:
                gradient = self._project(gradients, i, rows)
            else:
                gradient = gradients[i][rows].mul_(scale)
            weight = self.weights[i][rows]
            self._adam(weight, gradient, self.exp_avg[i][rows], self.exp_avg_sq[i][rows], lr)
            if i == Weights._fields.index("W_dec"):
                weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name; tensors are shared, not copied."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        named = {
            f"{kind}.{name}": tensor
            for kind, weights in moments.items()
            for name, tensor in weights._asdict().items()
        }
        return named | {"steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in a state that :meth:`tensors` gave; other names in ``tensors`` are left alone.

        Raises
        ------
        ConfigError
            If a tensor is missing or has another shape.
        """
        for name, mine in self.tensors().items():
            found = tensors.get(name)
            if found is None or found.shape != mine.shape:
                there = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ConfigError(
                    f"the optimizer's {name} should have shape {tuple(mine.shape)}, found {there}; "
                    "restore from a checkpoint of the same dictionary"
                )
            mine.copy_(found)
        self.steps = int(tensors["steps"])

    def _blocks(self) -> list[tuple[int, slice]]:
        """Index of a tensor and rows of it, over all of them."""
        blocks = []
        for i, tensor in enumerate(self.weights):
            step = max(1, BLOCK // (tensor.shape[1] if tensor.ndim > 1 else 1))
            blocks += [(i, slice(a, a + step)) for a in range(0, len(tensor), step)]
        return blocks

    def _project(self, gradients: Weights, i: int, rows: slice) -> Tensor:
        gradient = gradients[i][rows]
        if i == Weights._fields.index("W_dec"):
            weight = self.weights[i][rows]
            along = torch.linalg.vecdot(gradient, weight)
            gradient.addcmul_(along[:, None], weight, value=-1)
        return gradient

    def _adam(self, weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
        torch._fused_adam_(
            [weight],
            [gradient],
            [m],
            [v],
            [],
            [torch.tensor(self.steps + 1.0, device=weight.device)],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
