"""Features, labels and scores → formats of other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooks.files import MairaSaeError, nearest
from maira_sae.cli.app import app
from maira_sae.cli.options import Json, finish, numbers

if TYPE_CHECKING:
    from autointerp import Features, Label

FORMATS = ("neuronpedia", "neuronpedia-api", "delphi", "parquet")


@app.command(
    epilog="Example: `maira-sae export features/ --labels labels/ --scores scores/ --format "
    "neuronpedia --out exports/`"
)
def export(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features folder.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        str,
        typer.Option(
            help="neuronpedia: its bulk import. neuronpedia-api: payloads of its "
            "feature/upload-batch. delphi: explanations and scores. parquet: labels and scores."
        ),
    ] = "neuronpedia",
    labels: Annotated[Path | None, typer.Option(help="Labels folder.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Scores folder.")] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Write the words of reports too.")
    ] = False,
    with_films: Annotated[
        bool, typer.Option("--with-films", help="Write where on films a latent fires too.")
    ] = False,
    latents: Annotated[
        str | None, typer.Option(help="Comma-separated; default: those labelled or firing.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Most of a latent and modality.")] = 20,
    sae: Annotated[Path | None, typer.Option(help="SAE folder, for decoder directions.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint, for --with-text; default: the harvest's.")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Add the tokens a latent writes; loads the model.")
    ] = False,
    model_id: Annotated[str, typer.Option(help="Neuronpedia's id of the model.")] = "maira-2",
    source_set: Annotated[str, typer.Option(help="Neuronpedia's name of the dictionary.")] = "",
    release: Annotated[str, typer.Option(help="Neuronpedia's name of the release.")] = "maira-sae",
    creator: Annotated[str, typer.Option(help="Who made the dictionary.")] = "unknown",
    hookpoint: Annotated[
        str | None, typer.Option(help="delphi's name of the place; default: that of the features.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write labels, scores and examples for Neuronpedia, delphi or a table.

    Words of reports are redacted, and activations on films left out, unless asked for by name.
    """
    from autointerp import Features, neuronpedia, read_labels, read_scores
    from autointerp.tables import write_parquet

    if format not in FORMATS:
        raise MairaSaeError(
            f"no format {format!r}{nearest(format, FORMATS)}; choose from {', '.join(FORMATS)}"
        )
    found = Features.open(features)
    named = read_labels(labels) if labels else []
    tested = read_scores(scores) if scores else []
    chosen = numbers(latents, "--latents", int) if latents else ()
    if chosen:
        named = [one for one in named if one.latent in chosen]
        tested = [one for one in tested if one.latent in chosen]
    if format == "parquet":
        counts = write_parquet(found, named, tested, out)
    elif format == "delphi":
        counts = _delphi(found, named, scores, out, hookpoint, model, with_text)
    else:
        material = neuronpedia.Material(
            found,
            named,
            tested,
            judge=_judge(scores),
            sae=_dictionary(sae),
            tokenizer=_tokenizer(model, found) if with_text else None,
            output_tokens=_output_tokens(found, chosen or found.alive(), sae, model)
            if logits
            else {},
            latents=chosen,
        )
        config = neuronpedia.NeuronpediaConfig(
            *(model_id, source_set, release, creator),
            max_examples=examples,
            text=with_text,
            films=with_films,
        )
        write = {
            "neuronpedia": neuronpedia.write_neuronpedia,
            "neuronpedia-api": neuronpedia.write_uploads,
        }
        counts = write[format](material, out, config)
    text = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items())
    held = [name for name, kept in (("words", with_text), ("films", with_films)) if kept]
    if format != "parquet":
        text += f"; of patients: {' and '.join(held) if held else 'nothing'}"
    finish({"out": str(out), "format": format, **counts}, as_json, f"{out}: {text}")


def _delphi(
    found: Features,
    named: Sequence[Label],
    scores: Path | None,
    out: Path,
    hookpoint: str | None,
    model: str | None,
    with_text: bool,
) -> dict[str, int]:
    from autointerp.delphi import hookpoint_of
    from autointerp.delphi_results import write_explanations, write_scores
    from autointerp.scores import read_verdicts

    if not named:
        raise MairaSaeError("delphi's format is of labels; give --labels")
    place = hookpoint or hookpoint_of(found.site)
    counts = {"explanations": 0}
    if scores is not None:
        latents = {one.latent for one in named}
        heard = [one for one in read_verdicts(scores) if one.latent in latents]
        texts = _texts(found, named, scores, model, heard) if with_text else {}
        counts["scores"] = write_scores(heard, out / "scores", place, texts)
    by_latent = {one.latent: one.label for one in named}
    counts["explanations"] = write_explanations(by_latent, out / "explanations", place)
    return counts


def _texts(
    found: Features, named: Sequence[Label], scores: Path, model: str | None, heard: Sequence[Any]
) -> dict[tuple[int, str], list[str]]:
    """The excerpts that verdicts are about, asked for anew: they come in the same order."""
    from autointerp import detection, fuzzing
    from autointerp.features import IMAGES

    tokenizer, by_latent = _tokenizer(model, found), {one.latent: one for one in named}
    makers: dict[str, Any] = {"detection": detection.questions, "fuzzing": fuzzing.questions}
    texts = {}
    for one in heard:
        label, at = by_latent[one.latent].label, by_latent[one.latent].threshold
        if one.modality in IMAGES or label is None:
            continue  # held against whole reports, which the features do not hold
        asked = makers[one.scorer](found, one.latent, label, tokenizer, one.modality, threshold=at)
        if [question.truth for question in asked] != [v.truth for v in one.verdicts]:
            raise MairaSaeError(
                f"{scores} is not of these features and labels: latent {one.latent} has other "
                "questions; score again, or leave --with-text out"
            )
        texts[one.latent, one.scorer] = [question.text for question in asked]
    return texts


def _judge(scores: Path | None) -> str:
    from hooks.files import read_json

    return str(read_json(scores / "manifest.json").get("judge", "unknown")) if scores else "unknown"


def _dictionary(sae: Path | None) -> Any:
    from sae import MatryoshkaSAE

    return MatryoshkaSAE.from_pretrained(sae) if sae else None


def _tokenizer(model: str | None, features: Any) -> Any:
    from hooks.processor import load_processor

    return load_processor(model or features.manifest["model"]["id"]).tokenizer


def _output_tokens(
    found: Features, latents: Sequence[int], sae: Path | None, model: str | None
) -> dict[int, Any]:
    from autointerp.evidence import model_output_tokens
    from hooks.maira2 import load_model

    if sae is None:
        raise MairaSaeError("--logits reads the SAE and the model; give --sae")
    dictionary, name = _dictionary(sae), model or found.manifest["model"]["id"]
    loaded, tokenizer = load_model(name), _tokenizer(model, found)
    written = {}
    for latent in latents:
        tokens = model_output_tokens(loaded, found.site, dictionary.W_dec[latent], tokenizer)
        if tokens is not None:
            written[latent] = tokens
    return written
