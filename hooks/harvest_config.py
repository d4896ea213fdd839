"""What a harvest takes: sites, tokens, dtype, and in which pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hooks.batches import default_tokens
from hooks.files import ConfigError, nearest
from hooks.policies import POLICIES, PatchSample
from hooks.roles import Role
from hooks.store import DTYPES


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested, and in which pieces."""

    sites: tuple[str, ...]
    """Site names of one stream, see :mod:`hooks.sites`."""
    policy: str = "published"
    """A key of :data:`hooks.policies.POLICIES`."""
    dtype: str = "bfloat16"
    """Dtype on disk."""
    studies_per_part: int = 64
    """A part is held in memory and committed as a whole; three are held at a time."""
    batch_tokens: int | None = None
    """Padded tokens in a forward pass; None takes :func:`hooks.batches.default_tokens`."""
    patches: PatchSample | None = None
    """Which image patches are kept where the policy keeps any; None keeps all."""

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.policy, POLICIES, "policy"),
            (self.dtype, DTYPES, "dtype"),
        ):
            if value not in known:
                raise ConfigError(
                    f"unknown {what} {value!r}{nearest(value, known)}; choose from {list(known)}"
                )
        for name in ("studies_per_part", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.patches is not None and Role.IMAGE not in POLICIES[self.policy]:
            raise ConfigError(
                f"policy {self.policy!r} keeps no image patches to sample; leave the sample out, "
                "or use policy 'patches' or 'all'"
            )

    def tokens_on(self, device: torch.device) -> int:
        """Padded tokens in a forward pass on a device."""
        return self.batch_tokens or default_tokens(device)

    def n_parts(self, n_studies: int) -> int:
        """Parts that so many studies make."""
        return -(-n_studies // self.studies_per_part)
