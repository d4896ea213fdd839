"""Labels → control: latents turned up or down while a report is generated."""

from steering.edits import Edit, apply_edits
from steering.generate import Comparison, compare, steered

__all__ = ["Comparison", "Edit", "apply_edits", "compare", "steered"]
