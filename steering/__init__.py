"""Labels → control: latents turned up or down while a report is generated, and what that did.

``steering.review``, ``steering.draft`` and ``steering.sweep`` are the functions; their modules are
imported from by name, as in ``from steering.review import ReviewConfig``.
"""

from steering.baselines import matched_latent, mean_difference, probe_direction, random_direction
from steering.boxes import BoxShift, box_shifts
from steering.degeneration import Degeneration, degeneration
from steering.draft import Draft, draft
from steering.edits import Edit, Push, apply_edits
from steering.effects import Dose, Effect, dose_response, effect, names_any
from steering.entailment import Entailment, entailment, write_radfact
from steering.evidence import film_summary
from steering.generate import Comparison, compare, generate_report, steered
from steering.history import Highlight, agreement, film_pairs, fit_progression
from steering.likelihood import TokenEffects, token_effects
from steering.measures import MeasuredDose, Measures, measure_effect, measured_doses
from steering.patches import StoredPatches, study_heat
from steering.positions import Positions
from steering.references import References, measure_references
from steering.report import SteeringRun
from steering.review import ReviewConfig, SentenceReview, review
from steering.run import run_steering
from steering.search import Hit, Index, build_index, latents_named
from steering.selection import OutputScore, output_scores
from steering.sentences import Alignment, align
from steering.sweep import sweep

__all__ = [
    "Alignment",
    "BoxShift",
    "Comparison",
    "Degeneration",
    "Dose",
    "Draft",
    "Edit",
    "Effect",
    "Entailment",
    "Highlight",
    "Hit",
    "Index",
    "MeasuredDose",
    "Measures",
    "OutputScore",
    "Positions",
    "Push",
    "References",
    "ReviewConfig",
    "SentenceReview",
    "SteeringRun",
    "StoredPatches",
    "TokenEffects",
    "agreement",
    "align",
    "apply_edits",
    "box_shifts",
    "build_index",
    "compare",
    "degeneration",
    "dose_response",
    "draft",
    "effect",
    "entailment",
    "film_pairs",
    "film_summary",
    "fit_progression",
    "generate_report",
    "latents_named",
    "matched_latent",
    "mean_difference",
    "measure_effect",
    "measure_references",
    "measured_doses",
    "names_any",
    "output_scores",
    "probe_direction",
    "random_direction",
    "review",
    "run_steering",
    "steered",
    "study_heat",
    "sweep",
    "token_effects",
    "write_radfact",
]
