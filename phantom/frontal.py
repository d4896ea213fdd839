"""The frontal view: a patient facing the tube, the patient's left on the right of the image.

Density adds up along the beam, so shapes add: soft tissue, minus the air of the lungs, plus
heart, bones, fluid. `u` is negative on the patient's right; `a = |u|`.
"""

from collections.abc import Mapping

import numpy as np

from phantom.anatomy import Acquisition, Anatomy
from phantom.canvas import Patch, Scene, clip, cut, inside, stripes, union, within
from phantom.drawing import Drawing
from phantom.factors import Factors, Finding, parts

_SIGN = {"left": 1.0, "right": -1.0}
_APEX = 0.105  # how far from the midline the lungs begin at their top


def frontal(factors: Factors, anatomy: Anatomy, acquisition: Acquisition, size: int) -> Scene:
    """Draw the frontal view.

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
    return _Frontal(factors, anatomy, acquisition, size).scene()


class _Frontal(Drawing):
    """One drawing of the frontal view; its steps share the fields kept on it."""

    def __init__(self, factors: Factors, body: Anatomy, film: Acquisition, size: int) -> None:
        super().__init__(factors, body, film, size)
        canvas = self.canvas
        self.a = a = np.abs(canvas.u)
        left = (canvas.u > 0).astype(np.float32)
        self.half = {"left": left, "right": 1 - left}

        rest = self._rest(0.0)
        square = rest * rest
        self.wall = _APEX + body.chest * np.sqrt(1 - square * rest)
        square *= square
        self.core = body.mediastinum + (_APEX - body.mediastinum) * square - a
        self.gap = np.minimum(np.minimum(self.wall - a, -self.core), canvas.v - body.apex)

        self.low = low = canvas.rows(self.top - body.right_rise - 0.02, 1.0)
        bend = a[low] - 0.13
        self.below = canvas.v[low] - self.top - body.arch * (bend * bend)
        self.below += body.right_rise * self.half["right"][low]
        self.belly = inside(self.below, 0.020)
        self.depth = self.gap.copy()
        np.minimum(self.depth[low], -self.below, out=self.depth[low])
        self.lung = inside(self.depth, 0.018)

    def _rest(self, lower: float) -> np.ndarray:
        """1 at the lungs' top, or a little lower, falling to 0 near their base: (H, W)."""
        top, base = self.body.apex + lower, self.top + 0.10
        return clip((base - self.canvas.v) * (1 / (base - top)))

    def scene(self) -> Scene:
        self._heart()
        gas = self.lung * (0.74 + 1.2 * self.depth)
        gas[self.heart.window] *= 1 - 0.85 * self.heart.opacity
        gas *= self.body.air
        density = self._trunk()
        density[self.heart.window] += 0.16 * self.heart.opacity
        markings = self._markings(gas)
        for side in _SIGN:
            self._pneumothorax(side, gas, markings, density)
        density -= gas
        density[markings.window] += markings.opacity
        self._bones(density)
        for side in _SIGN:
            self._consolidation(side, gas, density)
            self._effusion(side, gas, density)
        for finding in self.of_kind("nodule"):
            self._nodule(finding, density)
        self._devices()
        return Scene(density, self.devices, self.findings, self._regions)

    def _trunk(self) -> np.ndarray:
        """Neck, shoulders, chest wall, mediastinum and abdomen, without lungs or heart."""
        body, canvas = self.body, self.canvas
        edge = np.full_like(self.a, 0.155 + body.chest)
        neck = canvas.rows(0.0, 0.16)
        down = clip(0.85 - canvas.v[neck] * 6.0)
        edge[neck] -= (0.025 + body.chest) * (down * down * (3 - 2 * down))
        flat = self.a / edge
        edge -= self.a
        self.skin = inside(edge, 0.02)
        flat *= flat
        flat *= flat
        flat *= -0.42 * body.soft
        flat += body.soft
        out = flat
        out[self.low] += self.belly * (0.09 + 0.05 * self.half["right"][self.low])
        out += 0.10 * inside(self.core, 0.035)
        knob, opacity = canvas.disc((body.mediastinum + body.knob - 0.036, 0.275), 0.045, 0.02)
        out[knob] += 0.09 * opacity * (self.core[knob] < 0)
        bubble, opacity = canvas.disc((0.17, body.dome + 0.10), 0.05, 0.05)
        out[bubble] -= 0.13 * opacity
        out *= self.skin
        return out

    def _heart(self) -> None:
        """The heart; a large one is wider, and reaches further to the left."""
        body, canvas = self.body, self.canvas
        finding = self.factors.get("cardiomegaly")
        half = (finding.extent if finding else body.heart_ratio) * (_APEX + body.chest)
        tall = body.heart_height * (1.08 if finding else 1.0)
        u, v = 0.34 * half, body.dome - 0.095
        part = canvas.window([(u - 1.1 * half, v - tall), (u + 1.1 * half, self.top + 0.08)], 0.05)
        du, dv = canvas.u[part] - u, canvas.v[part] - v
        across, along = (du - 0.35 * dv) * (1 / half), (dv + 0.30 * du) * (1 / tall)
        edge = half - half * np.sqrt(across * across + along * along)
        bend = self.a[part] - 0.13
        floor = self.top + 0.025 + body.arch * (bend * bend)
        floor -= body.right_rise * self.half["right"][part]
        self.heart = Patch(part, inside(np.minimum(edge, floor - canvas.v[part]), 0.020))
        if finding:
            self.findings[finding.label] = self.heart

    def _markings(self, gas: np.ndarray) -> Patch:
        """The hilum of each lung and its vessels, thinning out towards the wall."""
        part = self.canvas.rows(0.12, 0.72)
        da, dv = self.a[part] - 0.075, self.canvas.v[part] - 0.42
        near = clip(1 - np.sqrt(11 * (da * da + dv * dv)))
        vessels = clip(1 - np.abs(self.grain[part]) * 6.0)
        vessels *= 0.30
        square = near * near
        square *= square
        square *= 0.36
        vessels += square
        vessels *= near
        vessels *= gas[part]
        return Patch(part, vessels)

    def _bones(self, density: np.ndarray) -> None:
        """Ribs, spine, windpipe and collar bones."""
        body, canvas, bone = self.body, self.canvas, self.body.bone
        part = canvas.rows(body.apex - 0.04, 1.0)
        a, v = self.a[part], canvas.v[part]
        cage = np.minimum(self.wall[part] + 0.025 - a, v - (body.apex - 0.015))
        cage = inside(np.minimum(cage, a - 0.04), 0.03)
        step = 1 / body.rib_spacing
        slope = 0.9 * a
        slope += body.rib_slope
        slope *= a
        ribs = stripes((v - slope) * step + body.rib_phase, 2)
        ribs *= 0.085 * bone
        ribs += 0.030 * bone * stripes((v + 0.55 * a) * (0.8 * step) + body.rib_phase, 2)
        cage *= ribs
        cage[within(self.low, part)] *= 1 - 0.75 * self.belly
        cage[within(self.heart.window, part)] *= 1 - 0.50 * self.heart.opacity
        density[part] += cage

        part = canvas.window([(-0.05, 0.0), (0.05, 0.0), (-0.05, 1.0), (0.05, 1.0)], 0.0)
        a, v = self.a[part], canvas.v[part]
        spine = (0.105 - 0.045 * stripes(v * 16.0 + body.rib_phase, 2)) * bone
        density[part] += spine * inside(0.036 - a, 0.016)
        part = canvas.window([(-0.03, 0.0), (0.03, 0.0), (-0.03, 0.35), (0.03, 0.35)], 0.0)
        a, v = self.a[part], canvas.v[part]
        density[part] -= 0.11 * inside(np.minimum(0.016 - a, 0.33 - v), 0.016)

        part = canvas.rows(body.clavicle - 0.09, body.clavicle + 0.03)
        a, v = self.a[part], canvas.v[part]
        line = 0.015 - np.abs(v - body.clavicle + a * (0.30 - 0.18 * a))
        ends = inside(np.minimum(a - 0.035, 0.37 - a), 0.02) * self.skin[part]
        density[part] += 0.13 * bone * ends * inside(line, 0.014)

    def _pneumothorax(
        self, side: str, gas: np.ndarray, markings: Patch, density: np.ndarray
    ) -> None:
        """Air around the top and outside of a lung: black, no vessels, a thin bright edge."""
        finding = self.factors.get(f"pneumothorax_{side}")
        if finding is None:
            return
        v, gap, strength = self.canvas.v, finding.extent, self.strength(finding)
        rest = self._rest(1.5 * gap)
        shrunk = _APEX + (self.body.chest - gap) * np.sqrt(1 - rest * rest * rest)
        shrunk = np.minimum(shrunk - self.a, v - (self.body.apex + 1.5 * gap))
        field = self.lung * self.half[side] * inside(0.58 - v, 0.05)
        free = inside(-shrunk, 0.012) * field
        markings.opacity[:] *= 1 - free[markings.window]
        gas += 0.12 * strength * free
        density += 0.17 * strength * field * inside(0.006 - np.abs(shrunk), 0.012)
        self.findings[finding.label] = Patch((slice(0, None), slice(0, None)), free)

    def _consolidation(self, side: str, gas: np.ndarray, density: np.ndarray) -> None:
        """A fluffy patch in the middle of a lung."""
        finding = self.factors.get(f"consolidation_{side}")
        if finding is None:
            return
        u, v = _SIGN[side] * (0.19 + 0.07 * finding.across), 0.33 + 0.22 * finding.along
        part = self.canvas.window([(u, v)], 1.7 * finding.extent)
        du, dv = self.canvas.u[part] - u, self.canvas.v[part] - v
        grain, strength = self.grain[part], self.strength(finding)
        edge = finding.extent * (1 + 0.4 * grain) - np.sqrt(du * du + dv * dv)
        patch = inside(edge, 0.025) * self.lung[part] * self.half[side][part]
        filled = strength * patch * gas[part] * (0.55 + 0.15 * grain)
        gas[part] -= filled
        density[part] += filled + 0.12 * strength * patch
        self.findings[finding.label] = Patch(part, patch)

    def _effusion(self, side: str, gas: np.ndarray, density: np.ndarray) -> None:
        """Fluid over the diaphragm, its level rising towards the wall."""
        finding = self.factors.get(f"effusion_{side}")
        if finding is None:
            return
        top = self.top - (self.body.right_rise if side == "right" else 0.0) - finding.extent
        part = self.canvas.rows(top - 0.10, 1.0)
        slope = self.a[part] - 0.17
        level = self.canvas.v[part] - top + 1.6 * (slope * np.abs(slope))
        fluid = inside(np.minimum(self.gap[part], level), 0.022) * self.half[side][part]
        above = np.ones_like(fluid)
        above[within(self.low, part)] -= self.belly
        density[part] += self.strength(finding) * fluid * (gas[part] + 0.09 * above)
        self.findings[finding.label] = Patch(part, fluid * above)

    def _nodule(self, finding: Finding, density: np.ndarray) -> None:
        """A nodule in its half of a lung."""
        place = parts(finding.label)
        top, inner = (0.29, 0.18) if place.zone == "upper" else (0.48, 0.23)
        u = _SIGN[place.side] * (inner + 0.065 * finding.across)
        spot = self.canvas.disc((u, top + 0.08 * finding.along), finding.extent)
        self.add_spot(finding, spot, density, least=0.6)

    def _devices(self) -> None:
        """Tubes and the pacemaker, on top of everything."""
        canvas = self.canvas
        if finding := self.factors.get("nasogastric_tube"):
            path = [(0.024, -0.02), (0.022, 0.30), (0.026, 0.48), (0.032, self.body.dome)]
            path += [(0.055, 0.80), (0.11, 0.865), (0.17 + 0.05 * finding.across, 0.91)]
            self.add_device(finding, canvas.tube(cut(path, finding.extent), 0.0065), 0.95)
        if finding := self.factors.get("endotracheal_tube"):
            tip = finding.extent
            self.add_device(finding, canvas.tube([(-0.004, -0.02), (-0.002, tip)], 0.0125), 0.86)
            self.devices.append((canvas.tube([(0.001, -0.02), (0.003, tip)], 0.005), 1.0))
        if finding := self.factors.get("pacemaker"):
            u, v = 0.26 + 0.05 * finding.across, 0.155 + 0.04 * finding.along
            lead = [(u, v), (0.19, v - 0.03), (0.10, v + 0.01), (-0.02, 0.25), (-0.045, 0.34)]
            lead += [(-0.045, 0.52), (-0.01, 0.60), (0.10, finding.extent)]
            case = canvas.block((u, v), (0.046, 0.038))
            self.add_device(finding, union(canvas.tube(lead, 0.006), case), 1.0)

    def _regions(self) -> Mapping[str, np.ndarray]:
        """Opacity of every region; the lungs are what the heart leaves of them."""
        heart = self.heart.spread(self.canvas.size)
        belly = Patch(self.low, self.belly).spread(self.canvas.size)
        beside = (heart <= 0.5).astype(np.float32)
        lung = self.lung * beside
        return {
            "left lung": lung * self.half["left"],
            "right lung": lung * self.half["right"],
            "heart": heart,
            "mediastinum": inside(self.core, 0.01) * beside * (1 - belly) * self.skin,
            "abdomen": belly * self.skin,
            "spine": inside(0.036 - self.a, 0.01) * self.skin,
            "trachea": inside(np.minimum(0.016 - self.a, 0.33 - self.canvas.v), 0.01),
        }
