"""Activations → dictionaries: Matryoshka BatchTopK SAEs, trained and measured."""

from sae.baselines import PCA, fit_pca, random_dictionary
from sae.calibrate import Calibration, calibrate_by_role, calibrate_threshold
from sae.codes import EvaluationConfig
from sae.cross_entropy import CrossEntropy, cross_entropy
from sae.evaluate import evaluate
from sae.formats import convert
from sae.intervals import Figure
from sae.latent_scores import auroc
from sae.latents import Latents, gather, heldout_rows, pool
from sae.live import LiveRows
from sae.maxima import Probe, StudyMaxima, best_latent, study_maxima
from sae.metrics import Quality, QualityMeter, measure, measure_by_role
from sae.model import MatryoshkaSAE, SAEConfig, geometric_median, group_sizes_of
from sae.probing import sparse_probes, splitting
from sae.stability import Stability, stability
from sae.stream import Batch, FolderRows, Rows
from sae.train import Interrupted, train, train_all, training_curve
from sae.trainer import TrainConfig

__all__ = [
    "PCA",
    "Batch",
    "Calibration",
    "CrossEntropy",
    "EvaluationConfig",
    "Figure",
    "FolderRows",
    "Interrupted",
    "Latents",
    "LiveRows",
    "MatryoshkaSAE",
    "Probe",
    "Quality",
    "QualityMeter",
    "Rows",
    "SAEConfig",
    "Stability",
    "StudyMaxima",
    "TrainConfig",
    "auroc",
    "best_latent",
    "calibrate_by_role",
    "calibrate_threshold",
    "convert",
    "cross_entropy",
    "evaluate",
    "fit_pca",
    "gather",
    "geometric_median",
    "group_sizes_of",
    "heldout_rows",
    "measure",
    "measure_by_role",
    "pool",
    "random_dictionary",
    "sparse_probes",
    "splitting",
    "stability",
    "study_maxima",
    "train",
    "train_all",
    "training_curve",
]
