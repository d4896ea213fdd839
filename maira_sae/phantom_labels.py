"""Are the planted findings named? Labels of a demonstration's text latents.

Of the latents whose label names a finding, the one of best balanced accuracy on the explaining
patients is scored on the scoring patients, beside the labels of the other findings. The truth
decides nothing but which finding a label names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import questions
from autointerp.features import Features
from autointerp.labelling import LabelConfig, Labeller, Llm, label_latents
from autointerp.labels import Label
from autointerp.scores import judge
from autointerp.statistics import words_of
from hooks.processor import load_processor
from maira_sae.scripted_labeller import reply
from maira_sae.scripted_server import Script, serving
from phantom.factors import LABELS
from phantom.model import WEIGHTS

CANDIDATES = 10
"""Latents a finding is offered, by the explainer's confidence."""
SIDES = {"left", "right"}
PLACES = {"upper", "lower"}
CARDIOMEGALY = ({"cardiomegaly"}, {"heart", "enlarged"}, {"heart", "enlargement"})
CARDIOMEGALY += ({"cardiac", "enlarged"},)


def names(finding: str, label: str) -> bool:
    """Whether a label names a finding, its side and zone included, and no other side or zone.

    >>> names("effusion_left", "small left effusion"), names("effusion_left", "pleural effusion")
    (True, False)
    """
    words = set(words_of(label))
    if finding == "cardiomegaly":
        return any(form <= words for form in CARDIOMEGALY)
    wanted = set(finding.split("_"))
    return wanted <= words and not (words & (SIDES | PLACES)) - wanted


def named_findings(
    features: Features,
    labels: Sequence[Label],
    labeller: Labeller,
    tokenizer: Any,
    side: str = "score",
) -> dict[str, dict[str, Any]]:
    """A record for every finding that a label names, scored on the patients of ``side``."""
    text = {one.latent: one.label for one in labels if one.label}
    sure = {one.latent: one.confidence or 0.0 for one in labels}
    offered = {
        finding: sorted((n for n in text if names(finding, text[n])), key=lambda n: -sure[n])
        for finding in LABELS
    }
    tried = {n for some in offered.values() for n in some[:CANDIDATES]}

    def judged(asked: Mapping[Any, tuple[int, str]], patients: str, strong: bool) -> Any:
        held = {
            key: questions(features, n, label, tokenizer, side=patients, strong=strong)
            for key, (n, label) in asked.items()
        }
        said = labeller.detect(held)
        return {key: judge(asked[key][0], "detection", "report", v) for key, v in said.items()}

    merit = judged({n: (n, text[n]) for n in tried}, "explain", False)
    chosen = {
        finding: max(some[:CANDIDATES], key=lambda n: merit[n].value or 0.0)
        for finding, some in offered.items()
        if some
    }
    pairs = {(f, o): (n, text[chosen[o]]) for f, n in chosen.items() for o in chosen}
    records: dict[str, Any] = {f: {"latent": n, "label": text[n]} for f, n in chosen.items()}
    for prefix, strong in (("", False), ("strong_", True)):
        scores = judged(pairs, side, strong)
        for finding, n in chosen.items():
            own = scores[finding, finding]
            known = [
                scores[finding, other].value
                for other in chosen
                if text[chosen[other]] != text[n] and scores[finding, other].value is not None
            ]
            records[finding] |= {
                f"{prefix}balanced_accuracy": own.value,
                f"{prefix}standard_error": own.standard_error,
                f"{prefix}shuffled": sum(known) / len(known) if known else None,
                f"{prefix}coverage": own.coverage,
                f"{prefix}n": own.n,
            }
    return records


def run(features: Path, ledger: Path, side: str) -> dict[str, Any]:
    """Label every latent by the scripted labeller over real HTTP, and find the findings."""
    tokenizer = load_processor(str(WEIGHTS)).tokenizer
    found = Features.open(features)
    with serving(Script(), reply) as server:
        client = Client(EndpointConfig(server.url, "scripted"), Ledger(ledger / "ledger.sqlite"))
        labeller = Llm(client, tokenizer)
        config = LabelConfig(tuple(sorted(found.alive())))
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
        f"{_shown(one['shuffled'])}), strong firings {_shown(one['strong_balanced_accuracy'])}  "
        f"{one['label']}"
        for name, one in result["findings"].items()
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
