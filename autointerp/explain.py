"""Labels for latents, each with its score on held-out patients and a shuffled-label baseline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from autointerp.client import Client, EndpointConfig, Ledger, Request
from autointerp.collect import LatentExamples, collect_examples
from autointerp.prompts import detect_messages, explain_messages
from autointerp.score import MAX_TOKENS as DETECT_TOKENS
from autointerp.score import Detection, detect
from autointerp.statistics import detect_by_words, statistics_label
from hooks.files import (
    ConfigError,
    FolderError,
    atomic_path,
    file_record,
    is_sealed,
    open_sealed,
    read_json,
    seal,
    write_json,
)
from hooks.progress import track
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE

KIND = "labels"
FORMAT_VERSION = 1
STATISTICS = "statistics"
"""Stands for the model in the record of labels that needed none."""
EXPLAIN_TOKENS = 24
MAX_WORDS = 12
"""A longer reply is cut; a concept is a short phrase."""


class LabelConfig(NamedTuple):
    """What is labelled and on how many examples."""

    latents: tuple[int, ...]
    n_explain: int = 10
    n_score: int = 20
    heldout: float = 0.2
    seed: int = 0


class Label(NamedTuple):
    """A latent's label, or ``None`` for "no clear concept", and how well it predicts firing."""

    latent: int
    label: str | None
    balanced_accuracy: float | None
    baseline: float | None
    """Balanced accuracy of another latent's label on the same sentences."""
    coverage: float
    n_scored: int
    reference: float
    """99th percentile of the latent where it fires, the unit of steering strength."""


def read_label(reply: str) -> str | None:
    """The first line of a reply as a short phrase, or ``None`` if it names no concept.

    >>> read_label('1. "Enlarged <<heart>>."'), read_label("None"), read_label("")
    ('Enlarged heart', None, None)
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    first = re.sub(r"^\s*(\d+[.)]|[-*]|Concept:)\s*|<<|>>", "", lines[0]) if lines else ""
    phrase = first.strip(" \t\"'`*.,")
    words = phrase.split()
    if not words or phrase.lower() in {"none", "n/a", "no clear concept", "no shared concept"}:
        return None
    return " ".join(words[:MAX_WORDS])


def label_latents(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    tokenizer: Any,
    endpoint: EndpointConfig | None,
    config: LabelConfig,
    out: Path,
    announce: Callable[[str], None] | None = None,
) -> list[Label]:
    """Explain each latent, score each label, and write the folder ``out``.

    What is left to ask, and what it may cost, goes to ``announce`` before the first request.
    Without an endpoint, labels are word statistics (:mod:`autointerp.statistics`).
    ``out/ledger.sqlite`` keeps every answer, so a run that stops loses nothing it paid for.
    Answers may quote reports; treat the ledger as you treat the reports.
    """
    if not config.latents:
        raise ConfigError("no latents to label; name at least one")
    record = {
        "config": {**config._asdict(), "latents": list(config.latents)},
        "model": endpoint.model if endpoint else STATISTICS,
        "site": sae.config.site,
    }
    path = out / "config.json"
    if path.is_file() and read_json(path) != record:
        raise FolderError(f"{out} holds other labels; give a new folder, or delete this one")
    if is_sealed(out):
        open_sealed(out, KIND, FORMAT_VERSION, "run `maira-sae label` again")
        return read_labels(out)
    write_json(path, record)

    examples = collect_examples(
        sae,
        folder,
        config.latents,
        n_explain=config.n_explain,
        n_score=config.n_score,
        heldout=config.heldout,
        seed=config.seed,
    )
    if endpoint:
        llm = _Llm(Client(endpoint, Ledger(out / "ledger.sqlite")), tokenizer)
        if announce:
            announce(llm.estimate(examples))
        llm.explain_ahead(examples)
        explainer: Explainer = llm
    else:
        explainer = _Words(tokenizer)
    texts = [
        explainer.explain(one) if one.explain else None
        for one in track(examples, "explain", total=len(examples))
    ]
    explainer.detect_ahead(
        [(text, one) for i, one in enumerate(examples) for text in _tested(texts, i) if text]
    )
    labels = [
        _scored(one, texts, i, explainer)
        for i, one in enumerate(track(examples, "score", total=len(examples)))
    ]
    with atomic_path(out / "labels.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(label._asdict()) + "\n" for label in labels))
    names = ("config.json", "labels.jsonl")
    seal(out, KIND, FORMAT_VERSION, {name: file_record(out / name) for name in names})
    return labels


class Explainer(Protocol):
    """Names a latent, and tests a name on held-out sentences."""

    def explain(self, examples: LatentExamples) -> str | None: ...

    def detect_ahead(self, pairs: Sequence[tuple[str, LatentExamples]]) -> None:
        """Told what :meth:`detect` will be asked, all at once."""
        ...

    def detect(self, label: str, examples: LatentExamples) -> Detection: ...


class _Llm:
    def __init__(self, client: Client, tokenizer: Any) -> None:
        self.client, self.tokenizer = client, tokenizer

    def estimate(self, examples: Sequence[LatentExamples]) -> str:
        """What is left to ask. Labels are not known yet: theirs are taken as long as may be."""
        first = self.client.estimate(self._explain_requests(examples))
        named = [one for one in examples if one.explain]
        longest = [(f"{'label ' * MAX_WORDS}{i}", one) for one in named for i in range(2)]
        second = self.client.estimate(self._detect_requests(longest))
        return f"explain: {first}; score, at most: {second}"

    def explain_ahead(self, examples: Sequence[LatentExamples]) -> None:
        """Ask for all labels at once, so that :meth:`explain` finds them in the ledger."""
        self.client.ask_all(self._explain_requests(examples), "explain")

    def detect_ahead(self, pairs: Sequence[tuple[str, LatentExamples]]) -> None:
        self.client.ask_all(self._detect_requests(pairs), "score")

    def _explain_requests(self, examples: Sequence[LatentExamples]) -> list[Request]:
        return [
            Request(explain_messages(one.explain, self.tokenizer), EXPLAIN_TOKENS)
            for one in examples
            if one.explain
        ]

    def _detect_requests(self, pairs: Sequence[tuple[str, LatentExamples]]) -> list[Request]:
        return [
            Request(detect_messages(label, sentence, self.tokenizer), DETECT_TOKENS)
            for label, one in pairs
            for sentence in (*one.positives, *one.negatives)
        ]

    def explain(self, examples: LatentExamples) -> str | None:
        messages = explain_messages(examples.explain, self.tokenizer)
        return read_label(self.client.ask(messages, EXPLAIN_TOKENS))

    def detect(self, label: str, examples: LatentExamples) -> Detection:
        return detect(label, examples, self.client, self.tokenizer)


class _Words:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def explain(self, examples: LatentExamples) -> str | None:
        return statistics_label(examples, self.tokenizer)

    def detect_ahead(self, pairs: Sequence[tuple[str, LatentExamples]]) -> None:
        pass

    def detect(self, label: str, examples: LatentExamples) -> Detection:
        return detect_by_words(label, examples, self.tokenizer)


def _tested(texts: Sequence[str | None], i: int) -> tuple[str | None, str | None]:
    """A latent's label and the other label it is held against; none where it has no label."""
    text = texts[i]
    others = [t for t in (*texts[i + 1 :], *texts[:i]) if t is not None and t != text]
    return text, others[0] if text and others else None


def _scored(
    examples: LatentExamples, texts: Sequence[str | None], i: int, explainer: Explainer
) -> Label:
    text, other = _tested(texts, i)
    own = explainer.detect(text, examples) if text else None
    shuffled = explainer.detect(other, examples) if other else None
    return Label(
        latent=examples.latent,
        label=text,
        balanced_accuracy=own.balanced_accuracy if own else None,
        baseline=shuffled.balanced_accuracy if shuffled else None,
        coverage=own.coverage if own else 0.0,
        n_scored=own.n if own else 0,
        reference=examples.reference,
    )


def read_labels(folder: Path) -> list[Label]:
    """Labels of a finished folder."""
    open_sealed(folder, KIND, FORMAT_VERSION, "run `maira-sae label` to make it")
    lines = (folder / "labels.jsonl").read_text().splitlines()
    return [Label(**json.loads(line)) for line in lines]
