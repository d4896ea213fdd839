"""A features folder, labels and scores as Neuronpedia imports them.

``<model>/<source>/`` with ``release.jsonl``, ``model.jsonl``, ``sourceset.jsonl``, ``source.jsonl``
and, 1,024 features a file, ``features/batch-N.jsonl.gz``, ``activations/…``, ``explanations/…``,
``explanation_scores/…``; ``config/`` has the kinds of explanations and scores that these rows name.
The columns are those of its tables. Its bulk import reads all but the scores, which it has a table
for and no file. :func:`uploads` gives the payloads of its API instead
(``POST /api/feature/upload-batch``).

It knows no films: a patch is a token ``image_patch_<row>_<column>``. It has one firing rate a
feature, here the share of all rows.

Nothing of a patient is written unless it is asked for: without ``text`` each token of a report is
:data:`REDACTED`, without ``films`` no activation on a film is there at all (the maps of many
latents together show the film), and studies have no name. With either, studies are numbered in the
order in which they come, never named.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.evidence import OutputTokens, token_texts
from autointerp.features import IMAGES, SILENT, Example, Features
from autointerp.labels import Label
from autointerp.redact import redact
from autointerp.scores import Score
from hooks.files import ConfigError, atomic_folder, write_json
from sae.formats.labels import hook_of_site
from sae.model import MatryoshkaSAE

REDACTED = "▇"
"""Stands for a token of a report."""
BATCH = 1024
"""Features a file."""
UPLOAD = 128
"""Most features that the API takes at once."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""Neuronpedia's own default user, whom its importer puts in."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class NeuronpediaConfig:
    """What the rows are called, and what of patients is in them."""

    model: str = "maira-2"
    """Neuronpedia's id of the model: letters, digits, dash, underscore; lower case there."""
    source_set: str = ""
    """Name of the dictionary's set; default: ``maira-sae-<tower>-<place>``."""
    release: str = "maira-sae"
    creator: str = "unknown"
    """Who made the dictionary."""
    creator_id: str = CREATOR
    max_examples: int = 20
    """Of a latent and modality, strongest first."""
    text: bool = False
    """Write the words of reports."""
    films: bool = False
    """Write where on films a latent fires."""

    def __post_init__(self) -> None:
        for name in ("model", "release"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; use letters, digits, - and _, as "
                    "Neuronpedia does"
                )
        if self.source_set and not _NAME.fullmatch(self.source_set):
            raise ConfigError(
                f"source_set is {self.source_set!r}; use letters, digits, - and _, as Neuronpedia "
                "does"
            )
        if self.max_examples < 0:
            raise ConfigError(f"max_examples is {self.max_examples}; give 0 or more")


@dataclass(frozen=True)
class Material:
    """What an export is made of."""

    features: Features
    labels: Sequence[Label] = ()
    scores: Sequence[Score] = ()
    judge: str = "statistics"
    """Model that answered the scorers."""
    sae: MatryoshkaSAE | None = None
    """For the decoder's directions."""
    tokenizer: Any = None
    """Needed for the words of reports."""
    output_tokens: Mapping[int, OutputTokens] = field(default_factory=dict)
    """Of each latent (:func:`autointerp.evidence.model_output_tokens`)."""
    latents: Sequence[int] = ()
    """Default: those that fire, and are not dense, and those labelled."""

    @property
    def chosen(self) -> list[int]:
        """The latents, ascending."""
        named = {one.latent for one in self.labels if one.label}
        return sorted(self.latents or named | set(self.features.alive()))


class _Rows:
    """Rows of one export, made latent by latent."""

    def __init__(self, material: Material, config: NeuronpediaConfig) -> None:
        if config.text and material.tokenizer is None:
            raise ConfigError("the words of reports need a tokenizer; give one, or leave text out")
        self.material, self.config = material, config
        site = material.features.site
        found = re.fullmatch(r"(\w+)\.(\d+)\.(\w+)", site)
        tower, layer, place = found.groups() if found else (site, "0", "out")
        self.set = config.source_set or f"maira-sae-{tower}-{place}".replace("_", "-")
        self.model = config.model.lower()
        self.source = f"{layer}-{self.set}"
        self.hook = hook_of_site(site)
        self.labels = {one.latent: one for one in material.labels if one.label}
        self.scores: dict[int, list[Score]] = {}
        for score in material.scores:
            if score.value is not None:
                self.scores.setdefault(score.latent, []).append(score)
        self.studies: dict[str, int] = {}

    def place(self, latent: int) -> dict[str, Any]:
        return {"modelId": self.model, "layer": self.source, "index": str(latent)}

    def feature(self, latent: int) -> dict[str, Any]:
        stats = self.material.features.stats(latent).values()
        largest = max((one.max for one in stats), default=0.0)
        rows = sum(one.n_rows for one in stats)
        sae, tokens = self.material.sae, self.material.output_tokens.get(latent)
        vector = [] if sae is None else sae.W_dec[latent].detach().float().cpu().tolist()
        promoted, suppressed = (tokens.promoted, tokens.suppressed) if tokens else ((), ())
        return {
            **self.place(latent),
            "creatorId": self.config.creator_id,
            "sourceSetName": self.set,
            "maxActApprox": largest,
            "frac_nonzero": sum(one.n_fired for one in stats) / rows if rows else 0.0,
            "hasVector": bool(vector),
            "vector": vector,
            "vectorDefaultSteerStrength": largest,
            "hookName": self.hook,
            "pos_str": [token for token, _ in promoted],
            "pos_values": [value for _, value in promoted],
            "neg_str": [token for token, _ in suppressed],
            "neg_values": [value for _, value in suppressed],
        }

    def examples(self, latent: int) -> list[Example]:
        """Those shown: firing ones, the strongest of each modality."""
        kept: dict[str, list[Example]] = {}
        for one in self.material.features.examples(latent):
            if one.kind not in SILENT and (self.config.films or one.modality not in IMAGES):
                kept.setdefault(one.modality, []).append(one)
        strongest = (sorted(some, key=lambda one: -one.peak) for some in kept.values())
        return [one for some in strongest for one in some[: self.config.max_examples]]

    def tokens(self, example: Example) -> tuple[list[str], list[float]]:
        """Of one length; patches that the harvest left out are not there."""
        values = np.asarray(example.values, dtype=np.float64)
        if example.patch_shape is not None:
            columns = example.patch_shape[1]
            seen = np.flatnonzero(np.isfinite(values)).tolist()
            names = [f"image_patch_{i // columns}_{i % columns}" for i in seen]
            return names, values[seen].tolist()
        if self.config.text:
            return token_texts(example, self.material.tokenizer), values.tolist()
        return [REDACTED] * len(values), values.tolist()

    def activation(self, latent: int, number: int, example: Example) -> dict[str, Any]:
        tokens, values = self.tokens(example)
        peak = int(np.argmax(values))
        named = self.config.text or self.config.films
        study = self.studies.setdefault(example.study, len(self.studies)) if named else None
        return {
            "id": _cuid(self.source, self.model, latent, "activation", number),
            **self.place(latent),
            "tokens": tokens,
            "values": values,
            "maxValue": values[peak],
            "maxValueTokenIndex": peak,
            "minValue": min(values),
            "dataSource": example.modality,
            "dataIndex": None if study is None else f"study-{study:06d}",
            "creatorId": self.config.creator_id,
        }

    def description(self, label: Label) -> str:
        text = label.label or ""
        return text if self.config.text else redact(text)

    def explanation(self, label: Label) -> dict[str, Any]:
        return {
            "id": self.explanation_id(label),
            **self.place(label.latent),
            "description": self.description(label),
            "authorId": self.config.creator_id,
            "typeName": _kind(label.explainer),
            "explanationModelName": label.model,
        }

    def explanation_id(self, label: Label) -> str:
        return _cuid(self.source, self.model, label.latent, "explanation", label.explainer)

    def score(self, label: Label, number: int, score: Score) -> dict[str, Any]:
        details = ("modality", "standard_error", "baseline", "auroc", "coverage", "n")
        details += ("n_patients", "about")
        judged = score.scorer in ("detection", "fuzzing")
        stated = ("threshold", "fit") if judged else ()
        return {
            "id": _cuid(self.source, self.model, label.latent, "score", number),
            "initiatedByUserId": self.config.creator_id,
            "value": score.value,
            "explanationId": self.explanation_id(label),
            "explanationScoreTypeName": _kind(score.scorer),
            "explanationScoreModelName": self.material.judge if judged else _kind("none"),
            "jsonDetails": json.dumps(
                {name: getattr(score, name) for name in details}
                | {name: getattr(label, name) for name in stated}
            ),
        }


def write_neuronpedia(
    material: Material, out: Path, config: NeuronpediaConfig | None = None
) -> dict[str, int]:
    """Write the bulk export into the new folder ``out``; the module says what is in it.

    Returns
    -------
    dict
        Rows of each kind.

    Raises
    ------
    ConfigError
        If a name is none that Neuronpedia takes, or words are asked for without a tokenizer.
    FolderError
        If ``out`` holds something else; the same export is kept.
    """
    rows = _Rows(material, config or NeuronpediaConfig())
    counts: dict[str, int] = {}
    chosen = material.chosen
    with atomic_folder(out) as temporary:
        folder = temporary / rows.model / rows.source
        for name, table in _metadata(rows).items():
            _lines(folder / name, [table])
        for name, tables in _kinds(rows).items():
            _lines(temporary / "config" / name, tables)
        for number, start in enumerate(range(0, len(chosen), BATCH)):
            for kind, tables in _batch(rows, chosen[start : start + BATCH]).items():
                counts[kind] = counts.get(kind, 0) + len(tables)
                if tables:
                    _zipped(folder / kind / f"batch-{number}.jsonl.gz", tables)
    return counts


def _batch(rows: _Rows, latents: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        "features": [rows.feature(latent) for latent in latents],
        "activations": [
            rows.activation(latent, number, one)
            for latent in latents
            for number, one in enumerate(rows.examples(latent))
        ],
    }
    named = [rows.labels[latent] for latent in latents if latent in rows.labels]
    found["explanations"] = [rows.explanation(label) for label in named]
    found["explanation_scores"] = [
        rows.score(label, number, score)
        for label in named
        for number, score in enumerate(rows.scores.get(label.latent, ()))
    ]
    return found


def uploads(
    material: Material, config: NeuronpediaConfig | None = None
) -> Iterator[dict[str, Any]]:
    """Payloads of ``POST /api/feature/upload-batch``, at most :data:`UPLOAD` features each.

    They have no place for scores.
    """
    rows = _Rows(material, config or NeuronpediaConfig())
    chosen = material.chosen
    for start in range(0, len(chosen), UPLOAD):
        yield {
            "modelId": rows.model,
            "source": rows.source,
            "features": [_upload(rows, latent) for latent in chosen[start : start + UPLOAD]],
        }


def write_uploads(
    material: Material, out: Path, config: NeuronpediaConfig | None = None
) -> dict[str, int]:
    """Write each payload of the API as ``upload-<number>.json`` into the new folder ``out``."""
    counts = {"features": 0, "files": 0}
    with atomic_folder(out) as temporary:
        for number, payload in enumerate(uploads(material, config)):
            write_json(temporary / f"upload-{number:04d}.json", payload)
            counts["features"] += len(payload["features"])
            counts["files"] += 1
    return counts


def _upload(rows: _Rows, latent: int) -> dict[str, Any]:
    feature = rows.feature(latent)
    activations = []
    for one in rows.examples(latent):
        tokens, values = rows.tokens(one)
        activations.append({"tokens": tokens, "values": values})
    label = rows.labels.get(latent)
    explanations = []
    if label is not None:
        explanations.append(
            {
                "text": rows.description(label),
                "methodName": _kind(label.explainer),
                "modelName": label.model,
            }
        )
    return {
        "index": latent,
        "density": feature["frac_nonzero"],
        "activations": activations,
        "explanations": explanations,
        "topLogits": _logits(feature["pos_str"], feature["pos_values"]),
        "bottomLogits": _logits(feature["neg_str"], feature["neg_values"]),
    }


def _logits(tokens: Sequence[str], values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"token": t, "value": v} for t, v in zip(tokens, values, strict=True)]


def _metadata(rows: _Rows) -> dict[str, dict[str, Any]]:
    config, features = rows.config, rows.material.features
    creator = {"creatorName": config.creator, "creatorId": config.creator_id}
    return {
        "release.jsonl": {
            "name": config.release,
            "description": f"Sparse autoencoder of {config.model} at {features.site}",
            "descriptionShort": config.release,
            "urls": [],
            **creator,
            "visibility": "PRIVATE",
        },
        "model.jsonl": {
            "id": rows.model,
            "displayName": config.model,
            "displayNameShort": config.model,
            "creatorId": config.creator_id,
            "owner": config.creator,
            "layers": 0,
            "neuronsPerLayer": 0,
            "visibility": "PRIVATE",
        },
        "sourceset.jsonl": {
            "modelId": rows.model,
            "name": rows.set,
            "description": f"{features.n_latents} latents at {features.site}",
            "type": "SAE",
            **creator,
            "urls": [],
            "releaseName": config.release,
            "visibility": "PRIVATE",
        },
        "source.jsonl": {
            "id": rows.source,
            "modelId": rows.model,
            "setName": rows.set,
            "creatorId": config.creator_id,
            "num_prompts": features.manifest["n_studies"],
            "visibility": "PRIVATE",
        },
    }


def _kinds(rows: _Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows that explanations and scores point to, for an instance that has not got them."""
    config = rows.config
    labels, scores = rows.labels.values(), [s for some in rows.scores.values() for s in some]
    creator = {"creatorName": config.creator}
    owned = {**creator, "creatorId": config.creator_id}

    def named(names: Iterable[str], **extra: Any) -> list[dict[str, Any]]:
        return [
            {"name": name, "displayName": name, "description": f"maira-sae: {name}", **extra}
            for name in sorted(set(names))
        ]

    judges = {rows.material.judge, _kind("none")} if scores else set()
    return {
        "explanation_type.jsonl": named((_kind(one.explainer) for one in labels), **owned),
        "explanation_model_type.jsonl": named((one.model for one in labels), **creator),
        "explanation_score_type.jsonl": named((_kind(one.scorer) for one in scores), **owned),
        "explanation_score_model.jsonl": named(judges, **creator),
    }


def _kind(name: str) -> str:
    return f"maira-sae_{name}"


def _cuid(*parts: object) -> str:
    """An id of the form that Neuronpedia's have, the same in every run."""
    return "c" + hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:24]


def _text(tables: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(table, ensure_ascii=False) + "\n" for table in tables)


def _lines(path: Path, tables: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(tables), encoding="utf-8")


def _zipped(path: Path, tables: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(_text(tables).encode(), mtime=0))
