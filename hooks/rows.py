"""Rows of a part: its studies read ahead of the model, run in batches, and their kept tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError, StudyError
from hooks.films import Films, Planes, stack_films
from hooks.harvest_config import HarvestConfig
from hooks.policies import POLICIES, PatchSample
from hooks.processor import Maira2Processor
from hooks.prompts import Prompt, PromptRunner, Ran, encode_study
from hooks.roles import Role, Tokens
from hooks.sites import Site, capture, resolve_sites, site_width
from hooks.store import DTYPES, StudyRows
from hooks.streams import default_streams
from hooks.studies import Skipped, Study

READERS = 8
"""Threads that read films, where the model runs on another device."""


class Kept(NamedTuple):
    """Which tokens are kept, and how they are stored."""

    roles: tuple[Role, ...]
    patches: PatchSample | None
    dtype: torch.dtype

    def mask(
        self, tokens: Tokens, study: str, values: Callable[[np.ndarray], Tensor] | None = None
    ) -> np.ndarray:
        """Mask of a study's kept tokens.

        ``values`` gives activations of tokens for a sample by norm; without it, a sample of the
        same size is drawn uniformly.
        """
        keep = tokens.of_role(*self.roles)
        image = np.flatnonzero(keep & tokens.of_role(Role.IMAGE))
        if self.patches is not None and len(image):
            norms = None
            if self.patches.by == "norm" and values is not None:
                norms = values(image).to(self.dtype).double().norm(dim=1).cpu().numpy()
            keep[image] = False
            keep[image[self.patches.choose(study, len(image), norms)]] = True
        return keep


class Read(NamedTuple):
    """A part's studies, tokenised, with their films in memory."""

    prompts: list[Prompt]
    planes: Planes
    skipped: list[Skipped]


class RowMaker:
    """Makes the rows of any part of a harvest.

    Raises
    ------
    StudyError, SiteError, ConfigError
        If there are no studies, a site does not exist, or the parts do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        processor: Maira2Processor,
        studies: Sequence[Study],
        config: HarvestConfig,
        strict: bool,
    ) -> None:
        if not studies:
            raise StudyError("there are no studies to harvest; give at least one")
        self.sites = resolve_sites(model, config.sites)
        if processor.patches_per_image != model.config.image_seq_length:
            raise ConfigError(
                f"the processor makes {processor.patches_per_image} tokens of a film, the model "
                f"takes {model.config.image_seq_length}; load both from one checkpoint"
            )
        roles = kept_roles(config.policy, self.sites)
        self.kept = Kept(roles, config.patches, DTYPES[config.dtype])
        self.runner = PromptRunner(model, processor, config.tokens_on(model.device))
        self._strict, self._studies, self._size = strict, studies, config.studies_per_part
        self.n_studies = len(studies)
        self.names = [site.name for site in self.sites]
        self.widths = {site.name: site_width(model, site) for site in self.sites}
        self.streams = default_streams(model)
        settle(processor.tokenizer)
        if processor.hub_processor is not None:
            encode_study(processor, studies[0])  # compares the two prompts

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.runner.model.device

    def read(self, part: int) -> Read:
        """Studies of a part, in memory."""
        first = part * self._size
        chunk = self._studies[first : first + self._size]
        return read_part(self.runner, chunk, first, self._strict)

    def rows(self, read: Read) -> list[StudyRows]:
        """Kept rows of the studies read."""
        return part_rows(self.runner, self.sites, read, self.kept)


def settle(tokenizer: Any) -> None:
    """Let a tokenizer drop the padding and truncation it was saved with.

    It does so at its first call, which must not happen while another thread is in it.
    """
    tokenizer("", return_offsets_mapping=True)


def kept_roles(policy: str, sites: Sequence[Site]) -> tuple[Role, ...]:
    """Roles that a policy keeps of what ``sites`` see."""
    if sites[0].stream == "text":
        return POLICIES[policy]
    if Role.IMAGE not in POLICIES[policy]:
        raise ConfigError(
            f"policy {policy!r} keeps no image tokens, and {sites[0].name!r} has nothing else; "
            "use policy 'patches'"
        )
    return (Role.IMAGE,)


def read_part(runner: PromptRunner, studies: Sequence[Study], first: int, strict: bool) -> Read:
    """Tokenise studies, numbered from ``first``, and read their films.

    A study that cannot be read is skipped with its reason.

    Raises
    ------
    StudyError
        At the first study that cannot be read, if ``strict``.
    """
    prompts, planes, skipped = [], {}, []
    films = dict.fromkeys(film for study in studies for film in study.films())
    with _reading(runner, films) as plane_of:
        for sequence, study in enumerate(studies, first):
            try:
                prompt = runner.prompt(sequence, study)
                own = {film: plane_of(film) for film in study.films() if film not in planes}
            except StudyError as error:
                if strict:
                    raise StudyError(f"study {study.id!r}: {error}") from None
                skipped.append(Skipped(study.id, f"unreadable: {error}"))
            else:
                prompts.append(prompt)
                planes |= own
    return Read(prompts, planes, skipped)


@contextmanager
def _reading(runner: PromptRunner, films: Iterable[Path]) -> Iterator[Callable[[Path], np.ndarray]]:
    """What gives a film's pixel values: threads read ahead where the model runs elsewhere.

    Where the model runs on the same cores, threads would only cost their switching.
    """
    if runner.model.device.type == "cpu":
        yield runner.plane
        return
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        coming = {film: pool.submit(runner.plane, film) for film in films}
        try:
            yield lambda film: coming[film].result()
        finally:
            pool.shutdown(cancel_futures=True)


@torch.no_grad()
def part_rows(
    runner: PromptRunner, sites: Sequence[Site], read: Read, kept: Kept
) -> list[StudyRows]:
    """Kept rows of each prompt, in the order given."""
    if not read.prompts:
        return []
    rows = (_vision if sites[0].stream == "vision" else _text)(runner, sites, read, kept)
    found = {one.sequence: one for one in rows}
    return [found[prompt.sequence] for prompt in read.prompts]


def _text(
    runner: PromptRunner, sites: Sequence[Site], read: Read, kept: Kept
) -> Iterator[StudyRows]:
    core = runner.model.model
    copies = HostCopies(runner.model.device)
    with capture(sites) as run:

        def forward(_: Any, __: int, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            return run(core, **inputs)

        waiting: Callable[[], list[StudyRows]] | None = None
        for ran in runner.run(read.prompts, forward, Films(runner.model, read.planes)):
            coming = partial(_received, *_sent(ran, kept, copies))
            if waiting is not None:  # received while the device computes the batch after it
                yield from waiting()
            waiting = coming
        if waiting is not None:
            yield from waiting()


def _sent(
    ran: Ran, kept: Kept, copies: HostCopies
) -> tuple[Sequence[Prompt], list[np.ndarray], Callable[[], dict[str, Tensor]]]:
    """Start to copy the kept rows of a batch; with positions of each prompt's."""
    flat = {name: values.flatten(0, 1) for name, values in ran.result.items()}
    width = next(iter(ran.result.values())).shape[1]
    if ran.prefix is not None:
        flat = {name: torch.cat([ran.prefix[name][0], values]) for name, values in flat.items()}
    last = list(flat.values())[-1]
    positions, index = [], []
    for i, prompt in enumerate(ran.prompts):
        # Token → row of `flat`: the shared beginning, then each prompt's own tokens, padded.
        place = np.arange(len(prompt.tokens))
        place[ran.start :] += i * width
        keep = kept.mask(prompt.tokens, prompt.study.id, lambda at, p=place: last[p[at]])
        chosen = np.flatnonzero(keep)
        positions.append(chosen)
        index.append(place[chosen])
    rows = torch.from_numpy(np.concatenate(index)).to(last.device)
    chosen_rows = {name: values[rows].to(kept.dtype) for name, values in flat.items()}
    return ran.prompts, positions, copies.start(chosen_rows)


def _received(
    prompts: Sequence[Prompt],
    positions: Sequence[np.ndarray],
    finish: Callable[[], dict[str, Tensor]],
) -> list[StudyRows]:
    sizes = [len(chosen) for chosen in positions]
    split = {name: values.split(sizes) for name, values in finish().items()}
    return [
        _study_rows(prompt, chosen, {name: values[i] for name, values in split.items()})
        for i, (prompt, chosen) in enumerate(zip(prompts, positions, strict=True))
    ]


def _vision(
    runner: PromptRunner, sites: Sequence[Site], read: Read, kept: Kept
) -> Iterator[StudyRows]:
    """A film is computed once, whichever studies have it."""
    patches = runner.patches
    films = list(dict.fromkeys(film for prompt in read.prompts for film in prompt.study.films()))
    size = max(1, runner.batch_tokens // patches)
    found: dict[Path, dict[str, Tensor]] = {}
    with capture(sites) as run:
        for start in range(0, len(films), size):
            batch = films[start : start + size]
            pixels = stack_films([read.planes[film] for film in batch], runner.model)
            captured = run(runner.see, pixel_values=pixels)
            # CLS comes first where there is one
            own = {n: v[:, -patches:].to(kept.dtype).cpu() for n, v in captured.items()}
            for i, film in enumerate(batch):
                found[film] = {name: values[i] for name, values in own.items()}
    for prompt in read.prompts:
        each = [found[film] for film in prompt.study.films()]
        whole = {site.name: torch.cat([one[site.name] for one in each]) for site in sites}
        image = np.cumsum(prompt.tokens.of_role(Role.IMAGE)) - 1  # token → row of `whole`
        last = whole[sites[-1].name]
        keep = kept.mask(prompt.tokens, prompt.study.id, lambda at, p=image, v=last: v[p[at]])
        chosen = np.flatnonzero(keep)
        rows = torch.from_numpy(image[chosen])
        own = {name: values[rows] for name, values in whole.items()}
        yield _study_rows(prompt, chosen, own)


def _study_rows(
    prompt: Prompt, positions: np.ndarray, activations: Mapping[str, Tensor]
) -> StudyRows:
    study = prompt.study
    return StudyRows(
        study=study.id,
        patient=study.patient or study.id,
        sequence=prompt.sequence,
        positions=positions,
        tokens=prompt.tokens.take(positions),
        activations=activations,
    )


class HostCopies:
    """Device → host copies that overlap the next forward pass, through two pinned buffers in turn.

    At most two copies may be under way: finish the first before the third starts. On a CPU nothing
    is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned = [torch.empty(0, dtype=torch.uint8)] * 2
        self._turn = 0

    def start(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to copy; the function returned waits, and gives tensors of their own memory."""
        if self._stream is None:
            return lambda: dict(tensors)
        self._turn = 1 - self._turn
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        if len(self._pinned[self._turn]) < need:
            self._pinned[self._turn] = torch.empty(need, dtype=torch.uint8, pin_memory=True)
        buffer, offset, views = self._pinned[self._turn], 0, {}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                size = tensor.numel() * tensor.element_size()
                views[name] = buffer[offset : offset + size].view(tensor.dtype).view(tensor.shape)
                views[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
                offset += size
            done = self._stream.record_event()

        def finish() -> dict[str, Tensor]:
            done.synchronize()
            return {name: view.clone() for name, view in views.items()}

        return finish
