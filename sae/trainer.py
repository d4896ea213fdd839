"""One dictionary in training: what decides a run, and what one step does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from hooks.files import ConfigError, nearest
from hooks.roles import Role
from hooks.store import Moments
from sae.kernels import BatchTopK, DictionaryAdam, Nested, Selection, TopK, Weights, select
from sae.model import FRACTIONS, MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.parallel import Alone, DataParallel, Objective, Sharded

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FLOOR = 0.9
"""Candidates for BatchTopK are looked for above this share of the last batch's smallest entry."""
SAMPLED_AT = 256
"""Sampled prefixes end at multiples of ``F / 256``."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, given its activations."""

    site: str
    """Site of the activations to train on."""
    expansion: int = 8
    """Dictionary size over activation width."""
    k: int = 32
    """Mean active latents per token."""
    activation: Literal["batch_topk", "topk"] = "batch_topk"
    """What training keeps: the batch's ``batch · k`` largest entries, or each token's ``k``."""
    group_fractions: tuple[float, ...] = FRACTIONS
    """Share of the dictionary in each nested group, innermost first; ``(1.0,)``: no nesting."""
    group_sizes: tuple[int, ...] = ()
    """Latents in each group, instead of ``group_fractions``."""
    group_weights: tuple[float, ...] = ()
    """Weight of each prefix's loss, scaled to sum 1; empty means equal."""
    sampled_prefixes: int = 0
    """Draw so many prefixes anew each step, small ones more often (density 1/m), instead of the
    groups'; 0 means the groups."""
    k_start: int | None = None
    """Active latents per token at the first step; falls (or rises) linearly to ``k``."""
    k_anneal_steps: int = 0
    """Steps over which it does."""
    steps: int = 10_000
    batch: int = 4096
    """Tokens a step, of all ranks together."""
    lr: float | None = None
    """Adam's learning rate; ``None`` means 2e-4 / sqrt(F / 2^14)."""
    warmup_steps: int = 1000
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    clip: float | None = 1.0
    """Largest gradient norm; ``None`` leaves gradients as they are."""
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    """Dead latents a token may use in each group's auxiliary loss; ``None`` means d / 2."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for this many tokens."""
    role_weights: Mapping[str, float] = field(default_factory=dict)
    """Weight in the loss of tokens of a role (``image``, ``report`` …); 1 where none is given."""
    max_norm: float | None = None
    """Leave out rows whose norm exceeds this many root-mean-square norms: attention sinks."""
    threshold_start: int = 1000
    """Step from which the inference threshold follows the smallest active latent."""
    threshold_beta: float = 0.999
    """Its moving average."""
    calibration_rows: int = 0
    """Training rows (in whole batches, in memory) on which the threshold is set, in the end, so
    that L0 is ``k``; 0 keeps the average."""
    heldout: float = 0.2
    """Share of patients kept out of training."""
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights, moments and arithmetic."""
    kernels: Literal["reference", "cpu", "triton"] | None = None
    """Implementation of a step; ``None`` means the fastest one for the device."""
    shard_latents: bool = False
    """Under ``torchrun``: split the dictionary over the ranks instead of the batch."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    measure_every: int = 500
    """Steps between measurements on held-out rows."""
    measure_rows: int = 8192
    """Held-out rows in such a measurement."""

    def __post_init__(self) -> None:
        n_groups = len(self.group_sizes or self.group_fractions)
        if self.group_weights and len(self.group_weights) != n_groups:
            raise ConfigError(
                f"{len(self.group_weights)} group_weights for {n_groups} groups; "
                "give one a group, or none for equal weights"
            )
        if self.group_weights and self.sampled_prefixes:
            raise ConfigError(
                "group_weights are given and prefixes are sampled; sampled prefixes weigh the "
                "same, leave one of the two out"
            )
        positive = (
            *("expansion", "k", "steps", "batch", "checkpoint_every", "keep_checkpoints"),
            *("measure_every", "measure_rows"),
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("sampled_prefixes", "k_anneal_steps", "calibration_rows"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}; it must lie between 0 and 1")
        roles = [role.name.lower() for role in Role]
        for role in self.role_weights:
            if role not in roles:
                raise ConfigError(
                    f"role_weights names {role!r}{nearest(role, roles)}; roles are {roles}"
                )
        choices = {
            "activation": ("batch_topk", "topk"),
            "dtype": tuple(DTYPES),
            "kernels": (None, "reference", "cpu", "triton"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = [one for one in known if one is not None]
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {names}")

    @property
    def weights(self) -> tuple[float, ...]:
        """Loss weights of the groups' prefixes, of sum 1."""
        n_groups = len(self.group_sizes or self.group_fractions)
        weights = self.group_weights or (1.0,) * n_groups
        return tuple(weight / sum(weights) for weight in weights)

    def sizes(self, n_latents: int) -> tuple[int, ...]:
        """Latents in each group of a dictionary of ``n_latents``."""
        return self.group_sizes or group_sizes_of(n_latents, self.group_fractions)

    def lr_at(self, step: int, n_latents: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to zero."""
        peak = self.lr if self.lr is not None else 2e-4 / (n_latents / 2**14) ** 0.5
        decay_steps = max(1, int(self.decay_fraction * self.steps))
        rising = (step + 1) / max(1, self.warmup_steps)
        falling = (self.steps - step) / decay_steps
        return peak * min(1.0, rising, falling)

    def k_at(self, step: int) -> int:
        """Active latents per token of a step.

        >>> config = TrainConfig("", k=32, k_start=64, k_anneal_steps=100)
        >>> [config.k_at(step) for step in (0, 50, 100, 1000)]
        [64, 48, 32, 32]
        """
        if self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps)

    def nested_at(self, step: int, prefixes: tuple[int, ...]) -> Nested:
        """Prefixes of a step and their weights; ``prefixes`` are the groups'."""
        if not self.sampled_prefixes:
            return Nested(prefixes, self.weights)
        n_latents = prefixes[-1]
        rng = np.random.default_rng([self.seed, 1, step])
        unit = max(1, n_latents // SAMPLED_AT)
        ends = unit * np.exp(rng.uniform(0, np.log(n_latents / unit), self.sampled_prefixes - 1))
        drawn = {int(end) // unit * unit for end in ends} - {n_latents}
        chosen = (*sorted(drawn), n_latents)
        return Nested(chosen, (1 / len(chosen),) * len(chosen))


class Trainer:
    """A dictionary, its optimizer, its dead counters and its threshold.

    Parameters
    ----------
    policy, model
        Provenance for the SAE's config.
    moments
        Of the site's rows: they are scaled so that their mean squared norm is ``d``.
    """

    def __init__(
        self,
        config: TrainConfig,
        moments: Moments,
        policy: str,
        model: Mapping[str, Any],
        device: torch.device | str,
    ) -> None:
        self.config = config
        d_model = len(moments.mean)
        n_latents = sum(config.group_sizes) or config.expansion * d_model
        self.scale = (d_model / moments.mean_squared_norm) ** 0.5
        shape = SAEConfig(
            d_model=d_model,
            n_latents=n_latents,
            k=config.k,
            activation="topk" if config.activation == "topk" else "threshold",
            group_sizes=config.sizes(n_latents),
            site=config.site,
            policy=policy,
            model=model,
        )
        self.device, dtype = torch.device(device), DTYPES[config.dtype]
        self.sae = MatryoshkaSAE(shape, seed=config.seed, dtype=dtype).to(self.device)
        kernels = select(self.device, config.kernels)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if kernels.name == "triton" and self.device.type == "cpu" and not interpreted:
            raise ConfigError(
                "kernels 'triton' need a CUDA device, and this machine has none; ask for 'cpu', or "
                "set TRITON_INTERPRET=1 to interpret them, which is slow"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.ranks = (Sharded if config.shard_latents else DataParallel)(kernels)
        else:
            self.ranks = Alone(kernels)
        self._split()
        self.optimizer = DictionaryAdam(self.weights)
        self.gradients = self.weights.zeros()
        self.idle = torch.zeros(len(self.weights.b_enc), dtype=torch.int64, device=self.device)
        self.least = 0.0

    def _split(self) -> None:
        """This rank's weights: views of the SAE's parameters, or its own latents'."""
        sae, own = self.sae, self.ranks.latents()
        self.weights = Weights(
            W_enc=sae.W_enc.detach().T[own].contiguous(),
            b_enc=sae.b_enc.detach()[own].contiguous(),
            W_dec=sae.W_dec.detach()[own].contiguous(),
            b_dec=sae.b_dec.detach(),
        )

    @torch.no_grad()
    def gather(self) -> MatryoshkaSAE:
        """The SAE with every rank's latents as they are now."""
        if isinstance(self.ranks, Sharded):
            self.sae.W_enc.copy_(self.ranks.whole(self.weights.W_enc).T)
            self.sae.b_enc.copy_(self.ranks.whole(self.weights.b_enc))
            self.sae.W_dec.copy_(self.ranks.whole(self.weights.W_dec))
        return self.sae

    def raw(self) -> MatryoshkaSAE:
        """The SAE for raw activations, threshold included."""
        return self.gather().folded(self.scale)

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "batch d"], roles: Int8[Tensor, " batch"], step: int
    ) -> dict[str, Any]:
        """Train on one batch of raw activations; returns what ``metrics.jsonl`` records of it."""
        c, sae = self.config, self.sae
        x = x * self.scale
        kept = self._kept(x)
        x, roles = x[kept], roles[kept]
        token_weights = self._token_weights(roles)
        if step == 0:
            sae.b_dec.copy_(geometric_median(x))
        spread = float((x - x.mean(dim=0)).square().sum())
        n_rows, share = len(x), self.ranks.rows(len(x))
        x = x[share].to(self.device, sae.W_dec.dtype)
        if token_weights is not None:
            token_weights = token_weights[share].to(x)
        dead = self.idle >= c.dead_after_tokens
        objective = Objective(
            selection=self._selection(step),
            nested=c.nested_at(step, sae.config.prefixes),
            aux_weight=c.aux_weight,
            aux_k=c.aux_k or sae.config.d_model // 2,
        )
        work = self.ranks.work(self.weights, x, objective, dead, token_weights, self.gradients)
        lr = c.lr_at(step, sae.config.n_latents)
        self.optimizer.update(work.gradients, lr, c.clip, self.ranks.add_up)
        self.idle = torch.where(work.fired, 0, self.idle + n_rows)
        self.least = work.least
        if c.activation == "batch_topk" and step >= c.threshold_start:
            follow(sae.threshold, work.least, c.threshold_beta)
        weights = x.new_tensor(objective.nested.weights)
        loss = float((work.losses * weights).sum() + c.aux_weight * work.auxiliary)
        return {
            "step": step + 1,
            "tokens": (step + 1) * c.batch,
            "loss": loss,
            "group_mse": work.losses.tolist(),
            "auxiliary": float(work.auxiliary),
            "batch_fvu": work.error / spread if spread else float("inf"),
            "batch_l0": work.active / n_rows,
            "left_out": int((~kept).sum()),
            "dead": int(self.ranks.whole(dead.long()).sum()),
            "threshold": float(sae.threshold),
            "lr": lr,
        }

    def _kept(self, x: Float[Tensor, "batch d"]) -> Bool[Tensor, " batch"]:
        """Rows that are no attention sinks; after scaling, the mean squared norm is ``d``."""
        c = self.config
        if c.max_norm is None:
            return torch.ones(len(x), dtype=torch.bool)
        kept = x.norm(dim=1) <= c.max_norm * x.shape[1] ** 0.5
        if not kept.any():
            raise ConfigError(
                f"max_norm {c.max_norm} leaves no row of a batch; its smallest row has "
                f"{float(x.norm(dim=1).min()) / x.shape[1] ** 0.5:.2f} root-mean-square norms"
            )
        return kept

    def _token_weights(self, roles: Int8[Tensor, " batch"]) -> Float[Tensor, " batch"] | None:
        """Weights of mean 1 over the batch."""
        if not self.config.role_weights:
            return None
        each = [self.config.role_weights.get(role.name.lower(), 1.0) for role in Role]
        weights = torch.tensor(each, dtype=torch.float64)[roles.long()]
        if not weights.sum() > 0:
            raise ConfigError(
                f"role_weights {dict(self.config.role_weights)} give a whole batch weight 0; "
                "give some role of this harvest a positive weight"
            )
        return weights / weights.mean()

    def _selection(self, step: int) -> Selection:
        k = self.config.k_at(step)
        if self.config.activation == "topk":
            return TopK(k)
        return BatchTopK(k, floor=FLOOR * self.least)

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on, whole, by name; the same on every rank."""
        state = {f"sae.{name}": value for name, value in self.gather().state_dict().items()}
        for name, value in self.optimizer.tensors().items():
            shared = name == "steps" or name.endswith("b_dec")
            state[f"adam.{name}"] = value if shared else self.ranks.whole(value)
        state["idle"] = self.ranks.whole(self.idle)
        state["least"] = torch.tensor(self.least, dtype=torch.float64)
        return state

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`, with any number of ranks."""
        own = self.ranks.latents()

        def named(prefix: str) -> dict[str, Tensor]:
            found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            return {n: t.to(self.device) for n, t in found.items()}

        self.sae.load_state_dict(named("sae."))
        for mine, parameter in zip(
            self.weights[:3],
            (self.sae.W_enc.T, self.sae.b_enc, self.sae.W_dec),
            strict=True,
        ):
            mine.copy_(parameter[own])
        self.optimizer.restore(
            {
                name: value if name == "steps" or name.endswith("b_dec") else value[own]
                for name, value in named("adam.").items()
            }
        )
        self.idle.copy_(tensors["idle"].to(self.device)[own])
        self.least = float(tensors["least"])


def follow(threshold: Tensor, observed: float, beta: float) -> None:
    """Moving average that starts at its first observation (no bias towards zero)."""
    if threshold == 0:
        threshold.fill_(observed)
    else:
        threshold.mul_(beta).add_(observed * (1 - beta))
