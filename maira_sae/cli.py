"""The command line: one thin function per subcommand.

Exit status: 0 done, 2 wrong arguments or input (one line says why), 3 incomplete but resumable.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# Set before transformers is imported: its own messages and bars would break the contract that
# nothing but errors and results is printed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

from hooks.files import EndpointError, MairaSaeError, StudyError, nearest, write_json
from maira_sae import bench

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Open up MAIRA-2 with sparse autoencoders: harvest, train, label, steer.",
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ModelFolder = Annotated[str, typer.Option("--model", help="MAIRA-2 checkpoint, folder or Hub id.")]
StudiesFolder = Annotated[Path, typer.Option("--studies", help="Folder with studies.jsonl.")]
SaeFolder = Annotated[Path, typer.Argument(metavar="SAE", help="SAE folder.")]
ActivationsFolder = Annotated[Path, typer.Argument(metavar="ACTS", help="Activation folder.")]
Endpoint = Annotated[
    str | None,
    typer.Option(help="Base URL of an OpenAI-compatible server; without it, word statistics."),
]
Llm = Annotated[str | None, typer.Option(help="Model name at the endpoint.")]
AllowRemote = Annotated[str | None, typer.Option(help="Host that report text may be sent to.")]
Dtype = Annotated[str, typer.Option(help="Dtype the model runs in: auto, float32, bfloat16 …")]


def _finish(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    if text:
        typer.echo(text)
    if as_json:
        typer.echo(json.dumps(result))


@app.command(epilog="Example: `maira-sae demo --out demo-out` — then open demo-out/dashboard.html")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for every stage.")],
    real: Annotated[
        bool, typer.Option("--real", help="Real towers, film and reports, not the phantom.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")] = False,
    endpoint: Endpoint = None,
    llm: Llm = None,
    allow_remote: AllowRemote = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline where the truth is known: harvest, train, measure, label, steer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dataclasses import replace

    from rich.console import Console

    where = _endpoint(endpoint, llm, allow_remote)
    if real:
        if where is not None:
            raise MairaSaeError("--real brings its own language model; leave --endpoint out")
        from maira_sae.real_demo import RealDemo, RealDemoConfig, show

        config = replace(RealDemoConfig(), seed=seed)
        summary = RealDemo(out, config.quick() if quick else config).summarize()
    else:
        from maira_sae.phantom_demo import PhantomDemo, PhantomDemoConfig, show

        config = replace(PhantomDemoConfig(), seed=seed)
        summary = PhantomDemo(out, config.quick() if quick else config, where).summarize()
    show(summary, Console())
    _finish(summary, as_json)


@app.command(
    epilog="Example: `maira-sae harvest --model maira-2/ --studies mimic/ "
    "--site llm.15.resid_post --out acts/`"
)
def harvest(
    model: ModelFolder,
    studies: StudiesFolder,
    site: Annotated[list[str], typer.Option(help="Named place; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Activation folder to make or complete.")],
    policy: Annotated[
        str, typer.Option(help="Tokens to keep: published, report, patches, all.")
    ] = "published",
    store_dtype: Annotated[str, typer.Option(help="Dtype on disk.")] = "bfloat16",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a forward pass.")] = 8192,
    dtype: Dtype = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Check prompts against the checkpoint's own processor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the activations of studies into a folder; run again to resume."""
    from hooks.harvest import HarvestConfig
    from hooks.harvest import harvest as run
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from hooks.studies import read_folder

    config = HarvestConfig(tuple(site), policy, store_dtype, batch_tokens=batch_tokens)
    records = read_folder(studies)
    loaded = load_model(model, dtype=dtype, device_map=_device_map())
    folder = run(loaded, load_processor(model, trust_remote_code), records, config, out)
    result = {"out": str(out), "n_tokens": folder.n_tokens, "sites": folder.sites}
    _finish(result, as_json, repr(folder))


@app.command(
    epilog="Example: `maira-sae train acts/ --site llm.15.resid_post --expansion 4 --out sae/`"
)
def train(
    activations: ActivationsFolder,
    out: Annotated[Path, typer.Option(help="SAE folder to make or complete.")],
    site: Annotated[str, typer.Option(help="Site; not needed when there is one.")] = "",
    expansion: Annotated[int, typer.Option(help="Dictionary size over width.")] = 8,
    k: Annotated[int, typer.Option(help="Mean active latents per token.")] = 32,
    steps: int = 10_000,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Default: 2e-4 / sqrt(F / 2^14).")] = None,
    warmup_steps: int = 1000,
    threshold_start: Annotated[
        int, typer.Option(help="Step from which the threshold is followed.")
    ] = 1000,
    dead_after_tokens: int = 10_000_000,
    checkpoint_every: int = 1000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a Matryoshka BatchTopK SAE; run again to resume."""
    from hooks.files import read_json
    from hooks.store import ActivationFolder
    from sae import TrainConfig
    from sae import train as run

    folder = ActivationFolder(activations)
    config = TrainConfig(
        site=site or _only_site(folder),
        expansion=expansion,
        k=k,
        steps=steps,
        batch=batch,
        lr=lr,
        warmup_steps=warmup_steps,
        threshold_start=threshold_start,
        dead_after_tokens=dead_after_tokens,
        checkpoint_every=checkpoint_every,
        measure_every=max(1, steps // 10),
        seed=seed,
    )
    sae = run(folder, config, out)
    result = {"out": str(out), **read_json(out / "metrics.json")}
    _finish(result, as_json, f"{sae!r}\n{result['heldout']}")


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
    from hooks.studies import read_folder
    from sae import CrossEntropy, EvaluationConfig, MatryoshkaSAE, evaluate, measure
    from sae.report import write_report

    if model is not None and studies is None:
        raise StudyError("--model needs --studies, the reports whose loss is measured")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    others = {path.name: MatryoshkaSAE.from_pretrained(path) for path in beside or []}
    if len(others) < len(beside or []):
        raise MairaSaeError("two folders given with --beside have one name; rename one")
    config = EvaluationConfig(heldout=heldout, seed=seed)
    records = read_folder(studies) if studies is not None else []
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
        from sae.cross_entropy import study_losses
        from sae.evaluate import codes, recovered

        chosen = [s for s in records if s.split(heldout) == "heldout"][:max_studies]
        if not chosen:
            raise StudyError(f"{studies} has no held-out study; raise --heldout or add studies")
        loaded = load_model(model, dtype=dtype, device_map=_device_map())
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
    _finish(result, as_json, _evaluation_lines(result))


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
    epilog="Example: `maira-sae label sae/ acts/ --latents 12,77 --endpoint "
    "http://127.0.0.1:8000/v1 --llm llama --out labels/`"
)
def label(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    latents: Annotated[str, typer.Option(help="Comma-separated latent numbers.")],
    out: Annotated[Path, typer.Option(help="Label folder to make or complete.")],
    endpoint: Endpoint = None,
    llm: Llm = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint with the tokenizer; default: the harvest's.")
    ] = None,
    allow_remote: AllowRemote = None,
    n_explain: Annotated[int, typer.Option(help="Sentences shown to the explainer.")] = 10,
    n_score: Annotated[int, typer.Option(help="Held-out sentences a label is scored on.")] = 20,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Name latents, by a language model or by word statistics; score names on held-out patients."""
    from autointerp import LabelConfig, label_latents
    from hooks.processor import load_processor
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE

    where = _endpoint(endpoint, llm, allow_remote)
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    tokenizer = load_processor(model or folder.manifest["model"]["id"]).tokenizer
    config = LabelConfig(_numbers(latents), n_explain=n_explain, n_score=n_score, seed=seed)
    labels = label_latents(sae, folder, tokenizer, where, config, out)
    lines = [f"{one.latent}\t{one.label}\t{one.balanced_accuracy}" for one in labels]
    _finish({"labels": [one._asdict() for one in labels]}, as_json, "\n".join(lines))


@app.command(
    epilog="Example: `maira-sae steer sae/ acts/ --model maira-2/ --studies mimic/ --study s50 "
    "--latent 12 --strength 2`"
)
def steer(
    sae_folder: SaeFolder,
    activations: ActivationsFolder,
    model: ModelFolder,
    studies: StudiesFolder,
    study: Annotated[str, typer.Option(help="Study id.")],
    latent: Annotated[int, typer.Option(help="Latent number.")],
    strength: Annotated[float, typer.Option(help="In units of the latent's 99th percentile.")],
    mode: Annotated[str, typer.Option(help="add or clamp.")] = "add",
    where: Annotated[str, typer.Option(help="all, prompt or generated.")] = "all",
    opening: Annotated[str, typer.Option(help="First words of the report.")] = "",
    max_new_tokens: int = 300,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate a study's report with a latent turned up or down, beside the plain one."""
    from autointerp import reference_activation
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from hooks.store import ActivationFolder
    from hooks.studies import read_folder
    from sae import MatryoshkaSAE
    from steering import Edit, compare

    records = {record.id: record for record in read_folder(studies)}
    if study not in records:
        raise StudyError(f"{studies} has no study {study!r}{nearest(study, records)}")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    reference = reference_activation(sae, folder, latent)
    edit = Edit(latent, strength, reference, mode)  # pyright: ignore[reportArgumentType]
    texts = compare(
        load_model(model, dtype=dtype, device_map=_device_map()),
        load_processor(model),
        records[study],
        sae,
        [edit],
        where=where,  # pyright: ignore[reportArgumentType]
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    result = {**texts._asdict(), "latent": latent, "strength": strength, "reference": reference}
    _finish(result, as_json, f"before: {texts.before}\nafter:  {texts.after}")


@app.command(epilog="Example: `maira-sae verify acts/`")
def verify(
    folder: Annotated[Path, typer.Argument(help="Any finished folder of this library.")],
    as_json: Json = False,
) -> None:
    """Compare every file of a finished folder with its recorded checksum."""
    from hooks.files import verify as run

    count = run(folder)
    _finish({"files": count}, as_json, f"{folder}: {count} files match their checksums")


def _endpoint(endpoint: str | None, llm: str | None, allow_remote: str | None) -> Any:
    """Where a language model answers, or None when none is asked for."""
    from autointerp import EndpointConfig

    if endpoint is None and llm is None:
        return None
    if endpoint is None or llm is None:
        raise MairaSaeError("--endpoint and --llm go together; give both, or neither")
    return EndpointConfig(endpoint, llm, allow_remote)


def _only_site(folder: Any) -> str:
    if len(folder.sites) > 1:
        raise MairaSaeError(f"{folder.folder} has sites {folder.sites}; choose one with --site")
    return folder.sites[0]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise MairaSaeError(f"--latents is {text!r}; write numbers like 12,77") from None


def _device_map() -> str | None:
    import torch

    return "auto" if torch.cuda.is_available() else None


def main() -> None:
    """Run the command line; deliberate errors become one line on standard error."""
    try:
        app(standalone_mode=True)
    except EndpointError as error:
        typer.echo(f"maira-sae: {error}", err=True)
        sys.exit(3 if error.resumable else 2)
    except MairaSaeError as error:
        typer.echo(f"maira-sae: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("maira-sae: interrupted; run the same command again to resume", err=True)
        sys.exit(3)
