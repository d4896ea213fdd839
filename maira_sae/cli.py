"""The command line: one thin function per subcommand.

Exit status: 0 done, 2 wrong arguments or input (one line says why), 3 incomplete but resumable.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

# Set before transformers is imported: its own messages and bars would break the contract that
# nothing but errors and results is printed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

from hooks.files import MairaSaeError, StudyError, nearest, write_json
from maira_sae import bench

N = TypeVar("N", int, float)

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
StudiesFolder = Annotated[
    Path, typer.Option("--studies", help="Folder of studies, in any layout that `studies` knows.")
]
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
        str, typer.Option(help="Tokens to keep: published, report, clinical, patches, all.")
    ] = "published",
    patches: Annotated[
        str | None,
        typer.Option(help="Sample of each study's patches: uniform:0.1 or norm:64, for example."),
    ] = None,
    store_dtype: Annotated[str, typer.Option(help="Dtype on disk.")] = "bfloat16",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a forward pass.")] = 8192,
    studies_per_part: Annotated[
        int, typer.Option(help="Studies that are kept in memory and committed together.")
    ] = 64,
    strict: Annotated[
        bool, typer.Option(help="Stop at a study that cannot be read, instead of skipping it.")
    ] = False,
    retry_skipped: Annotated[
        bool, typer.Option(help="Read skipped studies again, after they were mended.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Start even where the disk seems too small.")] = False,
    dtype: Dtype = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Check prompts against the checkpoint's own processor.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="Along the model's own reports, not the given ones.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest report of --generate.")] = 300,
    as_json: Json = False,
) -> None:
    """Write the activations of studies into a folder; run again to resume.

    The model is MAIRA-2 or another LLaVA; or an image encoder alone, which sees the films; or a
    causal language model alone, which reads the reports. Under torchrun each process makes its own
    parts, and the last one to finish seals the folder.
    """
    from hooks.harvest import Harvest, HarvestConfig
    from hooks.loading import load_any
    from hooks.policies import PatchSample
    from hooks.processor import load_processor

    sample = None if patches is None else PatchSample.parse(patches)
    config = HarvestConfig(
        tuple(site), policy, store_dtype, studies_per_part, batch_tokens, patches=sample
    )
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if retry_skipped and world > 1:
        raise MairaSaeError("--retry-skipped is for one process; run it once without torchrun")
    records = _studies(studies)
    device = _device_map() if world == 1 else _own_device()
    loaded, sees = load_any(model, dtype=dtype, device_map=device)
    if sees != "studies" and generate:
        raise MairaSaeError(f"--generate needs a model that writes reports, not {model}")
    share = {"strict": strict, "rank": rank, "world": world}
    if sees != "studies":
        job = _tower_job(model, loaded, sees, records, config, out, share)
    elif generate:
        from hooks.generation import Decoding, generation_job

        words, decoding = load_processor(model, trust_remote_code), Decoding(max_new_tokens)
        job = generation_job(loaded, words, records, config, out, decoding, **share)
    else:
        words = load_processor(model, trust_remote_code)
        job = Harvest(loaded, words, records, config, out, **share)
    if retry_skipped:
        job.reopen_skipped()
    result: dict[str, Any] = {"out": str(out)}
    if not job.sealed and rank == 0 and sees == "studies" and not generate:
        left = job.estimate()
        typer.echo(f"to do: {left}")
        if not force:
            left.check_room(out)
        result["estimate"] = left._asdict()
    folder = job.run()
    if folder is None:
        text = f"process {rank} of {world} is done; the last one to finish seals {out}"
        _finish({**result, "sealed": False}, as_json, text)
        return
    result |= {
        "sealed": True,
        "n_tokens": folder.n_tokens,
        "n_studies": folder.manifest["n_studies"],
        "n_skipped": folder.manifest.get("n_skipped", 0),
        "sites": folder.sites,
    }
    _finish(result, as_json, repr(folder))


def _tower_job(
    source: str,
    model: Any,
    sees: str,
    studies: Sequence[Any],
    config: Any,
    out: Path,
    share: dict[str, Any],
) -> Any:
    """An image encoder over the studies' films, or a language model over their reports."""
    from hooks.plain import FilmScale, Text, films_job, texts_job

    if sees == "films":
        return films_job(model, studies, config, out, FilmScale.from_pretrained(source), **share)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [Text(s.id, s.report, s.patient) for s in studies if s.report]
    return texts_job(model, tokenizer, texts, config, out, **share)


@app.command(
    epilog="Example: `maira-sae train acts/ --site llm.15.resid_post --expansion 4 --out sae/`; "
    "on 8 GPUs `torchrun --nproc-per-node 8 -m maira_sae train acts/ … --shard-latents`; without "
    "a folder, rows come from the model: `maira-sae train --model maira-2/ --studies mimic/ …`"
)
def train(
    out: Annotated[Path, typer.Option(help="SAE folder to make or complete.")],
    activations: Annotated[
        Path | None,
        typer.Argument(metavar="[ACTS]", help="Activation folder; without one, --model runs."),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Site; not needed when there is one. Repeatable.")
    ] = None,
    expansion: Annotated[
        list[int] | None, typer.Option(help="Dictionary size over width (8). Repeatable.")
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Mean active latents per token (32). Repeatable.")
    ] = None,
    activation: Annotated[str, typer.Option(help="batch_topk or topk.")] = "batch_topk",
    groups: Annotated[
        str, typer.Option(help="Group fractions, such as 0.25,0.75; 1 means no nesting.")
    ] = "",
    sampled_prefixes: Annotated[
        int, typer.Option(help="Prefixes drawn anew each step, instead of groups.")
    ] = 0,
    k_start: Annotated[int | None, typer.Option(help="k at the first step.")] = None,
    k_anneal_steps: Annotated[int, typer.Option(help="Steps from --k-start to --k.")] = 0,
    steps: int = 10_000,
    batch: Annotated[int, typer.Option(help="Tokens a step, of all ranks together.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Default: 2e-4 / sqrt(F / 2^14).")] = None,
    warmup_steps: int = 1000,
    role_weight: Annotated[
        list[str] | None, typer.Option(help="Loss weight of a role: report=2. Repeatable.")
    ] = None,
    max_norm: Annotated[
        float | None, typer.Option(help="Leave out rows above so many root-mean-square norms.")
    ] = None,
    threshold_start: Annotated[
        int, typer.Option(help="Step from which the threshold is followed.")
    ] = 1000,
    calibration_rows: Annotated[
        int, typer.Option(help="Rows on which the final threshold is set so that L0 is k.")
    ] = 0,
    dead_after_tokens: int = 10_000_000,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    kernels: Annotated[
        str | None, typer.Option(help="reference, cpu or triton; default: the fastest.")
    ] = None,
    shard_latents: Annotated[
        bool, typer.Option(help="Under torchrun: split the dictionary, not the batch.")
    ] = False,
    log: Annotated[
        list[str] | None, typer.Option(help="tensorboard or wandb (offline). Repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to run instead of ACTS.")] = None,
    studies: Annotated[Path | None, typer.Option(help="Studies for --model.")] = None,
    policy: Annotated[str, typer.Option(help="Tokens kept of --model.")] = "published",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train Matryoshka BatchTopK SAEs; run again to resume.

    Several sites, expansions or k train in one pass over the data, each into a folder of its own
    under --out.
    """
    from itertools import product

    from hooks.files import read_json
    from sae import TrainConfig, train_all
    from sae import train as run

    rows: Any = _live_rows(model, studies, site, policy) if activations is None else None
    if activations is not None:
        from hooks.store import ActivationFolder

        rows = ActivationFolder(activations)
    common: dict[str, Any] = {
        "activation": activation,
        "sampled_prefixes": sampled_prefixes,
        "k_start": k_start,
        "k_anneal_steps": k_anneal_steps,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "role_weights": _weights(role_weight or ()),
        "max_norm": max_norm,
        "threshold_start": threshold_start,
        "calibration_rows": calibration_rows,
        "dead_after_tokens": dead_after_tokens,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "kernels": kernels,
        "shard_latents": shard_latents,
        "measure_every": max(1, steps // 10),
        "seed": seed,
    }
    if groups:
        common["group_fractions"] = _numbers(groups, "--groups", float)
    chosen = list(product(site or [_only_site(rows)], expansion or [8], k or [32]))
    configs = {
        f"{place}-x{size}-k{active}": TrainConfig(place, expansion=size, k=active, **common)
        for place, size, active in chosen
    }
    loggers = tuple(log or ())
    with _ranks() as leader:
        if len(configs) == 1:
            saes = {"": run(rows, next(iter(configs.values())), out, loggers)}
        else:
            saes = train_all(rows, configs, out, loggers)
    if not leader:
        return
    records = {name: read_json(out / name / "metrics.json") for name in saes}
    lines = [f"{sae!r}\n{records[name]['heldout']}" for name, sae in saes.items()]
    result = records.get("", {"saes": records})
    _finish({"out": str(out), **result}, as_json, "\n".join(lines))


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
    records = _studies(studies) if studies is not None else []
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
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 16,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="Most requests a minute, retries included.")
    ] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(help="Most tokens a minute, by the estimate.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of 1M tokens in.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of 1M tokens out.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop before all runs into --out cost more; exit 3.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Stop after so many requests of this run; exit 3.")
    ] = None,
    redact: Annotated[
        bool, typer.Option(help="Take identifiers out of text for a remote host.")
    ] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Name latents, by a language model or by word statistics; score names on held-out patients.

    Run again to resume: what was answered is in --out, and is not asked again. Every request that
    leaves is listed in requests.jsonl there.
    """
    from dataclasses import replace

    from autointerp import LabelConfig, Limits, label_latents
    from hooks.processor import load_processor
    from hooks.store import ActivationFolder
    from sae import MatryoshkaSAE

    where = _endpoint(endpoint, llm, allow_remote)
    limits = Limits(
        concurrency,
        requests_per_minute,
        tokens_per_minute,
        price_in,
        price_out,
        max_cost,
        max_requests,
    )
    if where is not None:
        where = replace(where, limits=limits, redact=redact)
    elif limits != Limits():
        raise MairaSaeError("rates, prices and budgets are for --endpoint; leave them out")
    sae, folder = MatryoshkaSAE.from_pretrained(sae_folder), ActivationFolder(activations)
    tokenizer = load_processor(model or folder.manifest["model"]["id"]).tokenizer
    config = LabelConfig(
        _numbers(latents, "--latents", int), n_explain=n_explain, n_score=n_score, seed=seed
    )
    labels = label_latents(
        sae, folder, tokenizer, where, config, out, lambda left: typer.echo(f"to do: {left}")
    )
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
    strength: Annotated[
        float | None,
        typer.Option(help="In units of the latent's 99th percentile; of scale, the factor."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="add, scale, clamp, minimum (clamp from below) or ablate.")
    ] = "add",
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
    from sae import MatryoshkaSAE
    from steering import Edit, compare

    records = {record.id: record for record in _studies(studies)}
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
    result = {
        **texts._asdict(),
        **{"latent": latent, "mode": mode, "strength": strength, "reference": reference},
    }
    _finish(result, as_json, f"before: {texts.before}\nafter:  {texts.after}")


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

    sizes = _numbers(group_sizes, "--group-sizes", int) if group_sizes is not None else None
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
    _finish(result, as_json, text)


@app.command(epilog="Example: `maira-sae studies mimic-cxr-jpg/ --open --json`")
def studies(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of studies.")],
    layout: Annotated[
        str | None, typer.Option(help="What DIR holds; default: told by its files.")
    ] = None,
    open_films: Annotated[
        bool, typer.Option("--open", help="Open every film, to find those that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a folder of studies holds: layout, counts, splits, gaps; leaks are an error."""
    from hooks.progress import track
    from hooks.readers import detect_layout, read_studies, survey
    from hooks.studies import refuse_leaks

    layout = layout or detect_layout(folder)
    found = survey(track(read_studies(folder, layout=layout), "studies"), open_films)
    result = {"layout": layout, **found.as_dict()}
    _finish(result, as_json, _survey_lines(layout, found))
    refuse_leaks(found.leaks)


def _survey_lines(layout: str, found: Any) -> str:
    def counts(numbers: dict[str, int], limit: int = 14) -> str:
        shown = [f"{name} {n}" for name, n in list(numbers.items())[:limit] if n]
        return ", ".join(shown) or "none"

    lines = [
        f"layout    {layout}",
        f"studies   {found.studies} of {found.patients} patients, {found.films} films",
        f"with      {counts(found.have)}",
        f"sentences {found.sentences} with {found.boxes} boxes",
        f"labels    {counts(found.labels)}",
        f"splits    its own: {counts(found.given_splits)}; ours: {counts(found.splits)}",
    ]
    lines += [
        f"gap       {kind}: {gap.n}, the first {gap.first}" for kind, gap in found.gaps.items()
    ]
    return "\n".join(lines + [f"leak      {leak}" for leak in found.leaks[:20]])


@app.command(epilog="Example: `maira-sae verify acts/`")
def verify(
    folder: Annotated[Path, typer.Argument(help="Any finished folder of this library.")],
    as_json: Json = False,
) -> None:
    """Compare every file of a finished folder with its recorded checksum.

    Of an activation folder, also the rows of every part: tensors, token table and sums.
    """
    from hooks.files import MANIFEST, is_sealed, read_json
    from hooks.files import verify as run
    from hooks.store import KIND, ActivationFolder

    if is_sealed(folder) and read_json(folder / MANIFEST).get("kind") == KIND:
        activations = ActivationFolder(folder)
        count, rows = activations.verify(), activations.n_tokens
        text = f"{folder}: {count} files match their checksums, {rows:,} rows in every table"
        _finish({"files": count, "rows": rows}, as_json, text)
        return
    count = run(folder)
    _finish({"files": count}, as_json, f"{folder}: {count} files match their checksums")


def _studies(folder: Path) -> list[Any]:
    """All studies of a folder; how many were skipped goes to standard error."""
    from hooks.readers import collect_studies

    found = collect_studies(folder)
    if found.skipped:
        name, reason = found.skipped[0]
        typer.echo(
            f"maira-sae: skipped {len(found.skipped)} studies, the first {name} ({reason}); "
            f"`maira-sae studies {folder}` counts them",
            err=True,
        )
    return found.studies


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


def _numbers(text: str, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise MairaSaeError(f"{option} is {text!r}; write numbers like 12,77") from None


def _weights(pairs: Sequence[str]) -> dict[str, float]:
    weights = {}
    for pair in pairs:
        role, _, number = pair.partition("=")
        try:
            weights[role] = float(number)
        except ValueError:
            raise MairaSaeError(f"--role-weight is {pair!r}; write one like report=2") from None
    return weights


def _live_rows(
    model: str | None, studies: Path | None, sites: list[str] | None, policy: str
) -> Any:
    """Rows straight from a model, where no activation folder is given."""
    if model is None or studies is None or not sites:
        raise MairaSaeError(
            "give an activation folder, or --model, --studies and --site to train without one"
        )
    from hooks.harvest import HarvestConfig
    from hooks.maira2 import load_model
    from hooks.processor import load_processor
    from sae import LiveRows

    loaded = load_model(model, device_map=_device_map())
    config = HarvestConfig(tuple(sites), policy)
    return LiveRows(loaded, load_processor(model), _studies(studies), config)


@contextmanager
def _ranks() -> Iterator[bool]:
    """Join the process group that ``torchrun`` describes, if it does; yields whether to print."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()


def _own_device() -> Any:
    """The device of one process among several on a machine."""
    import torch

    return {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None


def _device_map() -> str | None:
    import torch

    return "auto" if torch.cuda.is_available() else None


def main() -> None:
    """Run the command line; deliberate errors become one line on standard error."""
    try:
        app(standalone_mode=True)
    except MairaSaeError as error:
        typer.echo(f"maira-sae: {error}", err=True)
        sys.exit(3 if error.resumable else 2)
    except KeyboardInterrupt:
        typer.echo("maira-sae: interrupted; run the same command again to resume", err=True)
        sys.exit(3)
