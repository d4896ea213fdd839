"""Two-way entailment of reports by a language model, in the manner of RadFact (MAIRA-2, 2024).

Each sentence of one report is judged against the whole other report, in both directions. A
judgement that failed is missing: RadFact itself counts it as not entailed, which biases the figures
down where the endpoint is unreliable.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ValidationError

from hooks.files import FolderError, atomic_path
from hooks.grounding import parse_grounded
from steering.sentences import split_sentences

_SYSTEM = (
    "You compare findings of radiology reports. Say whether the reference report supports the "
    'sentence. Answer with JSON: {"verdict": "entailed" or "not_entailed"}. A sentence is entailed '
    "only if everything it says follows from the reference."
)


class Verdict(BaseModel):
    """What the language model answers."""

    verdict: Literal["entailed", "not_entailed"]


class Ask(Protocol):
    """Sends a conversation to a language model; None when no answer came."""

    def __call__(
        self, messages: Sequence[dict[str, str]], schema: type[BaseModel], /
    ) -> str | None: ...


class Entailment(NamedTuple):
    """Sentences of two reports, each with whether the other supports it; None is missing."""

    before: list[bool | None]
    """Of the plain report, against the steered one."""
    after: list[bool | None]
    """Of the steered report, against the plain one."""

    @property
    def missing(self) -> int:
        """Judgements that failed."""
        return sum(verdict is None for verdict in (*self.before, *self.after))

    @property
    def precision(self) -> float | None:
        """Share of the steered report's judged sentences that the plain report entails."""
        return _share(self.after)

    @property
    def recall(self) -> float | None:
        """Share of the plain report's judged sentences that the steered report entails."""
        return _share(self.before)


def _share(verdicts: Iterable[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


def entailment(before: str, after: str, ask: Ask) -> Entailment:
    """Judge every sentence of each report against the other report."""
    return Entailment(
        [_judge(sentence, after, ask) for sentence in split_sentences(before)],
        [_judge(sentence, before, ask) for sentence in split_sentences(after)],
    )


def _judge(sentence: str, reference: str, ask: Ask) -> bool | None:
    reply = ask(
        [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"Reference: {reference}\nSentence: {sentence}"},
        ],
        Verdict,
    )
    if not reply:
        return None
    try:
        return Verdict.model_validate_json(reply).verdict == "entailed"
    except ValidationError:
        return None


def write_radfact(reports: Sequence[tuple[str, str, str]], path: Path, *, bins: int = 100) -> None:
    """Write ``(example id, steered, plain)`` in a format that RadFact reads.

    ``.csv`` is its format for narrative reports (run with ``--is_narrative_text``), ``.json`` that
    for grounded ones: lists of phrases with their boxes. The plain report is the target.

    Raises
    ------
    FolderError
        For another ending of the name, or a report without a phrase, which RadFact forbids.
    """
    if path.suffix == ".csv":
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("example_id", "prediction", "target"))
            writer.writerows(reports)
        return
    if path.suffix != ".json":
        raise FolderError(f"{path} is neither .csv (narrative) nor .json (grounded); name one")
    examples = [
        {"example_id": name, "prediction": _phrases(new, bins), "target": _phrases(old, bins)}
        for name, new, old in reports
    ]
    for example in examples:
        for side in ("prediction", "target"):
            if not example[side]:
                raise FolderError(f"{side} of {example['example_id']} has no phrase; leave it out")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(examples, indent=1))


def _phrases(text: str, bins: int) -> list[dict[str, Any]]:
    found = parse_grounded(text, bins)
    if isinstance(found, str):
        return [{"text": sentence, "boxes": None} for sentence in split_sentences(found)]
    return [
        {"text": text, "boxes": [box._asdict() for box in boxes] if boxes else None}
        for text, boxes in found
    ]
