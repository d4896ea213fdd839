"""Features → labels → scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooks.files import MairaSaeError, nearest
from maira_sae.cli.app import app
from maira_sae.cli.asking import Asking, asks
from maira_sae.cli.options import Dtype, Json, device_map, finish, load_studies, numbers

if TYPE_CHECKING:
    from autointerp import Features, Label, LabelConfig, Score
    from autointerp.label_config import Sources

NONE = "no clear concept"
FeaturesFolder = Annotated[Path, typer.Argument(metavar="FEATURES", help="Features folder.")]
Studies = Annotated[
    Path | None,
    typer.Option(help="Folder of studies: their films, reports, labels and boxes."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint; default: the harvest's."),
]
Sae = Annotated[Path | None, typer.Option(help="SAE folder.")]
Hookpoint = Annotated[
    str | None, typer.Option(help="delphi's name of the place; default: that of the features.")
]
EXPLAINERS = ("text", "vision", "reports", "causal", "statistics")
NEEDS = {"vision": "whose films it shows", "reports": "whose reports it reads"}
SCORERS = ("detection", "fuzzing", "embedding", "agreement", "localisation")


@app.command(
    epilog="Example: `maira-sae label features/ --latents 12,77 --endpoint "
    "http://127.0.0.1:8000/v1 --llm llama --out labels/`"
)
@asks
def label(
    asking: Asking,
    features: FeaturesFolder,
    out: Annotated[Path, typer.Option(help="Label folder to make or complete.")],
    latents: Annotated[
        str | None, typer.Option(help="Comma-separated latent numbers; default: all that fire.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Only so many latents, those that fire in most studies.")
    ] = None,
    explainer: Annotated[
        str,
        typer.Option(
            help="text: excerpts. vision: films under the activations. reports: of the studies on "
            "whose films it fires. causal: what the model writes of a blank film with it turned "
            "up. statistics: words, without a language model."
        ),
    ] = "text",
    modality: Annotated[
        str | None, typer.Option(help="Default: report for text, frontal for films.")
    ] = None,
    studies: Studies = None,
    sae: Sae = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="State the activation above which each label holds; of text, and takes a short "
            "question for each excerpt.",
        ),
    ] = False,
    model: Tokenizer = None,
    strength: Annotated[
        float, typer.Option(help="How far causal turns it up, in units of its 99th percentile.")
    ] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest report of causal.")] = 300,
    dtype: Dtype = "auto",
    made: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Take labels that exist: delphi's explanations, or interpretations in a file, "
            "folder or Hub repository.",
        ),
    ] = None,
    hookpoint: Hookpoint = None,
    columns: Annotated[
        str | None, typer.Option(help="Fields of --from: latent,label, by their names there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Name latents, by a language model or by word statistics; `score` then tests the names.

    Run again to resume: what was answered is in --out, and is not asked again. Every request that
    leaves is listed in requests.jsonl there. A latent that fires everywhere is reported as dense.
    """
    from autointerp import Features, LabelConfig, label_latents

    found = Features.open(features)
    if made is not None:
        given = (latents, top, calibrate or None, asking.endpoint_config())
        if any(one is not None for one in given):
            raise MairaSaeError(
                "--from takes labels as they are; leave --latents, --top, --calibrate and "
                "--endpoint out"
            )
        _take(found, made, out, modality, hookpoint, columns, as_json)
        return
    if latents is not None and top is not None:
        raise MairaSaeError("--latents names them and --top counts them; give one of the two")
    chosen = numbers(latents, "--latents", int) if latents else tuple(sorted(found.alive()[:top]))
    kind, shown, by_words = _explainer(explainer, modality, found)
    if by_words and asking.endpoint_config() is not None:
        raise MairaSaeError("--explainer statistics asks nobody; leave --endpoint out")
    if kind in NEEDS and studies is None:
        raise MairaSaeError(f"--explainer {kind} needs --studies, {NEEDS[kind]}")
    if kind == "causal" and sae is None:
        raise MairaSaeError("--explainer causal needs --sae, whose latents it turns up")
    config = LabelConfig(
        *(chosen, kind, shown),  # pyright: ignore[reportArgumentType]
        calibrate=calibrate,
    )
    if kind == "vision" and asking.endpoint_config() is None:
        raise MairaSaeError("--explainer vision shows films to a model; give --endpoint and --llm")
    processor = _processor(model, found)
    who = asking.labeller(processor.tokenizer, out)
    sources = _sources(found, config, studies, processor)
    if kind == "causal":
        assert sae is not None
        how = (sae, model, dtype, strength, max_new_tokens)
        sources = _steered(found, config, out, processor, *how)
    labels = label_latents(found, who, config, out, sources=sources)
    dense = [n for n in range(found.n_latents) if found.dense(n)]
    if latents:
        dense = [n for n in chosen if found.dense(n)]
    lines = [f"{one.latent}\t{_named(one, one.latent in dense)}{_holds(one)}" for one in labels]
    if not latents and dense:
        lines.append(f"dense, not labelled: {_few(dense)}")
    result = {
        "labels": [one._asdict() for one in labels],
        "named": sum(one.label is not None for one in labels),
        "dense": dense,
        "unanswered": [
            one.latent
            for one in labels
            if one.label is None and one.confidence is None and one.latent not in dense
        ],
    }
    finish(result, as_json, "\n".join(lines))


def _explainer(asked: str, modality: str | None, found: Features) -> tuple[str, str, bool]:
    """What the explainer sees, of which modality, and whether word statistics are meant."""
    from autointerp.features import IMAGES

    if asked not in EXPLAINERS:
        raise MairaSaeError(
            f"no explainer {asked!r}{nearest(asked, EXPLAINERS)}; choose from "
            f"{', '.join(EXPLAINERS)}"
        )
    there = _there(found)
    on_films = asked in ("vision", "reports")
    if asked == "statistics":
        shown = modality or there
        return ("reports" if shown in IMAGES else "text"), shown, True
    if asked == "causal":
        return asked, modality or there, False
    return asked, modality or ("frontal" if on_films else "report"), False


def _there(found: Features) -> str:
    """The report, or the first film, that the features are of."""
    return next(n for n in ("report", "frontal", *found.modalities) if n in found.modalities)


def _sources(found: Features, config: LabelConfig, studies: Path | None, processor: Any) -> Sources:
    from autointerp.label_config import Sources

    records = load_studies(studies) if studies else []
    return Sources.of(records, image_size=getattr(processor, "image_size", 518))


def _steered(
    found: Features,
    config: LabelConfig,
    out: Path,
    processor: Any,
    sae: Path,
    model: str | None,
    dtype: str,
    strength: float,
    max_new_tokens: int,
) -> Sources:
    from autointerp.label_config import Sources
    from hooks.maira2 import load_model
    from maira_sae.causal_reports import CausalConfig, write_causal_reports
    from sae import MatryoshkaSAE

    checkpoint = model or found.manifest["model"]["id"]
    loaded = load_model(checkpoint, dtype=dtype, device_map=device_map())
    dictionary = MatryoshkaSAE.from_pretrained(sae)
    how = CausalConfig(strength, max_new_tokens)
    what = (loaded, processor, dictionary, found, config.latents, out, how)
    return Sources(steered=write_causal_reports(*what))


def _named(one: Label, dense: bool) -> str:
    if one.label is not None:
        return one.label
    if dense:
        return "dense: it fires nearly everywhere, and has no name"
    return "no answer" if one.confidence is None else NONE


def _few(latents: Sequence[int]) -> str:
    return ", ".join(map(str, latents[:20])) + (" …" if len(latents) > 20 else "")


def _take(
    found: Features,
    made: str,
    out: Path,
    modality: str | None,
    hookpoint: str | None,
    columns: str | None,
    as_json: bool,
) -> None:
    """Labels that exist already, as a label folder."""
    from autointerp import delphi_results
    from autointerp.delphi import hookpoint_of
    from autointerp.interpretations import Columns, read_interpretations
    from autointerp.labelling import keep_labels

    shown, folder = modality or _there(found), Path(made)
    scores: dict[int, dict[str, float]] = {}
    if folder.is_dir() and any(folder.glob("*_latent*.txt")):
        place = hookpoint or hookpoint_of(found.site)
        theirs = delphi_results.read_explanations(folder, place)
        texts: dict[int, str | None] = {**theirs.texts}
        how, who = f"delphi's explanations of {place}", theirs.model
        explainer, unread = "delphi", len(theirs.missing)
    else:
        fields = [part.strip() for part in (columns or "").split(",")]
        if columns is not None and len(fields) != 2:
            raise MairaSaeError(f"--columns is {columns!r}; write two names like feature_id,text")
        named = Columns(*fields) if columns is not None else None
        read = read_interpretations(made, named, n_latents=found.n_latents)
        texts, scores = read.texts, read.scores
        how, who, explainer, unread = f"{read.file}: {read.layout}", "unknown", "published", 0
    labels = keep_labels(found, texts, out, explainer=explainer, model=who, modality=shown)
    result = {
        "labels": [one._asdict() for one in labels],
        "named": sum(one.label is not None for one in labels),
        "read_as": how,
        "unread": unread,
        "scores": scores,
    }
    text = f"{how}: {result['named']} labels of {len(labels)}, {unread} could not be read there"
    finish(result, as_json, text)


@app.command(
    epilog="Example: `maira-sae score features/ labels/ --endpoint http://127.0.0.1:8000/v1 "
    "--llm llama --out scores/`"
)
@asks
def score(
    asking: Asking,
    features: FeaturesFolder,
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="Label folder.")],
    out: Annotated[Path, typer.Option(help="Scores folder to make.")],
    scorers: Annotated[
        str,
        typer.Option(
            "--scorers",
            "--scorer",
            help="By comma. Of labels: detection, fuzzing, embedding (MiniLM, on this machine). Of "
            "latents, without a language model: agreement with the studies' labels, localisation "
            "against boxes and masks.",
        ),
    ] = "detection",
    studies: Studies = None,
    sae: Sae = None,
    acts: Annotated[
        Path | None, typer.Option(help="Activation folder, for agreement and localisation.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of masks, <name>/<study>.png, for localisation.")
    ] = None,
    model: Tokenizer = None,
    made: Annotated[
        Path | None, typer.Option("--from", help="Take delphi's scores instead: a folder of them.")
    ] = None,
    hookpoint: Hookpoint = None,
    as_json: Json = False,
) -> None:
    """Test each label on patients whom no explainer saw, beside another latent's label.

    A latent is on above the threshold that its label states (`label --calibrate`), or wherever it
    fires. The score is balanced accuracy: 0.5 is chance, also for a judge that always answers no.
    What could not be read is missing, and lowers the coverage. Answers are kept beside the labels.
    Labels of films are held against reports, of --studies.
    """
    from autointerp import Features, read_labels, write_scores
    from autointerp.delphi import hookpoint_of
    from autointerp.delphi_results import read_scores

    found, names = Features.open(features), read_labels(labels)
    if made is not None:
        scores = read_scores(made, hookpoint or hookpoint_of(found.site), _there(found))
        write_scores(scores, out, judge="delphi", scorers="delphi")
        finish({"scores": [asdict(one) for one in scores]}, as_json, _table(scores, names))
        return
    wanted = [name.strip() for name in scorers.split(",")]
    for name in wanted:
        if name not in SCORERS:
            raise MairaSaeError(
                f"no scorer {name!r}{nearest(name, SCORERS)}; choose from {', '.join(SCORERS)}"
            )
    on_latents = [name for name in wanted if name in ("agreement", "localisation")]
    if on_latents and (sae is None or acts is None or studies is None):
        raise MairaSaeError(f"{on_latents[0]} needs --sae, --acts and --studies")
    processor = _processor(model, found)
    who = asking.labeller(processor.tokenizer, labels)
    records = load_studies(studies) if studies else []
    heard: list[Any] = []
    scores, details = [], {}
    for name in wanted:
        if name in on_latents:
            more, detail = _of_latents(name, found, names, sae, acts, records, masks, processor)
            details |= detail
        else:
            rest = (found, names, who, processor.tokenizer, records, heard)
            more = _of_labels(name, *rest)
        scores += more
    write_scores(scores, out, heard, judge=who.model, scorers=scorers)
    lines = [_table(scores, names)] if scores else ["no label could be scored"]
    films = Counter(one.modality for one in names if one.label)
    if not records and films["frontal"] + films["lateral"] + films["prior"]:
        lines.append("labels of films are scored on reports: give --studies")
    result = {"scores": [asdict(one) for one in scores], "localisation": details}
    finish(result, as_json, "\n".join(lines))


def _of_labels(
    scorer: str,
    found: Features,
    names: Sequence[Label],
    who: Any,
    tokenizer: Any,
    records: Sequence[Any],
    heard: list[Any],
) -> list[Score]:
    from autointerp import detection_scores
    from autointerp.embedding import MiniLM, embedding_scores
    from autointerp.labelling import fuzzing_scores

    if scorer == "detection":
        known = {study.id: study for study in records}
        return detection_scores(found, names, who, tokenizer, studies=known, heard=heard)
    if scorer == "fuzzing":
        return fuzzing_scores(found, names, who, tokenizer, heard=heard)
    of_text = {
        one.latent: one.label
        for one in names
        if one.modality == "report" and not found.dense(one.latent)
    }
    return embedding_scores(found, of_text, tokenizer, MiniLM())


def _of_latents(
    scorer: str,
    found: Features,
    names: Sequence[Label],
    sae: Any,
    acts: Any,
    records: Sequence[Any],
    masks: Path | None,
    processor: Any,
) -> tuple[list[Score], dict[str, Any]]:
    """Scores of latents by what is known of studies, and what localisation has beside them."""
    from autointerp.collect import CollectConfig, digest_of
    from autointerp.study_scores import agreement_scores, localisation_scores
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE

    dictionary, folder = MatryoshkaSAE.from_pretrained(sae), ActivationFolder(acts)
    if digest_of(dictionary) != found.manifest["dictionary_sha256"]:
        raise MairaSaeError(f"{found.folder} was not collected with {sae}; give the SAE it was")
    config = CollectConfig(**found.manifest["config"])
    chosen = [one for one in names if not found.dense(one.latent)]
    if scorer == "agreement":
        modalities = {one.latent: one.modality for one in chosen}
        return agreement_scores(dictionary, folder, modalities, records, config), {}
    latents = [one.latent for one in chosen]
    size = getattr(processor, "image_size", 518)
    located = localisation_scores(dictionary, folder, latents, records, config, size, masks)
    details = {str(one.score.latent): asdict(one.detail) for one in located}
    return [one.score for one in located], details


def _table(scores: Sequence[Score], names: Sequence[Label]) -> str:
    by_latent = {one.latent: one.label for one in names}
    return "\n".join(
        f"{one.latent}\t{one.about or by_latent.get(one.latent) or NONE}\t{one.scorer} "
        f"{_shown(one.value)} ({_beside(one)} {_shown(one.baseline)}; {one.n} answers, "
        f"{one.coverage:.0%} read)"
        for one in scores
    )


def _beside(one: Score) -> str:
    return {"agreement": "shuffled", "localisation": "another's film"}.get(
        one.scorer, "other label"
    )


def _holds(label: Label) -> str:
    return "" if label.fit is None else f"\tabove {label.threshold:.3g} (fit {label.fit:.3f})"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _processor(model: str | None, features: Any) -> Any:
    from hooks.processor import load_processor

    return load_processor(model or features.manifest["model"]["id"])
