"""The lateral view: a patient seen from the side, the breastbone on the left of the image.

Both lungs lie behind each other, so each takes half of the air away, and a finding of either
side shows at the same place. `u` runs from the front (negative) to the back; heights are those of
the frontal view, and the depth of a finding decides where it lies between front and back.
"""

from collections.abc import Mapping

import numpy as np

from phantom.anatomy import Acquisition, Anatomy
from phantom.canvas import Patch, Scene, clip, cut, inside, stripes, union
from phantom.drawing import Drawing
from phantom.factors import Factors, Finding, parts

_SIDES = ("left", "right")


def lateral(factors: Factors, anatomy: Anatomy, acquisition: Acquisition, size: int) -> Scene:
    """Draw the lateral view.

    Args:
        factors: what is wrong with the patient.
        anatomy: who the patient is.
        acquisition: how the film is taken.
        size: height and width in pixels.

    Returns:
        The scene: density, devices, and the shape of every finding and region.

    Raises:
        PhantomError: the size is too small.
    """
    return _Lateral(factors, anatomy, acquisition, size).scene()


class _Lateral(Drawing):
    """One drawing of the lateral view; its steps share the fields kept on it."""

    def __init__(self, factors: Factors, body: Anatomy, film: Acquisition, size: int) -> None:
        super().__init__(factors, body, film, size)
        u, v = self.canvas.u, self.canvas.v

        down = clip((v + 0.05) * 2.2)
        down *= 2 - down
        self.front = u + 0.12 + (body.chest - 0.03) * down  # distance behind the skin in front
        rest = clip(0.45 - v * 1.1)
        self.column = 0.255 - 0.45 * (rest * rest) - 0.10 * clip(v - 0.55) - u  # before the spine
        bend = u + 0.11
        self.floor = 1.35 * (bend * bend) + self.top
        bend = u - 0.04
        self.vault = v - (body.apex + 0.03) - 3.2 * (bend * bend)  # distance below the lungs' top
        gap = np.minimum(self.front - 0.055, self.column + 0.030)
        self.gap = np.minimum(gap, self.vault)
        self.depth, self.lung = {}, {}
        for side in _SIDES:
            self.depth[side] = np.minimum(self.gap, self._floor(side) - v)
            self.lung[side] = inside(self.depth[side], 0.018)

    def _floor(self, side: str) -> np.ndarray:
        """Height of the diaphragm under one lung: (H, W)."""
        return self.floor - 1.4 * self.body.right_rise if side == "right" else self.floor

    def scene(self) -> Scene:
        self._heart()
        air = self.lung["left"] + self.lung["right"]
        air *= 1 - 0.80 * self.heart
        air *= 0.5 * self.body.air
        density = self._trunk()
        density += 0.15 * self.heart
        for side in _SIDES:
            self._pneumothorax(side, air)
        density -= air
        density += self._markings() * air
        self._bones(density)
        for finding in self.of_kind("effusion"):
            self._effusion(finding, air, density)
        for finding in self.of_kind("consolidation"):
            self._consolidation(finding, air, density)
        for finding in self.of_kind("nodule"):
            self._nodule(finding, density)
        self._devices()
        return Scene(density, self.devices, self.findings, self._regions)

    def _markings(self) -> np.ndarray:
        """Vessels, thinning out away from the hilum: (H, W)."""
        du, dv = self.canvas.u - 0.045, self.canvas.v - 0.42
        near = clip(1 - np.sqrt(11 * (du * du + dv * dv)))
        return 0.35 * near * clip(1 - np.abs(self.grain) * 5.0)

    def _trunk(self) -> np.ndarray:
        """Neck, chest wall, abdomen and windpipe, without lungs or heart."""
        body, canvas = self.body, self.canvas
        u, v = canvas.u, canvas.v
        back = self.column + 0.125
        self.skin = inside(np.minimum(self.front, back), 0.02)
        out = np.minimum(self.front, back)
        out = body.soft * (0.62 + 0.38 * clip(out * 9.0))
        self.belly = inside(v - self._floor("left"), 0.02)
        out += 0.12 * self.belly
        # the windpipe slants backwards on its way down
        pipe = np.abs(u + 0.010 - 0.14 * v)
        self.trachea = inside(np.minimum(0.018 - pipe, 0.36 - v), 0.016)
        out -= 0.12 * self.trachea
        hilum, opacity = canvas.disc((0.045, 0.42), 0.07, 0.09)
        out[hilum] += 0.10 * opacity
        out *= self.skin
        return out

    def _heart(self) -> None:
        """The heart, in front and above the diaphragm; a large one reaches backwards."""
        body, u, v = self.body, self.canvas.u, self.canvas.v
        finding = self.factors.get("cardiomegaly")
        half = 0.36 * (finding.extent if finding else body.heart_ratio)
        tall = body.heart_height * (1.15 if finding else 1.0)
        du, dv = u + 0.215 - 0.80 * half, v - (body.dome - 0.10)
        across, along = (du + 0.45 * dv) * (1 / half), (dv + 0.15 * du) * (1 / tall)
        edge = half - half * np.sqrt(across * across + along * along)
        edge = np.minimum(edge, self._floor("left") + 0.02 - v)
        self.heart = inside(np.minimum(edge, self.front - 0.05), 0.022)
        if finding:
            self.findings[finding.label] = self._whole(self.heart)

    def _whole(self, opacity: np.ndarray) -> Patch:
        size = self.canvas.size
        return Patch((slice(0, size), slice(0, size)), opacity)

    def _bones(self, density: np.ndarray) -> None:
        """Breastbone, spine and ribs."""
        body, bone, u, v = self.body, self.body.bone, self.canvas.u, self.canvas.v
        spine = inside(0.034 - np.abs(self.column + 0.034), 0.016)
        gaps = stripes((v + 0.25 * u) * 14.0 + body.rib_phase, 2)
        spine *= (0.20 - 0.13 * gaps) * bone * self.skin
        density += spine
        plate = inside(0.011 - np.abs(self.front - 0.040), 0.014) * inside(v - 0.22, 0.03)
        density += 0.11 * bone * plate * inside(0.66 - v, 0.03)
        ribs = stripes((v - 0.75 * u) * (0.85 / body.rib_spacing) + body.rib_phase, 2)
        density += 0.050 * bone * ribs * inside(self.gap, 0.03) * (1 - 0.75 * self.belly)

    def _pneumothorax(self, side: str, air: np.ndarray) -> None:
        """Black air in front of and above the lung."""
        finding = self.factors.get(f"pneumothorax_{side}")
        if finding is None:
            return
        gap = 0.9 * finding.extent
        shrunk = np.minimum(self.front - 0.055 - gap, self.vault - gap)
        field = self.lung[side] * inside(0.58 - self.canvas.v, 0.05)
        free = inside(-shrunk, 0.012) * field
        pleura = inside(0.006 - np.abs(shrunk), 0.012) * field
        strength = self.strength(finding)
        air += strength * (0.09 * free - 0.15 * pleura)
        self.findings[finding.label] = self._whole(free)

    def _consolidation(self, finding: Finding, air: np.ndarray, density: np.ndarray) -> None:
        """A fluffy patch."""
        u, v = -0.10 + 0.20 * finding.depth, 0.33 + 0.22 * finding.along
        part = self.canvas.window([(u, v)], 1.7 * finding.extent)
        du, dv = self.canvas.u[part] - u, self.canvas.v[part] - v
        grain, strength = self.grain[part], self.strength(finding)
        edge = finding.extent * (1 + 0.4 * grain) - np.sqrt(du * du + dv * dv)
        patch = inside(edge, 0.025) * self.lung[parts(finding.label).side][part]
        filled = strength * patch * air[part] * (0.45 + 0.15 * grain)
        air[part] -= filled
        density[part] += filled + 0.12 * strength * patch
        self.findings[finding.label] = Patch(part, patch)

    def _effusion(self, finding: Finding, air: np.ndarray, density: np.ndarray) -> None:
        """Fluid over one half of the diaphragm, its level rising to the front and the back."""
        side = parts(finding.label).side
        top = self.top - (1.4 * self.body.right_rise if side == "right" else 0.0) - finding.extent
        part = self.canvas.rows(top - 0.10, 1.0)
        bend = self.canvas.u[part] + 0.02
        level = self.canvas.v[part] - top + 0.9 * (bend * bend)
        fluid = inside(np.minimum(self.depth[side][part], level), 0.022)
        filled = self.strength(finding) * fluid * (0.60 * air[part] + 0.03)
        air[part] -= filled
        density[part] += filled
        self.findings[finding.label] = Patch(part, fluid)

    def _nodule(self, finding: Finding, density: np.ndarray) -> None:
        """A round dense spot."""
        top = 0.29 if parts(finding.label).zone == "upper" else 0.48
        u = -0.11 + 0.24 * finding.depth
        spot = self.canvas.disc((u, top + 0.08 * finding.along), finding.extent)
        self.add_spot(finding, spot, density)

    def _devices(self) -> None:
        """Tubes and the pacemaker, on top of everything."""
        canvas = self.canvas
        if finding := self.factors.get("nasogastric_tube"):
            path = [(0.030, -0.02), (0.075, 0.30), (0.115, 0.48), (0.110, 0.70)]
            path += [(0.06, 0.80), (-0.02, 0.87), (-0.07, 0.91)]
            self.add_device(finding, canvas.tube(cut(path, finding.extent), 0.0065), 0.95)
        if finding := self.factors.get("endotracheal_tube"):
            tip = finding.extent
            path = [(-0.012, -0.02), (-0.010 + 0.14 * tip, tip)]
            self.add_device(finding, canvas.tube(path, 0.0125), 0.86)
            inner = [(u + 0.005, v) for u, v in path]
            self.devices.append((canvas.tube(inner, 0.005), 1.0))
        if finding := self.factors.get("pacemaker"):
            u, v = -0.235 + 0.03 * finding.depth, 0.205 + 0.04 * finding.along
            lead = [(u, v), (-0.12, v - 0.03), (0.0, 0.24), (0.03, 0.34), (0.02, 0.52)]
            lead += [(-0.04, 0.60), (-0.11, finding.extent)]
            case = canvas.block((u, v), (0.024, 0.042))
            self.add_device(finding, union(canvas.tube(lead, 0.006), case), 1.0)

    def _regions(self) -> Mapping[str, np.ndarray]:
        """Opacity of every region; the two lungs overlap."""
        u, v = self.canvas.u, self.canvas.v
        beside = (self.heart <= 0.5).astype(np.float32)
        centre = np.minimum(0.075 - np.abs(u - 0.035), np.minimum(v - 0.16, 0.52 - v))
        return {
            "left lung": self.lung["left"] * beside,
            "right lung": self.lung["right"] * beside,
            "heart": self.heart,
            "mediastinum": inside(centre, 0.01) * beside,
            "abdomen": self.belly * self.skin,
            "spine": inside(0.034 - np.abs(self.column + 0.034), 0.01) * self.skin,
            "trachea": self.trachea,
        }
