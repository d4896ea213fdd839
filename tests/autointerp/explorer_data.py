"""Made-up latents by the thousand for the tests of the explorer."""

import numpy as np
from PIL import Image

from autointerp.views import (
    DoseView,
    ExplorerData,
    FilmView,
    HeatView,
    LatentLink,
    LatentView,
    ModalityView,
    ScoreView,
    SteeringView,
    TextView,
    histogram,
)

WORDS = (
    "the lungs are clear . heart size is normal left pleural effusion small right basal opacity "
    "no pneumothorax or consolidation seen stable cardiomegaly tip of the catheter projects over "
    "superior vena cava degenerative changes spine unchanged from prior mild pulmonary oedema"
).split()
FINDINGS = ("effusion", "cardiomegaly", "opacity", "pneumothorax", None)
HOSTILE = '</script><img src=x onerror=alert(1)> "quoted" \'single\' & שלום'


def film(rng, side):
    """Smooth noise with grain, about as hard to encode as a chest film."""
    coarse = Image.fromarray(rng.integers(0, 256, (14, 12)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((side, int(side * 1.15)), Image.Resampling.BICUBIC), float)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def heat(rng, grid):
    """A few blobs on ``[grid, grid]`` patches, the rest silent."""
    y, x = np.mgrid[:grid, :grid]
    values = np.zeros((grid, grid))
    for _ in range(3):
        cy, cx, size = rng.uniform(0, grid, 2).tolist() + [rng.uniform(1, grid / 8)]
        values += rng.uniform(0.5, 8) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2))
    return np.where(values > 0.3, values + rng.normal(0, 0.05, values.shape), 0).clip(0)


def text(rng, i, kind="top"):
    tokens = [f" {WORDS[j]}" for j in rng.integers(0, len(WORDS), 36)]
    values = np.where(rng.random(36) < 0.15, rng.gamma(2, 2, 36), 0)
    return TextView(f"study-{i}", tuple(tokens), tuple(values.tolist()), "report", kind)


def explorer_data(n=2000, n_films=1200, side=1024, grid=37, per_latent=8, seed=0):
    """``n`` latents on ``n_films`` films of about ``side`` pixels, MAIRA-2's patch grid."""
    rng = np.random.default_rng(seed)
    # Films differ, but drawing each anew would take longer than what is tested.
    drawn = [film(rng, side) for _ in range(min(n_films, 24))]
    films = {
        f"f{i}": FilmView(
            drawn[i % len(drawn)],
            f"study-{i} frontal",
            (("effusion", (0.1, 0.5, 0.4, 0.9)),) if i % 3 == 0 else (),
        )
        for i in range(n_films)
    }
    heats = [heat(rng, grid) for _ in range(64)]
    latents = []
    for i in range(n):
        values = rng.gamma(2, 1.5, 2000)
        edges, counts = histogram(values)
        modalities = tuple(
            ModalityView(
                name, 400_000, int(10 ** rng.uniform(1, 4.5)), float(values.max()),
                {"p50": 2.1, "p99": 7.7}, edges, counts,
            )
            for name in ("frontal", "lateral", "report")
        )  # fmt: skip
        first = rng.choice(n_films, per_latent, replace=False)
        latents.append(
            LatentView(
                latent=i,
                label=None if i % 10 == 9 else " ".join(rng.choice(WORDS, 4)),
                confidence=0.8,
                explainer="a model",
                finding=FINDINGS[i % 5],
                dense=i % 50 == 0,
                scores=(
                    ScoreView("detection", "report", float(rng.uniform(0.5, 1)), 0.02, 0.5, 40),
                    ScoreView("fuzzing", "report", float(rng.uniform(0.5, 1)), 0.03, 0.5, 40),
                ),
                modalities=modalities,
                heats=tuple(
                    HeatView(f"f{f}", heats[rng.integers(64)] * rng.uniform(0.5, 1)) for f in first
                ),
                texts=tuple(text(rng, j) for j in range(per_latent))
                + tuple(text(rng, j, "random_silent") for j in range(3)),
                promoted=tuple((f" {w}", float(v)) for w, v in zip(WORDS[:8], range(8, 0, -1), strict=True)),
                suppressed=tuple((f" {w}", -float(v)) for w, v in zip(WORDS[8:16], range(8, 0, -1), strict=True)),
                neighbours=tuple((int((i + d) % n), 0.9 - d / 10) for d in range(1, 6)),
            )
        )  # fmt: skip
    steering = SteeringView("effusion turned on", "no effusion .", "left effusion .", "f0")
    return ExplorerData(
        title="Made-up latents",
        subtitle="Latents of noise, to see whether the page holds them.",
        origin="Noise, of nobody.",
        latents=tuple(latents),
        films=films,
        facts={"Dictionary": "llm.15.resid_post, 16,384 latents", "FVU": "0.12 at L0 40"},
        findings=(
            {"finding": "effusion", "AUROC": 0.91, "latent": LatentLink("1", "1")},
            {"finding": "nodule", "AUROC": 0.97, "latent": LatentLink("2", "2")},
        ),
        steering=(steering,),
        doses=(DoseView("reports that state it", (0, 1, 2, 4), (0.1, 0.3, 0.7, 0.8), (0, 0.2, 0.6, 0.7), (0.2, 0.4, 0.8, 0.9)),),
    )  # fmt: skip
