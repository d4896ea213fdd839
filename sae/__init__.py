"""Activations → dictionaries: Matryoshka BatchTopK SAEs, trained and measured."""

from sae.evaluate import (
    CrossEntropy,
    Probe,
    auroc,
    best_latent,
    cross_entropy,
    random_dictionary,
    study_maxima,
)
from sae.formats import convert
from sae.loss import Objective, auxiliary_loss, objective
from sae.metrics import Quality, QualityMeter, measure
from sae.model import MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.stream import ShuffledRows
from sae.train import TrainConfig, train, training_curve

__all__ = [
    "CrossEntropy",
    "MatryoshkaSAE",
    "Objective",
    "Probe",
    "Quality",
    "QualityMeter",
    "SAEConfig",
    "ShuffledRows",
    "TrainConfig",
    "auroc",
    "auxiliary_loss",
    "best_latent",
    "convert",
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
