"""Labels → control: latents turned up or down while a report is generated."""

from steering.baselines import matched_latent, mean_difference, probe_direction, random_direction
from steering.edits import Edit, Push, apply_edits
from steering.generate import Comparison, compare, steered
from steering.positions import Positions
from steering.references import References, measure_references

__all__ = [
    "Comparison",
    "Edit",
    "Positions",
    "Push",
    "References",
    "apply_edits",
    "compare",
    "matched_latent",
    "mean_difference",
    "measure_references",
    "probe_direction",
    "random_direction",
    "steered",
]
