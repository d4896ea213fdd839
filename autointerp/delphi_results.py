"""delphi's explanations and scores, in and out, as its own code leaves and loads them.

``explanations/<hookpoint>_latent<number>.txt``
    one JSON string
``scores/<scorer>/<hookpoint>_latent<number>.txt``
    a JSON list, one object an example: ``str_tokens``, ``activations``, ``distance``,
    ``activating``, ``prediction``, ``probability``, ``correct``; the scorers are ``detection`` and
    ``fuzz``

Written scores have neither tokens nor activations of the examples, which are patients', unless
texts are given. Read ones go through this library's arithmetic: an answer that delphi could not
read is missing, and what it writes for an explanation that it could not read is no label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from autointerp.scores import Said, Score, Verdict, judge
from hooks.files import FormatError, atomic_folder, nearest, read_json

SCORERS = {"detection": "detection", "fuzzing": "fuzz"}
"""Our name of a scorer, and delphi's."""
UNREADABLE = ("Explanation could not be parsed.", "No explanation found")
"""What delphi has in place of an explanation."""
_FILE = re.compile(r"(?P<hookpoint>.+)_latent(?P<latent>\d+)\.txt")


class Explanations(NamedTuple):
    """Explanations of one hookpoint."""

    texts: dict[int, str]
    """By latent."""
    missing: tuple[int, ...]
    """Latents whose explanation delphi could not read."""
    model: str
    """The explainer, from delphi's ``run_config.json``; ``delphi`` where there is none."""


def write_explanations(labels: Mapping[int, str | None], out: Path, hookpoint: str) -> int:
    """Write a file a labelled latent into the new folder ``out``; gives how many.

    "No clear concept" has no file.
    """
    named = {latent: label for latent, label in labels.items() if label is not None}
    with atomic_folder(out) as temporary:
        for latent, label in named.items():
            path = temporary / f"{hookpoint}_latent{latent}.txt"
            path.write_text(json.dumps(label), encoding="utf-8")
    return len(named)


def write_scores(
    said: Iterable[Said], out: Path, hookpoint: str, texts: Mapping[tuple[int, str], Sequence[str]]
) -> int:
    """Write a file a latent and scorer into the new folder ``out``; gives how many.

    Parameters
    ----------
    texts
        Excerpts of a latent and scorer in the order of the verdicts; may be empty.
    """
    count = 0
    with atomic_folder(out) as temporary:
        for one in said:
            if one.scorer not in SCORERS:
                continue
            folder = temporary / SCORERS[one.scorer]
            folder.mkdir(exist_ok=True)
            shown = texts.get((one.latent, one.scorer)) or [""] * len(one.verdicts)
            examples = [
                _example(verdict, text) for verdict, text in zip(one.verdicts, shown, strict=True)
            ]
            path = folder / f"{hookpoint}_latent{one.latent}.txt".replace("/", "--")
            path.write_text(json.dumps(examples), encoding="utf-8")
            count += 1
    return count


def _example(verdict: Verdict, text: str) -> dict[str, Any]:
    right = None if verdict.answer is None else verdict.answer == verdict.truth
    return {
        "str_tokens": [text] if text else [],
        "activations": [],
        "distance": 0 if verdict.truth else -1,
        "activating": verdict.truth,
        "prediction": verdict.answer,
        "probability": verdict.probability,
        "correct": right,
    }


def read_explanations(folder: Path, hookpoint: str) -> Explanations:
    """The explanations of a hookpoint, from delphi's folder of them.

    Raises
    ------
    FormatError
        If there are none of the hookpoint, or a file is not one JSON string.
    """
    texts, missing = {}, []
    for latent, path in _of_hookpoint(folder, hookpoint).items():
        text = _json(path)
        if not isinstance(text, str):
            raise FormatError(f"{path} holds a {type(text).__name__}; delphi writes one string")
        if text.strip() in (*UNREADABLE, ""):
            missing.append(latent)
        else:
            texts[latent] = text.strip()
    settings = folder.parent / "run_config.json"
    model = read_json(settings).get("explainer_model") if settings.is_file() else None
    return Explanations(texts, tuple(missing), str(model or "delphi"))


def read_scores(folder: Path, hookpoint: str, modality: str = "report") -> list[Score]:
    """Detection and fuzzing scores of a hookpoint, from delphi's folder of scores.

    delphi does not say whose texts it scored: standard errors by patient are not to be had, and
    the number of patients is 0. Nor has it a baseline.

    Raises
    ------
    FormatError
        If there are neither, or a file holds something else.
    """
    scores = []
    kinds = {ours: folder / theirs for ours, theirs in SCORERS.items()}
    if not any(path.is_dir() for path in kinds.values()):
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise FormatError(
            f"{folder} has neither detection nor fuzz, but {there or 'nothing'}; give the folder "
            "`scores` of a delphi run"
        )
    for scorer, inside in kinds.items():
        if not inside.is_dir():
            continue
        for latent, path in _of_hookpoint(inside, hookpoint).items():
            verdicts = _verdicts(path)
            score = judge(latent, scorer, modality, verdicts)
            scores.append(replace(score, standard_error=None, n_patients=0))
    return scores


def _verdicts(path: Path) -> list[Verdict]:
    examples = _json(path)
    try:
        return [
            Verdict(
                str(i),
                bool(one["activating"]),
                None if one["prediction"] is None else bool(one["prediction"]),
                one["probability"],
            )
            for i, one in enumerate(examples)
        ]
    except (TypeError, KeyError) as error:
        raise FormatError(
            f"{path} holds no list of delphi's examples ({error!r}); each has activating, "
            "prediction and probability"
        ) from None


def _of_hookpoint(folder: Path, hookpoint: str) -> dict[int, Path]:
    """Files by latent, in order."""
    safe = hookpoint.replace("/", "--")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _FILE.fullmatch(path.name):
            found.setdefault(match["hookpoint"], {})[int(match["latent"])] = path
    for name in (hookpoint, safe):
        if name in found:
            return dict(sorted(found[name].items()))
    raise FormatError(
        f"{folder} has nothing of the hookpoint {hookpoint!r}{nearest(hookpoint, found)}; it has "
        f"{sorted(found) or 'no file of delphi'}"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is no JSON ({error}); delphi writes JSON") from None
