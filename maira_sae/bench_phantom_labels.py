"""Are planted findings named? Labels of a demonstration's text latents, by a scripted labeller.

    python -m maira_sae.bench_phantom_labels FEATURES --ledger DIR

Every latent that fires is explained over real HTTP. Of the latents whose label names a finding, the
one of best balanced accuracy on the explaining patients is scored on the scoring patients, beside
the labels of the other findings. The truth decides nothing but which finding a label names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

from autointerp.client import Client, EndpointConfig, Ledger
from autointerp.detection import ask, questions
from autointerp.explainers import Explanation, text_request
from autointerp.features import Features
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


def measure(features: Features, tokenizer: Any, client: Client, side: str) -> dict[str, Any]:
    """A record for every finding."""
    asked = {n: text_request(features, n, tokenizer, "report") for n in features.alive()}
    asked = {latent: request for latent, request in asked.items() if request}
    found = client.ask_all(list(asked.values()), "explain")
    read = {n: cast(Explanation | None, one.value) for n, one in zip(asked, found, strict=True)}
    labels = {n: e.label for n, e in read.items() if e and e.label}
    sure = {n: e.confidence for n, e in read.items() if e}
    offered = {
        finding: sorted((n for n in labels if names(finding, labels[n])), key=lambda n: -sure[n])
        for finding in LABELS
    }
    tried = {n for some in offered.values() for n in some[:CANDIDATES]}
    on_explain = ask(
        client,
        {n: questions(features, n, labels[n], tokenizer, side="explain") for n in tried},
    )
    merit = {n: judge(n, "detection", "report", v).value or 0.0 for n, v in on_explain.items()}
    chosen = {
        finding: max(some[:CANDIDATES], key=lambda n: merit[n])
        for finding, some in offered.items()
        if some
    }
    pairs = {
        (finding, other): questions(features, n, labels[chosen[other]], tokenizer, side=side)
        for finding, n in chosen.items()
        for other in chosen
    }
    verdicts = ask(client, pairs)
    strongly = ask(
        client,
        {
            (finding, other): questions(
                features, n, labels[chosen[other]], tokenizer, side=side, strong=True
            )
            for finding, n in chosen.items()
            for other in chosen
        },
    )
    records: dict[str, Any] = {}
    for finding, n in chosen.items():
        records[finding] = {"latent": n, "label": labels[n]}
        for prefix, said in (("", verdicts), ("strong_", strongly)):
            own = judge(n, "detection", "report", said[finding, finding])
            others = [
                judge(n, "detection", "report", said[finding, other]).value
                for other in chosen
                if labels[chosen[other]] != labels[n]
            ]
            known = [value for value in others if value is not None]
            records[finding] |= {
                f"{prefix}balanced_accuracy": own.value,
                f"{prefix}standard_error": own.standard_error,
                f"{prefix}shuffled": sum(known) / len(known) if known else None,
                f"{prefix}coverage": own.coverage,
                f"{prefix}n": own.n,
            }
    return {"findings": records, "named": len(chosen), "of": len(LABELS), "labelled": len(labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", type=Path)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--side", choices=("score", "steer"), default="score", help="patients")
    arguments = parser.parse_args()
    tokenizer = load_processor(str(WEIGHTS)).tokenizer
    arguments.ledger.mkdir(parents=True, exist_ok=True)
    with serving(Script(), reply) as server:
        endpoint = EndpointConfig(server.url, "scripted")
        client = Client(endpoint, Ledger(arguments.ledger / "ledger.sqlite"))
        result = measure(Features.open(arguments.features), tokenizer, client, arguments.side)
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
