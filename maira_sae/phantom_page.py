"""The phantom demonstration's page: the explorer with its findings and its steered reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from autointerp import latent_activations
from autointerp.dashboard import QUANTILES
from autointerp.evidence import added_texts
from autointerp.views import (
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
from hooks.images import read_image
from maira_sae.demo import HELDOUT

if TYPE_CHECKING:
    from maira_sae.phantom_demo import PhantomDemo

N_FILMS = 6
N_TEXTS = 4


def page_of(demo: PhantomDemo) -> ExplorerData:
    """Everything the stages before found; latents are shown on held-out patients."""
    findings = demo.results["label"]["findings"]
    films: dict[str, FilmView] = {}
    latents = [*_text_latents(demo, findings), *_vision_latents(demo, findings, films)]
    steering = []
    for one in demo.results["steer"]["steering_examples"]:
        key = f"{one['study']} plain"
        frontal = read_image(demo.by_id[one["study"]].frontal)
        films[key] = FilmView(frontal, one["study"])
        title = f"{_words(one['finding'])} turned {one['direction']}, {one['study']}"
        steering.append(SteeringView(title, one["before"], one["after"], key))
    quality = demo.results["evaluate"]
    vision = quality["vision_quality"]
    mean = demo.results["truth"]["mean_over_findings"]
    return ExplorerData(
        title="The phantom: what single latents know",
        subtitle="Fourteen findings, and the single latents that stand for them in reports and on "
        "films of held-out patients.",
        origin="Procedural films and their reports; nothing here is of a person.",
        baseline="random directions (AUROC) or another latent's label (detection)",
        latents=tuple(latents),
        films=films,
        facts={
            "Text": f"{quality['site']}, FVU {quality['fvu']:.3f} at L0 {quality['l0']:.1f}",
            "Vision": f"{vision['site']}, FVU {vision['fvu']:.3f} at L0 {vision['l0']:.1f}",
            "AUROC": f"{mean['auroc']:.3f} in sentences, {mean['patch_auroc']:.3f} on patches",
            "Random dictionary": f"{mean['random_auroc']:.3f}, {mean['random_patch_auroc']:.3f}",
        },
        findings=tuple(_row(name, finding) for name, finding in findings.items()),
        steering=tuple(steering),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _row(name: str, finding: dict[str, Any]) -> dict[str, Any]:
    patch = finding["patch_latent"]
    return {
        "finding": _words(name),
        "label": finding["label"],
        "text latent": LatentLink(f"text {finding['latent']}", str(finding["latent"])),
        "AUROC": finding["auroc"],
        "patch latent": LatentLink(f"vision {patch}", str(patch)),
        "patch AUROC": finding["patch_auroc"],
        "pixel AUROC": finding["pixel_auroc"],
    }


def _text_latents(demo: PhantomDemo, findings: dict[str, Any]) -> list[LatentView]:
    labels = {one["latent"]: one for one in demo.results["label"]["labels"]}
    places = ("latent", "probe_latent")
    numbers = list(dict.fromkeys(one[place] for one in findings.values() for place in places))
    folder = demo.activations("text")
    report = folder.column("role") == "report"
    values = latent_activations(demo.sae("text"), folder, numbers).numpy()
    views = []
    for i, latent in enumerate(numbers):
        own = {
            name: one
            for name, one in findings.items()
            if latent in (one["latent"], one["probe_latent"])
        }
        label = labels.get(latent, {"label": None, "balanced_accuracy": None})
        scores = [
            _agreement(one, "report", "auroc", "random_auroc")
            for one in own.values()
            if one["probe_latent"] == latent
        ]
        if label["balanced_accuracy"] is not None:
            accuracy, baseline = label["balanced_accuracy"], label["baseline"]
            scores.append(
                ScoreView("detection", "report", accuracy, None, baseline, label["n_scored"])
            )
        views.append(
            LatentView(
                latent,
                site="text",
                label=label["label"],
                finding=", ".join(map(_words, own)),
                scores=tuple(scores),
                modalities=(_activity("report", values[report, i]),),
                texts=_texts(demo, values[:, i]),
            )
        )
    return views


def _agreement(finding: dict[str, Any], where: str, key: str, random_key: str) -> ScoreView:
    return ScoreView("AUROC", where, finding[key], baseline=finding[random_key])


def _activity(modality: str, values: np.ndarray) -> ModalityView:
    fired = values[values > 0]
    if len(fired) == 0:
        return ModalityView(modality, len(values), 0)
    shares = [float(name[1:]) / 100 for name in QUANTILES]
    quantiles = dict(zip(QUANTILES, np.quantile(fired, shares).tolist(), strict=True))
    edges, counts = histogram(values)
    return ModalityView(
        modality, len(values), len(fired), float(fired.max()), quantiles, edges, counts
    )


def _texts(demo: PhantomDemo, values: np.ndarray) -> tuple[TextView, ...]:
    """Held-out reports in which a latent fires most."""
    folder = demo.activations("text")
    chosen = (folder.column("role") == "report") & folder.heldout(HELDOUT)
    studies, ids = folder.column("study"), folder.column("token_id")
    texts: dict[str, TextView] = {}
    for row in np.flatnonzero(chosen)[strongest(values[chosen], 200)]:
        study = str(studies[row])
        if len(texts) < N_TEXTS and study not in texts:
            own = chosen & (studies == study)
            words = added_texts(ids[own].tolist(), demo.loaded[1].tokenizer)
            texts[study] = TextView(study, tuple(words), tuple(values[own].tolist()))
    return tuple(texts.values())


def _vision_latents(
    demo: PhantomDemo, findings: dict[str, Any], films: dict[str, FilmView]
) -> list[LatentView]:
    maps = demo.maps([finding["patch_latent"] for finding in findings.values()])
    views = []
    for name, finding in findings.items():
        own = maps[finding["patch_latent"]]
        studies = list(own)
        heats = []
        for i in strongest([own[study].max() for study in studies], N_FILMS):
            study = studies[i]
            film = demo.frontals[study]
            boxes = tuple(
                (_words(found), (box.x0, box.y0, box.x1, box.y1))
                for found, box in film.boxes.items()
                if found == name
            )
            # The boxes of one finding: other latents see the same film with theirs.
            key = f"{study} {name}"
            has = "has it" if boxes else "has it not"
            films[key] = FilmView(Image.fromarray(film.pixels), f"{study}: {has}", boxes)
            heats.append(HeatView(key, own[study]))
        views.append(
            LatentView(
                finding["patch_latent"],
                site="vision",
                asked=False,
                finding=_words(name),
                scores=(_agreement(finding, "frontal", "patch_auroc", "random_patch_auroc"),),
                modalities=(_activity("frontal", np.stack(list(own.values())).ravel()),),
                heats=tuple(heats),
            )
        )
    return views


def strongest(values: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Places of the largest values, descending, ties in order.

    >>> strongest([1.0, 3.0, 3.0, 2.0], 3)
    [1, 2, 3]
    """
    return np.argsort(-np.asarray(values), kind="stable")[:count].tolist()
