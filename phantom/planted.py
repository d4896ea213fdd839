"""Activations made of features that are known: a dictionary's known answer, without a model.

Row i is `Σ_f coefficients[i, f] · directions[f] + noise`. There are more features than dimensions
(superposition), a child is on only where its parent is (hierarchy), and parents and flat features
come in blocks that are on together more often than by chance (correlation); rows of one patient
are more alike than others.

Letters: n rows, d dimensions, L features.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks.files import atomic_path, file_record, is_sealed, open_sealed, seal
from hooks.roles import NONE, Role, Tokens
from hooks.store import ActivationFolder, ActivationWriter, StudyRows
from phantom.factors import PhantomError

KIND = "planted-truth"
FORMAT_VERSION = 1
SITE = "planted"


@dataclass(frozen=True)
class PlantedConfig:
    """Everything that decides the rows."""

    d_model: int = 48
    """Width d; fewer than features, so that directions cannot be orthogonal."""
    n_parents: int = 12
    children: int = 4
    """Of each parent."""
    n_flat: int = 24
    """Features that are neither parent nor child."""
    parent_rate: float = 0.12
    """Share of rows a parent is on."""
    child_rate: float = 0.25
    """Share of the parent's rows a child is on, whatever its siblings do."""
    flat_rate: float = 0.05
    block: int = 4
    """Parents, and flat features, that make one correlated block."""
    correlation: float = 0.3
    """Of the normal variables, within a block, whose largest values are where features are on."""
    patient_share: float = 0.1
    """Share of those variables' variance that all rows of a patient have in common."""
    spread: float = 0.2
    """Standard deviation of a coefficient about its mean, 1; at least 0.1 is left."""
    noise: float = 0.02
    """Standard deviation of the noise, in each dimension."""
    n_studies: int = 400
    """Two a patient."""
    rows_per_study: int = 500
    studies_per_part: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features <= self.d_model:
            raise PhantomError(
                f"{self.n_features} features in {self.d_model} dimensions are no superposition; "
                "ask for more features, or fewer dimensions"
            )
        for name in ("parent_rate", "child_rate", "flat_rate"):
            if not 0 < getattr(self, name) < 1:
                raise PhantomError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.correlation < 0 or self.patient_share < 0 or self.correlated > 1:
            raise PhantomError(
                f"correlation {self.correlation} and patient_share {self.patient_share} sum to "
                f"{self.correlated}; they must be at least 0 and sum to at most 1"
            )

    @property
    def n_features(self) -> int:
        """L: parents first, then children by parent, then flat features."""
        return self.n_parents * (1 + self.children) + self.n_flat

    @property
    def correlated(self) -> float:
        """Share of variance that is not a feature's own."""
        return self.correlation + self.patient_share

    @property
    def parents(self) -> Int[np.ndarray, " L"]:
        """The parent of every feature, -1 where it has none."""
        out = np.full(self.n_features, -1)
        first = self.n_parents
        out[first : first + self.n_parents * self.children] = np.repeat(
            np.arange(self.n_parents), self.children
        )
        return out

    @property
    def expected_l0(self) -> float:
        """Mean features on in a row."""
        inside = self.n_parents * self.parent_rate * (1 + self.children * self.child_rate)
        return inside + self.n_flat * self.flat_rate


def directions_of(config: PlantedConfig) -> Float[np.ndarray, "L d"]:
    """Unit directions, random but pushed apart: descent on the sum of fourth powers of cosines.

    Random ones would leave a few pairs so close that no dictionary tells them apart.
    """
    rng = np.random.default_rng([config.seed, 0])
    out = rng.standard_normal((config.n_features, config.d_model))
    for _ in range(300):
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        cosines = out @ out.T
        np.fill_diagonal(cosines, 0)
        out -= cosines**3 @ out
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def coefficients_of(config: PlantedConfig, part: int) -> Float[np.ndarray, "n L"]:
    """Coefficients of a part's rows, study by study; 0 where a feature is off."""
    rng = np.random.default_rng([config.seed, 1, part])
    first = part * config.studies_per_part
    studies = np.arange(first, min(first + config.studies_per_part, config.n_studies))
    patients = np.repeat(studies // 2, config.rows_per_study)
    n, m = len(patients), config.n_parents
    free = np.r_[np.arange(m), np.arange(m * (1 + config.children), config.n_features)]
    blocks = np.r_[np.arange(m) // config.block, -1 - np.arange(config.n_flat) // config.block]
    _, block = np.unique(blocks, return_inverse=True)
    own = rng.standard_normal((n, len(free)))
    shared = rng.standard_normal((n, block.max() + 1))[:, block]
    patient = np.empty((n, len(free)))
    for one in np.unique(patients):  # seeded by patient: a patient's studies may lie in two parts
        values = np.random.default_rng([config.seed, 2, one]).standard_normal(len(free))
        patient[patients == one] = values
    normal = (
        np.sqrt(1 - config.correlated) * own
        + np.sqrt(config.correlation) * shared
        + np.sqrt(config.patient_share) * patient
    )
    rates = np.r_[np.full(m, config.parent_rate), np.full(config.n_flat, config.flat_rate)]
    on = np.zeros((n, config.n_features), dtype=bool)
    on[:, free] = normal > [NormalDist().inv_cdf(1 - rate) for rate in rates]
    parents = config.parents
    children = np.flatnonzero(parents >= 0)
    on[:, children] = rng.random((n, len(children))) < config.child_rate
    on[:, children] &= on[:, parents[children]]
    sizes = 1 + config.spread * rng.standard_normal(on.shape)
    return np.where(on, np.maximum(sizes, 0.1), 0.0)


class Planted(NamedTuple):
    """What a planted activation folder is made of."""

    config: PlantedConfig
    activations: ActivationFolder
    directions: Float[Tensor, "L d"]
    """Unit vectors."""
    on: Bool[Tensor, "n L"]
    """Which feature is on in which row of the activation folder."""
    parents: Int[Tensor, " L"]
    """The parent of every feature, -1 where it has none."""

    def children_of(self, parent: int) -> list[int]:
        """Features whose parent it is."""
        return (self.parents == parent).nonzero().flatten().tolist()


def plant(config: PlantedConfig, out: Path) -> Planted:
    """Write `out/activations`, an ordinary activation folder, and `out/truth`; or read them.

    Raises:
        FolderError: `out` holds planted rows of another config.
    """
    n_parts = -(-config.n_studies // config.studies_per_part)
    directions = directions_of(config)
    writer = ActivationWriter(out / "activations", {"planted": asdict(config)})
    if not is_sealed(out / "activations"):
        for part in range(n_parts):
            if not writer.has(part):
                writer.write(part, _studies(config, part, directions), [SITE])
        writer.seal(
            n_parts,
            sites=[SITE],
            harvest={"policy": "all", "store_dtype": "float32"},
            model={"id": "planted features", "seed": config.seed},
        )
    if not is_sealed(out / "truth"):
        on = np.concatenate([coefficients_of(config, part) > 0 for part in range(n_parts)])
        truth = {
            "directions": torch.from_numpy(directions).float(),
            "on": torch.from_numpy(on),
            "parents": torch.from_numpy(config.parents),
        }
        path = out / "truth" / "truth.safetensors"
        with atomic_path(path) as temporary:
            save_file(truth, temporary)
        seal(
            path.parent, KIND, FORMAT_VERSION, {path.name: file_record(path)}, config=asdict(config)
        )
    return read_planted(out)


def read_planted(out: Path) -> Planted:
    """What `plant` wrote.

    Raises:
        FolderError: it is missing, unfinished or damaged.
    """
    remedy = "call phantom.planted.plant to make it"
    manifest = open_sealed(out / "truth", KIND, FORMAT_VERSION, remedy)
    truth = load_file(out / "truth" / "truth.safetensors")
    return Planted(
        config=PlantedConfig(**manifest["config"]),
        activations=ActivationFolder(out / "activations"),
        directions=truth["directions"],
        on=truth["on"],
        parents=truth["parents"],
    )


def _studies(
    config: PlantedConfig, part: int, directions: Float[np.ndarray, "L d"]
) -> list[StudyRows]:
    coefficients = coefficients_of(config, part)
    rng = np.random.default_rng([config.seed, 3, part])
    x = coefficients @ directions
    x += config.noise * rng.standard_normal(x.shape)
    size, first = config.rows_per_study, part * config.studies_per_part
    none = np.full(size, NONE, dtype=np.int16)
    tokens = Tokens(
        ids=np.zeros(size, dtype=np.int64),
        role=np.full(size, Role.REPORT, dtype=np.int8),
        view=none,
        row=none,
        column=none,
        sentence=none,
    )
    return [
        StudyRows(
            study=f"study{first + i}",
            patient=f"patient{(first + i) // 2}",
            sequence=first + i,
            positions=np.arange(size),
            tokens=tokens,
            activations={SITE: torch.from_numpy(rows).float()},
        )
        for i, rows in enumerate(np.split(x, len(x) // size))
    ]
