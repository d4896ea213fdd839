"""Activations → dictionaries: Matryoshka BatchTopK SAEs, trained and measured."""

from sae.baselines import PCA, fit_pca, random_dictionary
from sae.calibrate import Calibration, calibrate_by_role, calibrate_threshold
from sae.cross_entropy import CrossEntropy, cross_entropy
from sae.evaluate import EvaluationConfig, evaluate
from sae.intervals import Figure
from sae.latent_scores import auroc
from sae.latents import Latents, gather, heldout_rows, pool
from sae.loss import Objective, auxiliary_loss, objective
from sae.maxima import Probe, StudyMaxima, best_latent, study_maxima
from sae.metrics import Quality, QualityMeter, measure
from sae.model import MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.probing import sparse_probes, splitting
from sae.stability import Stability, stability
from sae.stream import ShuffledRows
from sae.train import TrainConfig, train, training_curve

__all__ = [
    "PCA",
    "Calibration",
    "CrossEntropy",
    "EvaluationConfig",
    "Figure",
    "Latents",
    "MatryoshkaSAE",
    "Objective",
    "Probe",
    "Quality",
    "QualityMeter",
    "SAEConfig",
    "ShuffledRows",
    "Stability",
    "StudyMaxima",
    "TrainConfig",
    "auroc",
    "auxiliary_loss",
    "best_latent",
    "calibrate_by_role",
    "calibrate_threshold",
    "cross_entropy",
    "evaluate",
    "fit_pca",
    "gather",
    "geometric_median",
    "group_sizes_of",
    "heldout_rows",
    "measure",
    "objective",
    "pool",
    "random_dictionary",
    "sparse_probes",
    "splitting",
    "stability",
    "study_maxima",
    "train",
    "training_curve",
]
