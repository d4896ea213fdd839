"""What a caller says about a dictionary whose files do not say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hooks.files import FormatError

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """Facts that files of other libraries may lack; ``None`` means: the files say it."""

    site: str | None = None
    """Named place in the model; replaces what the files say."""
    policy: str | None = None
    """Token policy; replaces what the files say."""
    k: int | None = None
    """Active latents per token."""
    group_sizes: tuple[int, ...] | None = None
    """Latents in each nested group, innermost first."""
    activation: str | None = None
    """``threshold`` or ``topk``; replaces what the files say."""
    threshold: float | None = None
    """One inference threshold for all latents."""
    norm_scale: float | None = None
    """The file's weights expect ``x · norm_scale``; they are folded to take ``x``."""

    def __post_init__(self) -> None:
        if self.group_sizes is not None:
            object.__setattr__(self, "group_sizes", tuple(self.group_sizes))
        if self.norm_scale is not None and not 0 < self.norm_scale < float("inf"):
            raise FormatError(f"norm_scale is {self.norm_scale}; it must be positive and finite")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise FormatError(f"threshold is {self.threshold}; it must be at least 0 and finite")

    def agreed(self, name: str, found: T | None, where: Path) -> T | None:
        """The given value or the found one; if both are there they must be equal."""
        asked: Any = getattr(self, name)
        if asked is not None and found is not None and asked != found:
            raise FormatError(f"{where} says {name} {found}, asked was {asked}; leave {name} out")
        return found if asked is None else asked

    def refuse(self, where: Path, *names: str) -> None:
        """Refuse values that the files at ``where`` always say themselves."""
        for name in names:
            if getattr(self, name) is not None:
                raise FormatError(f"{where} says {name} itself; leave {name} out")
