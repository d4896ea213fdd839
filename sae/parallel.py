"""One training step's mathematics on one process, or on the ranks of ``torch.distributed``.

Every variant computes the loss and the gradients of the *whole* batch under the *whole* dictionary,
so that a run does not depend on how many ranks it has, but for rounding:

:class:`Alone`
    one process
:class:`DataParallel`
    each rank has all latents and a share of the batch; gradients are added up
:class:`Sharded`
    each rank has every N-th latent and the whole batch; the groups' decoder sums are added up

BatchTopK takes the largest entries over all ranks: the number of entries above a candidate
threshold is added up, eight bits of the threshold at a time (:func:`kth_largest`), and no
activation travels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels import Above, BatchTopK, Code, Kernels, Nested, Selection, TopK, Weights


class Objective(NamedTuple):
    """What is optimised: everything but the data and the weights."""

    selection: Selection
    nested: Nested
    aux_weight: float
    aux_k: int
    """Dead latents a token may use in the auxiliary loss."""


class Work(NamedTuple):
    """Loss and gradients of one batch, of all ranks together."""

    losses: Float[Tensor, " G"]
    """Squared error per token and dimension of each prefix, weighted by token."""
    auxiliary: Float[Tensor, ""]
    fired: Bool[Tensor, " F"]
    """Latents of this rank that are active somewhere in the batch."""
    active: int
    """Active entries."""
    least: float
    """The smallest activation kept."""
    error: float
    """Squared error of the whole dictionary, summed."""
    gradients: Weights
    """Of this rank's latents."""


class Alone:
    """One process; see the module docstring."""

    rank, world = 0, 1
    add_up: Callable[[Tensor], Tensor] | None = None
    """Adds a number over ranks that have different latents."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def rows(self, n: int) -> slice:
        """This rank's share of a batch of ``n`` rows."""
        return slice(0, n)

    def latents(self) -> slice:
        """This rank's latents."""
        return slice(None)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor ``[F, …]`` of all latents from every rank's own rows."""
        return tensor

    def work(
        self,
        weights: Weights,
        x: Float[Tensor, "B D"],
        objective: Objective,
        dead: Bool[Tensor, " F"],
        token_weights: Float[Tensor, " B"] | None,
        out: Weights,
    ) -> Work:
        """Loss, and gradients written over ``out``."""
        kernels, nested = self.kernels, objective.nested
        code = kernels.encode(weights, x, objective.selection)
        decoded = kernels.decode(weights, code, x, nested, token_weights)
        kernels.backward(weights, code, x, decoded, nested, token_weights, out=out)
        auxiliary = self._auxiliary(weights, code, x, objective, dead, out)
        return Work(
            losses=decoded.losses,
            auxiliary=auxiliary,
            fired=code.firings() > 0,
            active=code.col.numel(),
            least=code.least,
            error=float(decoded.residual.square().sum()),
            gradients=out,
        )

    def _auxiliary(
        self,
        weights: Weights,
        code: Code,
        x: Tensor,
        objective: Objective,
        dead: Tensor,
        out: Weights,
    ) -> Tensor:
        """Each prefix's residual, explained by the dead latents of its own last group."""
        total = x.new_zeros(())
        if objective.aux_weight == 0 or not self._any_dead(dead):
            return total
        nested = objective.nested
        residual = x - weights.b_dec
        contributions = self._contributions(weights, code, nested)
        spans = self._spans(nested)
        for (low, high), weight, own in zip(spans, nested.weights, contributions, strict=True):
            residual = residual - own
            candidates = low + dead[low:high].nonzero().squeeze(1)
            scale = weight * objective.aux_weight
            total = total + weight * self._revive(
                weights, x, residual, candidates, objective.aux_k, scale, out
            )
        return total

    def _any_dead(self, dead: Tensor) -> bool:
        return bool(dead.any())

    def _spans(self, nested: Nested) -> list[tuple[int, int]]:
        """Each group's first and last + 1 latent, in this rank's numbering."""
        return nested.spans()

    def _contributions(self, weights: Weights, code: Code, nested: Nested) -> Tensor:
        return self.kernels.contributions(weights, code, nested)

    def _revive(
        self,
        weights: Weights,
        x: Tensor,
        residual: Tensor,
        candidates: Tensor,
        k: int,
        scale: float,
        out: Weights,
    ) -> Tensor:
        return self.kernels.auxiliary(weights, x, residual, candidates, k, scale, out)


class _Ranks(Alone):
    """What both parallel variants share."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def _encode(self, weights: Weights, x: Tensor, selection: BatchTopK, count: int) -> Code:
        """The ``count`` largest entries of all ranks' pre-activations, those on this rank."""
        code = self.kernels.encode(weights, x, Above(selection.floor))
        if _added(torch.tensor(float(code.val.numel()), device=x.device)) < count:
            code = self.kernels.encode(weights, x, Above(0.0))
        return code.at_least(kth_largest(code.val, count))


class DataParallel(_Ranks):
    """Each rank has all latents and a share of the batch; see the module docstring."""

    def rows(self, n: int) -> slice:
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def work(
        self,
        weights: Weights,
        x: Float[Tensor, "B D"],
        objective: Objective,
        dead: Bool[Tensor, " F"],
        token_weights: Float[Tensor, " B"] | None,
        out: Weights,
    ) -> Work:
        kernels, nested, selection = self.kernels, objective.nested, objective.selection
        rows = int(_added(torch.tensor(float(len(x)), device=x.device)))
        if isinstance(selection, BatchTopK):
            code = self._encode(weights, x, selection, selection.count(rows))
        else:
            code = kernels.encode(weights, x, selection)
        decoded = kernels.decode(weights, code, x, nested, token_weights)
        kernels.backward(weights, code, x, decoded, nested, token_weights, out=out)
        share = len(x) / rows
        for gradient in out:
            gradient.mul_(share)
        auxiliary = self._auxiliary(weights, code, x, objective, dead, out)
        for gradient in out:
            dist.all_reduce(gradient)
        fired = (code.firings() > 0).to(torch.int32)
        dist.all_reduce(fired)
        sums = x.new_tensor([code.col.numel(), float(decoded.residual.square().sum())]).double()
        active, error = _added(sums).tolist()
        least = torch.tensor(code.least or float("inf"), dtype=torch.float64, device=x.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return Work(
            losses=_added(decoded.losses * share),
            auxiliary=auxiliary,
            fired=fired > 0,
            active=int(active),
            least=float(least) if least.isfinite() else 0.0,
            error=error,
            gradients=out,
        )

    def _revive(
        self,
        weights: Weights,
        x: Tensor,
        residual: Tensor,
        candidates: Tensor,
        k: int,
        scale: float,
        out: Weights,
    ) -> Tensor:
        rows = _added(torch.tensor(float(len(x)), device=x.device))
        mean = _added(residual.sum(dim=0)) / rows
        spread = _added((residual - mean).square().sum())
        own = (residual - residual.mean(dim=0)).square().sum()
        if float(spread) == 0 or float(own) == 0:
            return _added(x.new_zeros(()))
        share = float(own / spread)  # the kernel divides by this rank's spread, not by all ranks'
        loss = self.kernels.auxiliary(weights, x, residual, candidates, k, scale * share, out)
        return _added(loss * share)


class Sharded(_Ranks):
    """Each rank has every N-th latent and the whole batch; see the module docstring."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.add_up = _added

    def latents(self) -> slice:
        return slice(self.rank, None, self.world)

    def whole(self, tensor: Tensor) -> Tensor:
        n = int(_added(torch.tensor(float(len(tensor)), device=tensor.device)))
        full = tensor.new_zeros(n, *tensor.shape[1:])
        full[self.latents()] = tensor
        dist.all_reduce(full)
        return full

    def work(
        self,
        weights: Weights,
        x: Float[Tensor, "B D"],
        objective: Objective,
        dead: Bool[Tensor, " F"],
        token_weights: Float[Tensor, " B"] | None,
        out: Weights,
    ) -> Work:
        nested, selection = objective.nested, objective.selection
        if isinstance(selection, BatchTopK):
            code = self._encode(weights, x, selection, selection.count(len(x)))
        elif isinstance(selection, TopK):
            code = self._topk(weights, x, selection)
        else:
            code = self.kernels.encode(weights, x, selection)
        residuals = self._contributions(weights, code, nested).cumsum(dim=0) + (weights.b_dec - x)
        each = x.new_ones(len(x), 1) if token_weights is None else token_weights[:, None]
        losses = (residuals.square() * each).sum(dim=(1, 2)) / x.numel()
        weighted = residuals * x.new_tensor(nested.weights)[:, None, None]
        S = weighted.flip(0).cumsum(dim=0).flip(0) * (2 / x.numel() * each)
        error = float(residuals[-1].square().sum())
        here, groups = self._here(nested)
        self.kernels.gradients(weights, code, x, S[groups], here, out)
        # b_dec's gradient: what comes through this rank's encoder, added up, and the rest once.
        out.b_dec.sub_(S[groups[0]].sum(dim=0))
        auxiliary = self._auxiliary(weights, code, x, objective, dead, out)
        dist.all_reduce(out.b_dec)
        out.b_dec.add_(S[0].sum(dim=0))
        active = _added(torch.tensor(float(code.col.numel()), device=x.device))
        least = torch.tensor(code.least or float("inf"), dtype=torch.float64, device=x.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return Work(
            losses=losses,
            auxiliary=auxiliary,
            fired=code.firings() > 0,
            active=int(active),
            least=float(least) if least.isfinite() else 0.0,
            error=error,
            gradients=out,
        )

    def _spans(self, nested: Nested) -> list[tuple[int, int]]:
        ends = [(m - self.rank + self.world - 1) // self.world for m in nested.prefixes]
        return list(zip((0, *ends[:-1]), ends, strict=True))

    def _here(self, nested: Nested) -> tuple[Nested, list[int]]:
        """The groups that have latents on this rank, and which of all groups they are."""
        spans = self._spans(nested)
        groups = [g for g, (low, high) in enumerate(spans) if high > low]
        ends, weights = zip(*((spans[g][1], nested.weights[g]) for g in groups), strict=True)
        return Nested(ends, weights), groups

    def _topk(self, weights: Weights, x: Tensor, selection: TopK) -> Code:
        code = self.kernels.encode(weights, x, selection)
        row = code.row()
        place = torch.arange(code.col.numel(), device=x.device) - code.row_ptr[row]
        width = max(selection.k, int(code.row_ptr.diff().max()))
        values = x.new_zeros(len(x), width)
        values[row, place] = code.val
        values = values.topk(selection.k, dim=1).values
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values)
        least = torch.cat(gathered, dim=1).topk(selection.k, dim=1).values[:, -1]
        return code.at_least(least)

    def _any_dead(self, dead: Tensor) -> bool:
        return float(_added(dead.sum().double())) > 0

    def _contributions(self, weights: Weights, code: Code, nested: Nested) -> Tensor:
        here, groups = self._here(nested)
        every = weights.b_dec.new_zeros(len(nested.prefixes), code.shape[0], len(weights.b_dec))
        every[groups] = self.kernels.contributions(weights, code, here)
        dist.all_reduce(every)
        return every

    def _revive(
        self,
        weights: Weights,
        x: Tensor,
        residual: Tensor,
        candidates: Tensor,
        k: int,
        scale: float,
        out: Weights,
    ) -> Tensor:
        """The auxiliary loss where a token's strongest dead latents lie on several ranks."""
        spread = (residual - residual.mean(dim=0)).square().sum()
        n = int(_added(torch.tensor(float(len(candidates)), device=x.device)))
        if n == 0 or float(spread) == 0:
            return x.new_zeros(())
        k = min(k, n)
        W_enc, W_dec = weights.W_enc[candidates], weights.W_dec[candidates]
        centred = x - weights.b_dec
        pre = torch.relu(centred @ W_enc.T + weights.b_enc[candidates])
        values = torch.cat([pre, pre.new_zeros(len(x), k)], dim=1).topk(k, dim=1).values
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values)
        least = torch.cat(gathered, dim=1).topk(k, dim=1).values[:, -1:]
        z = pre * (pre >= least)
        explained = z @ W_dec
        dist.all_reduce(explained)
        error = explained - residual
        step = 2 * scale / spread * error
        d = (step @ W_dec.T) * (z > 0)
        d_bias = d.sum(dim=0)
        out.W_dec.index_add_(0, candidates, z.T @ step)
        out.W_enc.index_add_(0, candidates, d.T @ centred)
        out.b_enc.index_add_(0, candidates, d_bias)
        out.b_dec.sub_(d_bias @ W_enc)
        return error.square().sum() / spread


def kth_largest(values: Float[Tensor, " n"], count: int) -> float:
    """The ``count``-th largest of all ranks' positive ``values``; 0 if there are fewer.

    Positive floating-point numbers are ordered as their bits are. So the answer is found eight bits
    at a time, from the top: ranks add up how many of their values that share the bits found so far
    have each of the 256 next ones.
    """
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]
    bits = values.view(integer).long()
    found, left = 0, count
    for shift in range(8 * values.element_size() - 8, -8, -8):
        counts = _added(torch.bincount((bits >> shift) & 255, minlength=256))
        at_least = counts.flip(0).cumsum(0).flip(0)
        if int(at_least[0]) < left:
            return 0.0
        byte = int((at_least >= left).nonzero().max())
        left -= int(at_least[byte] - counts[byte])
        bits = bits[((bits >> shift) & 255) == byte]
        found = (found << 8) | byte
    return float(torch.tensor(found).to(integer).view(values.dtype))


def _added(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors."""
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor
