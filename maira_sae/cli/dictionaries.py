"""Dictionaries measured, and read and written in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hooks.files import MairaSaeError, StudyError, write_json
from maira_sae.cli.app import app
from maira_sae.cli.options import (
    ActivationsFolder,
    Dtype,
    Json,
    SaeFolder,
    Seed,
    device_map,
    finish,
    load_studies,
    numbers,
)


@app.command(
    epilog="Example: `maira-sae eval sae/ acts/ --beside other-sae/ --model maira-2/ --studies "
    "mimic/ --out eval/` — without --model, cross-entropy is left out; without --studies, probes"
)
def eval(  # the contract's name, not Python's
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: Annotated[str | None, typer.Option(help="Checkpoint, for cross-entropy.")] = None,
    studies: Annotated[
        Path | None, typer.Option(help="Studies, for cross-entropy and probes of their labels.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another SAE of the site, such as another seed's; repeat for several."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.html.")
    ] = None,
    heldout: Annotated[float, typer.Option(help="Share of patients that is held out.")] = 0.2,
    max_studies: Annotated[int, typer.Option(help="Held-out studies, for cross-entropy.")] = 100,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a forward pass.")] = 8192,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure an SAE on held-out patients, beside PCA, random directions and other SAEs."""
    from hooks.store import ActivationFolder
    from sae import CrossEntropy, EvaluationConfig, MatryoshkaSAE, evaluate, measure
    from sae.report import write_report

    if model is not None and studies is None:
        raise StudyError("--model needs --studies, the reports whose loss is measured")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    others = {path.name: MatryoshkaSAE.from_pretrained(path) for path in beside or []}
    if len(others) < len(beside or []):
        raise MairaSaeError("two folders given with --beside have one name; rename one")
    config = EvaluationConfig(heldout=heldout, seed=seed)
    records = load_studies(studies) if studies is not None else []
    harvested = set(folder.column("study"))
    labels = {study.id: study.labels for study in records if study.id in harvested}
    if not any(labels.values()):
        labels = None  # loss can be measured on studies that were not harvested, labels cannot
    quality = measure(sae, folder, sae.config.site, folder.heldout(heldout))
    result: dict[str, Any] = {**quality.summary(), **evaluate(sae, folder, config, others, labels)}
    if model is not None:
        from hooks.maira2 import load_model
        from hooks.processor import load_processor
        from hooks.prompts import PromptRunner
        from sae.codes import codes
        from sae.cross_entropy import study_losses
        from sae.evaluate import recovered

        chosen = [s for s in records if s.split(heldout) == "heldout"][:max_studies]
        if not chosen:
            raise StudyError(f"{studies} has no held-out study; raise --heldout or add studies")
        loaded = load_model(model, dtype=dtype, device_map=device_map())
        runner = PromptRunner(loaded, load_processor(model), batch_tokens)
        mean = folder.moments(sae.config.site).mean
        replacements = {
            name: code.reconstruct for name, code in codes(sae, folder, config, others).items()
        }
        found = study_losses(loaded, runner, chosen, sae, mean, replacements)
        means = {name: found.mean(name) for name in ("clean", "zero_ablated", "mean_ablated")}
        loss = CrossEntropy(int(found.n_tokens.sum()), reconstructed=found.mean("sae"), **means)
        patients = [study.patient or study.id for study in chosen]
        result |= {
            "ce_recovered": loss.recovered_zero,
            "cross_entropy": loss._asdict(),
            "cross_entropy_recovered": recovered(found, patients, config),
        }
    if out is not None:
        write_json(out / "evaluation.json", result)
        write_report(result, out / "evaluation.html", f"Evaluation of {sae_folder.name}")
    finish(result, as_json, _evaluation_lines(result))


def _evaluation_lines(result: dict[str, Any]) -> str:
    """One line a dictionary: FVU and L0 with their intervals."""
    from sae.report import shown

    lines = []
    for name, one in result["dictionaries"].items():
        lines.append(f"{name:<12} FVU {shown(one['fvu'])}  L0 {shown(one['l0'])}")
    if "ce_recovered" in result:
        lines.append(f"cross-entropy recovered {result['ce_recovered']:.4f}")
    return "\n".join(lines)


@app.command(
    epilog="Example: `maira-sae convert microsoft/maira-2-sae sae/ --to maira_sae "
    "--site llm.15.resid_post`"
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file or Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    to: Annotated[str, typer.Option(help="dictionary_learning, sae_lens, sparsify or maira_sae.")],
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository.")] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="Where SRC holds several dictionaries.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--from", help="SRC's format, if its files do not tell.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Named place it was trained on.")] = None,
    policy: Annotated[str | None, typer.Option(help="Token policy it was trained on.")] = None,
    k: Annotated[int | None, typer.Option(help="If the files do not say it.")] = None,
    group_sizes: Annotated[
        str | None, typer.Option(help="Comma-separated, if the files do not say it.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="threshold or topk, instead of what the files say.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="If the files do not say it.")] = None,
    norm_scale: Annotated[
        float | None, typer.Option(help="The weights expect x · norm_scale; it is folded in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a dictionary of this or another library and write it in another format."""
    from sae import convert as run

    sizes = numbers(group_sizes, "--group-sizes", int) if group_sizes is not None else None
    sae = run(
        source,
        destination,
        to,
        revision=revision,
        subfolder=subfolder,
        format=format,
        site=site,
        policy=policy,
        k=k,
        group_sizes=sizes,
        activation=activation,
        threshold=threshold,
        norm_scale=norm_scale,
    )
    c = sae.config
    result = {"out": str(destination), "to": to, "d_model": c.d_model, "n_latents": c.n_latents}
    result |= {"k": c.k, "activation": c.activation, "site": c.site, "origin": dict(c.origin)}
    text = f"{destination}: {sae!r}\nread as {json.dumps(result['origin'])}"
    if not c.site:
        text += "\nits site is unknown; give --site to use it with activations or for steering"
    finish(result, as_json, text)
