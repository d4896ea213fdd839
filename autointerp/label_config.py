"""What is labelled, from what, and what an explainer needs beside the examples of a latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from autointerp.causal import SteeredReports
from autointerp.explainers import STRONG
from autointerp.features import IMAGES, MODALITIES
from autointerp.operating import STRENGTHS
from autointerp.vision import VisionConfig
from hooks.files import ConfigError, nearest
from hooks.studies import Study

Explainer = Literal["text", "vision", "reports", "causal"]


@dataclass(frozen=True)
class LabelConfig:
    """What is labelled, and from what."""

    latents: tuple[int, ...]
    explainer: Explainer = "text"
    """``text``: excerpts in which a latent fires. ``vision``: films under its activations.
    ``reports``: the reports of the studies on whose films it fires. ``causal``: the reports that
    the model writes of a blank film with it turned up."""
    modality: str = "report"
    """Of the examples shown; of ``vision`` and ``reports`` a film."""
    calibrate: bool = False
    """State each label with the activation above which it holds (:mod:`autointerp.operating`), of
    labels from several strengths of firing. Each takes a question for every excerpt of the
    explaining patients."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """Shares of a latent's maximum, for each of which a label is asked for."""
        return STRENGTHS if self.calibrate else (STRONG,)

    def __post_init__(self) -> None:
        if not self.latents:
            raise ConfigError("no latents to label; name at least one")
        if self.explainer not in get_args(Explainer):
            raise ConfigError(
                f"explainer {self.explainer!r} is unknown"
                f"{nearest(self.explainer, get_args(Explainer))}; choose from "
                f"{list(get_args(Explainer))}"
            )
        if self.modality not in MODALITIES:
            raise ConfigError(
                f"modality {self.modality!r} is unknown{nearest(self.modality, MODALITIES)}; "
                f"choose from {list(MODALITIES)}"
            )
        on_films = self.explainer in ("vision", "reports")
        if self.explainer != "causal" and on_films != (self.modality in IMAGES):
            raise ConfigError(
                f"explainer {self.explainer!r} and modality {self.modality!r} do not go together; "
                "text is explained by text, and films by vision or reports"
            )
        if self.calibrate and self.explainer != "text":
            raise ConfigError(
                f"calibrate holds labels against excerpts, and explainer {self.explainer!r} has "
                "none; leave it out, or explain text"
            )


@dataclass(frozen=True)
class Sources:
    """What an explainer needs beside the examples of a latent."""

    studies: Mapping[str, Study] = field(default_factory=dict)
    """By id; for ``vision`` and ``reports``."""
    image_size: int = 518
    """Side in pixels of the square that the processor crops a film to; for ``vision``."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    steered: SteeredReports | None = None
    """For ``causal``."""

    @classmethod
    def of(cls, studies: Sequence[Study], **others: Any) -> Sources:
        """From a list of studies."""
        return cls({study.id: study for study in studies}, **others)

    def reports(self) -> SteeredReports:
        """The steered reports, which must be there."""
        if self.steered is None:
            raise ConfigError("the causal explainer reads steered reports; give them")
        return self.steered
