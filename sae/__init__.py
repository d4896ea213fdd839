"""Activations → dictionaries: Matryoshka BatchTopK SAEs, trained and measured."""

from sae.baselines import random_dictionary
from sae.calibrate import Calibration, calibrate_by_role, calibrate_threshold
from sae.cross_entropy import CrossEntropy, cross_entropy
from sae.latent_scores import auroc
from sae.loss import Objective, auxiliary_loss, objective
from sae.maxima import Probe, StudyMaxima, best_latent, study_maxima
from sae.metrics import Quality, QualityMeter, measure
from sae.model import MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.stream import ShuffledRows
from sae.train import TrainConfig, train, training_curve

__all__ = [
    "Calibration",
    "CrossEntropy",
    "MatryoshkaSAE",
    "Objective",
    "Probe",
    "Quality",
    "QualityMeter",
    "SAEConfig",
    "ShuffledRows",
    "StudyMaxima",
    "TrainConfig",
    "auroc",
    "auxiliary_loss",
    "best_latent",
    "calibrate_by_role",
    "calibrate_threshold",
    "cross_entropy",
    "geometric_median",
    "group_sizes_of",
    "measure",
    "objective",
    "random_dictionary",
    "study_maxima",
    "train",
    "training_curve",
]
