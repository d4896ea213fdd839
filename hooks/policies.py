"""Which tokens are kept: by role, and image patches also by sample.

A dictionary knows the policy it was trained under. :func:`check_roles` is the one place that
compares it with the tokens it is given.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hooks.files import ConfigError, nearest
from hooks.roles import Role

log = logging.getLogger(__name__)

POLICIES: dict[str, tuple[Role, ...]] = {
    "all": tuple(Role),
    "published": (Role.CLINICAL, Role.REPORT, Role.GROUNDING),
    "report": (Role.REPORT, Role.GROUNDING),
    "clinical": (Role.CLINICAL,),
    "patches": (Role.IMAGE,),
}
"""Which roles are kept. ``published`` follows arXiv 2507.12950: image tokens and boilerplate go."""

SAMPLES = ("uniform", "norm")


@dataclass(frozen=True)
class PatchSample:
    """Which of a study's patches are kept; the same ones in every run, whatever its batches.

    Patches are drawn without replacement, with chances in proportion to a weight (Efraimidis and
    Spirakis 2006); the random numbers come from a hash of the study's id.
    """

    by: str = "uniform"
    """``uniform``: all weights are one. ``norm``: the weight is the norm of the activation, as it
    is stored, at the last site."""
    fraction: float | None = None
    """Share of the study's patches, rounded up; or else"""
    count: int | None = None
    """how many of the study's patches, at most."""

    def __post_init__(self) -> None:
        if self.by not in SAMPLES:
            raise ConfigError(
                f"patches are sampled by {self.by!r}{nearest(self.by, SAMPLES)}; "
                f"choose from {list(SAMPLES)}"
            )
        if (self.fraction is None) == (self.count is None):
            raise ConfigError("a sample of patches has a fraction or a count; give one of them")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"the fraction of patches is {self.fraction}; it lies in (0, 1]")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"the count of patches is {self.count}; it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> PatchSample:
        """From ``uniform:0.1`` (a fraction) or ``norm:64`` (a count).

        >>> PatchSample.parse("norm:64").size(1369), PatchSample.parse("uniform:0.1").size(1369)
        (64, 137)
        """
        by, _, size = text.partition(":")
        try:
            if "." in size:
                return cls(by, fraction=float(size))
            return cls(by, count=int(size))
        except ValueError:
            raise ConfigError(
                f"a sample of patches is {text!r}; write one like uniform:0.1 or norm:64"
            ) from None

    def size(self, n: int) -> int:
        """How many of ``n`` patches are kept."""
        if self.count is not None:
            return min(n, self.count)
        assert self.fraction is not None
        return int(np.ceil(n * self.fraction))

    def choose(self, study: str, n: int, norms: np.ndarray | None = None) -> np.ndarray:
        """Indices of the kept ones among ``n`` patches, ascending; ``norms [n]`` if by norm."""
        digest = hashlib.sha256(f"maira-sae patches {study}".encode()).digest()
        uniform = np.random.default_rng(int.from_bytes(digest[:8], "big")).random(n)
        weights = np.ones(n) if norms is None else np.maximum(norms.astype(np.float64), 1e-300)
        return np.sort(np.argsort(-np.log(uniform) / weights, kind="stable")[: self.size(n)])


def check_roles(trained: str, given: str, what: str) -> None:
    """Compare the policy a dictionary was trained under with that of the tokens it is given.

    Tokens of roles it never saw are named in a warning. A dictionary that does not say its policy,
    as another library's may not, is not checked.

    Parameters
    ----------
    trained, given
        Keys of :data:`POLICIES`, or empty where they are not known.
    what
        What the tokens are, for the text.

    Raises
    ------
    ConfigError
        If no role is common to both, or a policy is unknown.
    """
    if not trained or not given:
        return
    for policy in (trained, given):
        if policy not in POLICIES:
            raise ConfigError(
                f"unknown policy {policy!r}{nearest(policy, POLICIES)}; "
                f"choose from {list(POLICIES)}"
            )
    known = set(POLICIES[trained])
    strange = [role.name.lower() for role in POLICIES[given] if role not in known]
    if len(strange) == len(POLICIES[given]):
        raise ConfigError(
            f"the dictionary was trained on {_names(trained)} tokens (policy {trained!r}), and "
            f"{what} has only {_names(given)} (policy {given!r}); harvest with policy {trained!r}"
        )
    if strange:
        _warn_once(
            f"{what} has {', '.join(strange)} tokens (policy {given!r}), which the dictionary was "
            f"not trained on (policy {trained!r}): what it says of them means little"
        )


def flag_roles(trained: str, asked: Sequence[Role], what: str) -> None:
    """Warn where a dictionary is used on tokens of roles none of which it was trained on.

    For uses that are legitimate all the same, as steering is: a direction may be added anywhere.
    ``trained`` and ``what`` are as in :func:`check_roles`.
    """
    if trained in POLICIES and asked and not set(asked) & set(POLICIES[trained]):
        names = ", ".join(role.name.lower() for role in asked)
        _warn_once(
            f"{what} takes {names} tokens, and the dictionary was trained on {_names(trained)} "
            f"tokens (policy {trained!r}): what it says of them means little"
        )


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _names(policy: str) -> str:
    return ", ".join(role.name.lower() for role in POLICIES[policy])
