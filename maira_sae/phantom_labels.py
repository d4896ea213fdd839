"""Are the planted findings named? Labels of a demonstration's text latents.

Of the latents whose label names a finding, the one of best balanced accuracy on the explaining
patients (:attr:`autointerp.labels.Label.fit`) is scored on the scoring patients, beside the labels
of the other findings. The truth decides nothing but which finding a label names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import questions
from autointerp.features import Features
from autointerp.label_config import LabelConfig
from autointerp.labellers import Labeller, Llm
from autointerp.labelling import label_latents
from autointerp.labels import Label
from autointerp.scores import judge
from autointerp.statistics import words_of
from hooks.processor import load_processor
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, serving
from phantom.factors import LABELS
from phantom.model import WEIGHTS

SIDES = {"left", "right"}
PLACES = {"upper", "lower"}
THINGS = {"effusion", "pacemaker", "endotracheal", "nasogastric", "nodule", "pneumothorax"}
THINGS |= {"consolidation", "cardiomegaly"}
CARDIOMEGALY = ({"cardiomegaly"}, {"heart", "enlarged"}, {"heart", "enlargement"})
CARDIOMEGALY += ({"cardiac", "enlarged"},)


def names(finding: str, label: str) -> bool:
    """Whether a label names a finding, its side and zone included, and no other thing or place.

    >>> names("effusion_left", "small left effusion"), names("effusion_left", "pleural effusion")
    (True, False)
    """
    words = set(words_of(label))
    if finding == "cardiomegaly":
        return any(form <= words for form in CARDIOMEGALY)
    wanted = set(finding.split("_"))
    return wanted <= words and not (words & (SIDES | PLACES | THINGS)) - wanted


def named_findings(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
) -> dict[str, dict[str, Any]]:
    """A record for every finding that a label names, scored on the patients of ``side``.

    ``balanced_accuracy`` counts the latent as on above the threshold that its label states, and as
    off below; ``any_balanced_accuracy`` counts every firing as on.
    """
    text = {one.latent: one for one in labels if one.label}
    offered = {f: [n for n in text if names(f, text[n].label or "")] for f in LABELS}
    chosen = {f: max(some, key=lambda n: text[n].fit or 0.0) for f, some in offered.items() if some}
    said_of = {f: text[n].label or "" for f, n in chosen.items()}
    records: dict[str, Any] = {
        f: {
            **{"latent": n, "label": said_of[f], "threshold": text[n].threshold},
            "threshold_share": text[n].threshold / largest(features, n),
            "fit": text[n].fit,
        }
        for f, n in chosen.items()
    }
    for prefix, stated in (("", True), ("any_", False)):
        asked = {}
        for f, n in chosen.items():
            threshold = text[n].threshold if stated else 0.0
            for other in chosen:
                asked[f, other] = questions(
                    *(features, n, said_of[other], tokenizer), side=side, threshold=threshold
                )
        answers = labeller.detect(asked)
        scores = {
            key: judge(chosen[key[0]], "detection", "report", said) for key, said in answers.items()
        }
        for f in chosen:
            own = scores[f, f]
            others = [scores[f, o].value for o in chosen if said_of[o] != said_of[f]]
            known = [value for value in others if value is not None]
            records[f] |= {
                f"{prefix}balanced_accuracy": own.value,
                f"{prefix}standard_error": own.standard_error,
                f"{prefix}shuffled": sum(known) / len(known) if known else None,
                f"{prefix}coverage": own.coverage,
                f"{prefix}n": own.n,
                f"{prefix}n_on": sum(question.truth for question in asked[f, f]),
            }
    return records


def largest(features: Features, latent: int) -> float:
    """A latent's largest activation on explaining patients."""
    return max(one.peak for one in features.examples(latent, "report", "top", "explain"))


def run(features: Path, ledger: Path, side: str) -> dict[str, Any]:
    """Label every latent by the scripted labeller over real HTTP, and find the findings."""
    tokenizer = load_processor(str(WEIGHTS)).tokenizer
    found = Features.open(features)
    with serving(Script(), reply) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(ledger / "ledger.sqlite"))
        labeller = Llm(client, tokenizer)
        config = LabelConfig(tuple(sorted(found.alive())), calibrate=True)
        labels = label_latents(found, labeller, config, ledger)
        findings = named_findings(found, labels, labeller, tokenizer, side)
    return {
        "findings": findings,
        "named": len(findings),
        "of": len(LABELS),
        "labelled": sum(one.label is not None for one in labels),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{result['named']} of {result['of']} findings are named"]
    lines += [
        f"{name:<22} {one['latent']:>5}  {_shown(one['balanced_accuracy'])} (other labels "
        f"{_shown(one['shuffled'])}) above {one['threshold_share']:.2f} of the maximum, any firing "
        f"{_shown(one['any_balanced_accuracy'])}  "
        f"{one['label']}"
        for name, one in result["findings"].items()
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
