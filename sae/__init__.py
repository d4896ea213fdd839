"""Activations → dictionaries: Matryoshka BatchTopK SAEs, trained and measured."""

from sae.calibrate import Calibration, threshold_for
from sae.evaluate import (
    CrossEntropy,
    Probe,
    auroc,
    best_latent,
    cross_entropy,
    random_dictionary,
    study_maxima,
)
from sae.live import LiveRows
from sae.metrics import Quality, QualityMeter, measure, measure_by_role
from sae.model import MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.stream import Batch, FolderRows, Rows
from sae.train import Interrupted, train, train_all, training_curve
from sae.trainer import TrainConfig

__all__ = [
    "Batch",
    "Calibration",
    "CrossEntropy",
    "FolderRows",
    "Interrupted",
    "LiveRows",
    "MatryoshkaSAE",
    "Probe",
    "Quality",
    "QualityMeter",
    "Rows",
    "SAEConfig",
    "TrainConfig",
    "auroc",
    "best_latent",
    "cross_entropy",
    "geometric_median",
    "group_sizes_of",
    "measure",
    "measure_by_role",
    "random_dictionary",
    "study_maxima",
    "threshold_for",
    "train",
    "train_all",
    "training_curve",
]
