"""Activations along the report that the model writes itself.

Each token is seen once: the prompt as it is read, then every generated token as it is fed back.
One token more than asked is generated and not kept, so that the last kept one is fed back too. What
lands on disk is what teacher-forcing the same tokens gives. Generated tokens have the role
``report`` (or ``grounding``), the folder's manifest holds ``decoding``, and the column ``loss`` has
each generated token's negative log-probability under the model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError, FolderError
from hooks.films import stack_films
from hooks.harvest import Harvest, HarvestConfig, harvest_record
from hooks.processor import Maira2Processor
from hooks.prompts import Prompt
from hooks.roles import Role, Span, Tokens, assign_roles
from hooks.rows import Read, RowMaker
from hooks.sites import observe
from hooks.store import ActivationFolder, StudyRows
from hooks.studies import Study


@dataclass(frozen=True)
class Decoding:
    """How reports are written: greedily, as MAIRA-2's are."""

    max_new_tokens: int = 300
    """Of a report, at most; MAIRA-2's own limits are 300, and 450 with boxes."""
    batch: int = 8
    """Reports written at a time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Generation(NamedTuple):
    """One report that the model wrote."""

    study: str
    sequence: int
    text: str
    """Grounding tokens included."""
    token_ids: list[int]
    logprobs: list[float]
    """Of each token, given those before it."""
    finished: bool
    """Whether the model ended it, rather than the limit."""


def harvest_generated(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
    decoding: Decoding | None = None,
    strict: bool = False,
) -> ActivationFolder:
    """As :func:`hooks.harvest.harvest`, along the model's own reports; those given are not read.

    Raises
    ------
    ConfigError
        If the sites are vision sites, which see no report.
    """
    folder = generation_job(model, processor, studies, config, out, decoding, strict).run()
    assert folder is not None  # alone, there is nobody to wait for
    return folder


def generation_job(
    model: Any,
    processor: Maira2Processor,
    studies: Sequence[Study],
    config: HarvestConfig,
    out: Path,
    decoding: Decoding | None = None,
    strict: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Harvest:
    """One process's share of :func:`harvest_generated`, see :class:`hooks.harvest.Harvest`."""
    decoding = decoding or Decoding()
    studies = [study.model_copy(update={"report": None}) for study in studies]
    maker = _GeneratingMaker(model, processor, studies, config, strict, decoding)
    record = {**harvest_record(model, studies, config), "decoding": asdict(decoding)}
    return Harvest.of(maker, record, config, out, rank, world)


def read_generations(folder: ActivationFolder) -> Iterator[Generation]:
    """What the model wrote for each study of a folder of :func:`harvest_generated`, in order."""
    names = sorted(n for n in folder.manifest["files"] if n.startswith("generations-"))
    if not names:
        raise FolderError(
            f"{folder.folder} holds no generated reports; harvest with `--generate` into a new one"
        )
    for name in names:
        for line in (folder.folder / name).read_text().splitlines():
            yield Generation(**json.loads(line))


class _GeneratingMaker(RowMaker):
    """Makes the rows of any part by writing its reports."""

    def __init__(
        self,
        model: Any,
        processor: Maira2Processor,
        studies: Sequence[Study],
        config: HarvestConfig,
        strict: bool,
        decoding: Decoding,
    ) -> None:
        super().__init__(model, processor, studies, config, strict)
        if self.sites[0].stream != "text":
            raise ConfigError(
                f"{self.sites[0].name!r} sees films only, which no report changes; harvest it "
                "without generating"
            )
        if config.patches is not None:
            raise ConfigError("patches are not sampled while reports are generated; leave it out")
        self._decoding = decoding

    @torch.no_grad()
    def rows(self, read: Read) -> list[StudyRows]:
        found: dict[int, StudyRows] = {}
        by_length = sorted(read.prompts, key=lambda prompt: (len(prompt.tokens), prompt.sequence))
        size = self._decoding.batch
        for start in range(0, len(by_length), size):
            batch = by_length[start : start + size]
            for one in self._write(batch, read):
                found[one.sequence] = one
        return [found[prompt.sequence] for prompt in read.prompts]

    def _write(self, batch: Sequence[Prompt], read: Read) -> Iterator[StudyRows]:
        model, limit = self.runner.model, self._decoding.max_new_tokens
        longest = max(len(prompt.tokens) for prompt in batch)
        pad = self.runner.processor.tokenizer.pad_token_id or 0
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(batch):  # left-padded: what is generated follows on
            ids[i, longest - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens.ids)
            mask[i, longest - len(prompt.tokens) :] = 1
        films = [film for prompt in batch for film in prompt.study.films()]
        seen: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(observe(site, _own_passes(seen[site.name].append)))
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                pixel_values=stack_films([read.planes[film] for film in films], model),
                max_new_tokens=limit + 1,
                do_sample=False,
                pad_token_id=pad,
                output_logits=True,
                return_dict_in_generate=True,
            )
        values = {name: torch.cat(chunks, dim=1) for name, chunks in seen.items()}
        new = out.sequences[:, longest:].cpu()
        scores = torch.stack(
            [
                step.float().log_softmax(-1).gather(1, new[:, i : i + 1].to(step.device))[:, 0]
                for i, step in enumerate(out.logits)
            ],
            dim=1,
        ).cpu()
        for i, prompt in enumerate(batch):
            ended = torch.isin(new[i], _ends(model)).nonzero()
            length = min(int(ended[0]) if len(ended) else limit, limit)
            first = longest - len(prompt.tokens)
            own = {name: v[i, first : longest + length] for name, v in values.items()}
            said, logprobs = new[i, :length].tolist(), scores[i, :length].numpy()
            yield self._rows_of(prompt, said, logprobs, bool(len(ended)), own)

    def _rows_of(
        self,
        prompt: Prompt,
        said: list[int],
        logprobs: np.ndarray,
        finished: bool,
        values: dict[str, Tensor],
    ) -> StudyRows:
        report, text = report_tokens(self.runner.processor, said)
        tokens = Tokens(
            *(
                np.concatenate([getattr(prompt.tokens, f.name), getattr(report, f.name)])
                for f in fields(Tokens)
            )
        )
        loss = np.full(len(tokens), np.nan)
        loss[len(prompt.tokens) :] = -logprobs
        chosen = np.flatnonzero(tokens.of_role(*self.kept.roles))
        rows = torch.from_numpy(chosen)
        study = prompt.study
        return StudyRows(
            study=study.id,
            patient=study.patient or study.id,
            sequence=prompt.sequence,
            positions=chosen,
            tokens=tokens.take(chosen),
            activations={
                name: v[rows.to(v.device)].to(self.kept.dtype).cpu() for name, v in values.items()
            },
            loss=loss[chosen],
            generation=Generation(
                study.id, prompt.sequence, text.strip(), said, logprobs.tolist(), finished
            )._asdict(),
        )


def _own_passes(see: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """``see`` for passes of the calling thread; others may write reports with the same model."""
    mine = threading.get_ident()
    return lambda value: see(value) if threading.get_ident() == mine else None


def _ends(model: Any) -> Tensor:
    """Ids that end a generation."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)


def report_tokens(processor: Maira2Processor, ids: Sequence[int]) -> tuple[Tokens, str]:
    """Roles and sentences of generated tokens, and their text.

    The ids are taken as they are: tokenising their text again need not give them back.
    """
    decode = processor.tokenizer.decode
    ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
    text = decode(ids)
    starts = [0, *ends][: len(ids)]
    # At least one character each, so that a token that shows none is report text all the same.
    offsets = [(start, max(end, start + 1)) for start, end in zip(starts, ends, strict=True)]
    whole = Span(0, max([len(text), *(end for _, end in offsets)]), Role.REPORT)
    return assign_roles(ids, offsets, text, [whole], processor.patches_per_image), text
