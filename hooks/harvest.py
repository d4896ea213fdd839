"""Studies × model × sites → an activation folder: streaming, resumable, deterministic.

Studies are cut into parts of a fixed number, in order, and each part is computed by itself. So a
run that was killed continues at the first missing part and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError, StudyError, fingerprint, is_sealed, nearest
from hooks.processor import Maira2Processor
from hooks.progress import track
from hooks.prompts import Prompt, PromptRunner, encode_study
from hooks.roles import Role
from hooks.sites import Site, capture, resolve_sites
from hooks.store import DTYPES, ActivationFolder, ActivationWriter, StudyRows
from hooks.studies import Study

POLICIES: dict[str, tuple[Role, ...]] = {
    "all": tuple(Role),
    "published": (Role.CLINICAL, Role.REPORT, Role.GROUNDING),
    "report": (Role.REPORT, Role.GROUNDING),
    "patches": (Role.IMAGE,),
}
"""Which roles are kept. ``published`` follows arXiv 2507.12950: image tokens and boilerplate go."""


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested, and in which pieces."""

    sites: tuple[str, ...]
    """Site names of one stream, see :mod:`hooks.sites`."""
    policy: str = "published"
    """A key of :data:`POLICIES`."""
    dtype: str = "bfloat16"
    """Dtype on disk."""
    studies_per_part: int = 64
    """A part is held in memory and committed as a whole."""
    batch_tokens: int = 8192
    """Padded tokens in a forward pass."""

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.policy, POLICIES, "policy"),
            (self.dtype, DTYPES, "dtype"),
        ):
            if value not in known:
                raise ConfigError(
                    f"unknown {what} {value!r}{nearest(value, known)}; choose from {list(known)}"
                )
        for name in ("studies_per_part", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def harvest(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
) -> ActivationFolder:
    """Write the activations of ``studies`` at ``config.sites`` into the folder ``out``.

    A folder that already holds this very harvest is completed, or returned as it is.

    Raises
    ------
    StudyError
        If there are no studies, or a film or text cannot be read.
    SiteError
        If a site does not exist in ``model``.
    FolderError
        If ``out`` holds something else.
    """
    record = harvest_record(model, studies, config)
    part_rows = _parts(model, processor, studies, config)
    writer = ActivationWriter(out, record)
    if is_sealed(out):
        return ActivationFolder(out)
    names = record["harvest"]["sites"]
    n_parts = -(-len(studies) // config.studies_per_part)
    for part in track(range(n_parts), "harvest", total=n_parts):
        if not writer.has(part):
            writer.write(part, part_rows(part), names)
    writer.seal(n_parts, sites=names, **record)
    return ActivationFolder(out)


def harvest_record(model: Any, studies: Sequence[Study], config: HarvestConfig) -> dict[str, Any]:
    """What decides the rows of a harvest, as JSON: its config, the model and the studies."""
    sites = resolve_sites(model, config.sites)
    return {
        "harvest": {**asdict(config), "sites": [site.name for site in sites]},
        "model": {
            "id": str(model.config._name_or_path),
            "revision": getattr(model.config, "_commit_hash", None),
            "config_sha256": fingerprint(model.config.to_dict()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "studies_sha256": fingerprint([study.model_dump(mode="json") for study in studies]),
    }


def harvest_rows(
    model: Any, processor: Maira2Processor, studies: Sequence[Study], config: HarvestConfig
) -> Iterator[StudyRows]:
    """The rows of one study after another, computed a part at a time; nothing is written.

    Raises what :func:`harvest` raises, but for folders.
    """
    part_rows = _parts(model, processor, studies, config)
    for part in range(-(-len(studies) // config.studies_per_part)):
        yield from part_rows(part)


def _parts(
    model: Any, processor: Maira2Processor, studies: Sequence[Study], config: HarvestConfig
) -> Callable[[int], list[StudyRows]]:
    """A function from the number of a part to its rows."""
    if not studies:
        raise StudyError("there are no studies to harvest; give at least one")
    sites = resolve_sites(model, config.sites)
    if processor.patches_per_image != model.config.image_seq_length:
        raise ConfigError(
            f"the processor makes {processor.patches_per_image} tokens of a film, the model takes "
            f"{model.config.image_seq_length}; load both from one checkpoint"
        )
    kept = _kept_roles(config.policy, sites)
    runner = PromptRunner(model, processor, config.batch_tokens)
    if processor.hub_processor is not None:
        encode_study(processor, studies[0])  # compares the two prompts
    size = config.studies_per_part

    def rows(part: int) -> list[StudyRows]:
        chunk = studies[part * size : (part + 1) * size]
        prompts = [runner.prompt(i, study) for i, study in enumerate(chunk, part * size)]
        return _rows(runner, sites, prompts, kept, config)

    return rows


def _kept_roles(policy: str, sites: Sequence[Site]) -> tuple[Role, ...]:
    if sites[0].stream == "text":
        return POLICIES[policy]
    if Role.IMAGE not in POLICIES[policy]:
        raise ConfigError(
            f"policy {policy!r} keeps no image tokens, and {sites[0].name!r} has nothing else; "
            "use policy 'patches'"
        )
    return (Role.IMAGE,)


@torch.no_grad()
def _rows(
    runner: PromptRunner,
    sites: list[Site],
    prompts: list[Prompt],
    kept: tuple[Role, ...],
    config: HarvestConfig,
) -> list[StudyRows]:
    """Kept rows of each prompt, in the order given."""
    vision = sites[0].stream == "vision"
    outputs = _vision(runner, sites, prompts) if vision else _text(runner, sites, prompts)
    dtype = DTYPES[config.dtype]
    rows: dict[int, StudyRows] = {}
    for prompt, activations in outputs:
        keep = prompt.tokens.of_role(*kept)
        chosen = torch.from_numpy(keep[prompt.tokens.of_role(Role.IMAGE)] if vision else keep)
        rows[prompt.sequence] = StudyRows(
            study=prompt.study.id,
            patient=prompt.study.patient or prompt.study.id,
            sequence=prompt.sequence,
            positions=np.flatnonzero(keep),
            tokens=prompt.tokens.take(keep),
            activations={name: values[chosen].to(dtype) for name, values in activations.items()},
        )
    return [rows[prompt.sequence] for prompt in prompts]


def _text(
    runner: PromptRunner, sites: list[Site], prompts: list[Prompt]
) -> Iterator[tuple[Prompt, dict[str, Tensor]]]:
    """Each prompt with ``[tokens, d]`` per site."""
    core = runner.model.model
    with capture(sites) as run:

        def forward(_: Any, __: int, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            return run(core, **inputs)

        for ran in runner.run(prompts, forward):
            for i, prompt in enumerate(ran.prompts):
                own = {n: v[i, : len(prompt.tokens) - ran.start] for n, v in ran.result.items()}
                if ran.prefix is not None:
                    own = {n: torch.cat([ran.prefix[n][0], v]) for n, v in own.items()}
                yield prompt, {name: values.cpu() for name, values in own.items()}


def _vision(
    runner: PromptRunner, sites: list[Site], prompts: list[Prompt]
) -> Iterator[tuple[Prompt, dict[str, Tensor]]]:
    """Each prompt with ``[patches of its films, d]`` per site; a film is computed once."""
    patches = runner.processor.patches_per_image
    films = list(dict.fromkeys(film for prompt in prompts for film in prompt.study.films()))
    size = max(1, runner.batch_tokens // patches)
    found: dict[Path, dict[str, Tensor]] = {}
    with capture(sites) as run:
        for start in range(0, len(films), size):
            batch = films[start : start + size]
            features = runner.model.model.get_image_features
            captured = run(features, pixel_values=runner.films(batch))
            for i, film in enumerate(batch):  # CLS comes first where there is one
                found[film] = {n: v[i, -patches:].cpu() for n, v in captured.items()}
    for prompt in prompts:
        each = [found[film] for film in prompt.study.films()]
        yield prompt, {s.name: torch.cat([v[s.name] for v in each]) for s in sites}
