"""What the drawings of both views share: the patient, the canvas, and what is found so far."""

import numpy as np

from phantom.anatomy import Acquisition, Anatomy
from phantom.canvas import Canvas, Patch, texture
from phantom.factors import Factors, Finding, parts

FAINT = 0.65
"""Share of its contrast that a subtle finding keeps."""


class Drawing:
    """One drawing of one view; its steps share the fields kept on it."""

    def __init__(self, factors: Factors, body: Anatomy, film: Acquisition, size: int) -> None:
        self.factors, self.body = factors, body
        self.canvas = Canvas(film, size)
        self.top = body.dome + film.inspiration
        self.grain = texture(body.marking_seed, size)
        self.findings: dict[str, Patch] = {}
        self.devices: list[tuple[Patch, float]] = []

    def of_kind(self, kind: str) -> list[Finding]:
        """The patient's findings of one kind."""
        return [f for f in self.factors.findings if parts(f.label).kind == kind]

    def strength(self, finding: Finding) -> float:
        """Share of its contrast that the finding is drawn with."""
        return FAINT if finding.subtle else 1.0

    def add_device(self, finding: Finding, patch: Patch, brightness: float) -> None:
        """Lay a device on top of everything."""
        self.findings[finding.label] = patch
        self.devices.append((patch, brightness))

    def add_spot(
        self, finding: Finding, patch: Patch, density: np.ndarray, least: float = 0.0
    ) -> None:
        """Add a round dense spot, which adds less where the film is bright already.

        Args:
            finding: what the spot is.
            patch: where it is.
            density: of the film so far; changed.
            least: room for density that there is even on the brightest ground.
        """
        room = np.maximum(1.15 - density[patch.window], least)
        density[patch.window] += self.strength(finding) * 0.40 * patch.opacity * room
        self.findings[finding.label] = patch
