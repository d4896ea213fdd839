"""Reports generated while latents are turned up or down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooks.files import ConfigError
from hooks.html import changed_words, marked
from hooks.policies import flag_roles
from hooks.processor import Encoding, Maira2Processor
from hooks.prompts import encode_study
from hooks.roles import Role, Tokens
from hooks.sites import Site, resolve_site, rewrite, text_tower
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Change, Edit, Plan, Push
from steering.positions import Mask, Positions, Row, Where


@contextmanager
def steered(
    model: Any,
    sae: MatryoshkaSAE,
    edits: Sequence[Change] | Sequence[Sequence[Change]],
    where: Where | Positions | Sequence[Where | Positions] = "all",
    prompt_length: int | None = None,
    *,
    tokens: Tokens | Sequence[Tokens] | None = None,
    tokenizer: Any = None,
) -> Iterator[None]:
    """While open, every forward pass of ``model`` applies ``edits`` at the SAE's site.

    Greedy decoding, sampling, beams and plain forward passes are the same to it, as are key-value
    cache or none and padding on either side. Contexts may be nested, also of several models; the
    inner one acts first.

    Parameters
    ----------
    edits
        For all rows of the batch, or a list of edits for each row. Beams and returned sequences
        take those of their row.
    where
        ``all`` positions, the ``prompt``, what is ``generated``, or :class:`Positions`; or one of
        these for each row.
    prompt_length
        Columns of the prompt, padding included; without it, the prompt is what ``tokens`` holds.
    tokens
        The prompt's tokens with their roles, of each row, without padding; needed for positions
        that go by role, film, box or section.
    tokenizer
        Needed for positions that go by section, sentence or grounding token.

    Raises
    ------
    ConfigError
        Where edits contradict each other or do not exist, and where positions are empty, need
        what is not given, or do not fit the batch that is run.

    >>> from phantom.tour import dictionary, model
    >>> maira, ids = model()[0], torch.tensor([[1, 5, 7]])
    >>> plain = maira(input_ids=ids).logits
    >>> with steered(maira, dictionary(), [Edit(3, strength=2.0, reference=5.0)]):
    ...     torch.equal(maira(input_ids=ids).logits, plain)
    False
    >>> torch.equal(maira(input_ids=ids).logits, plain)  # nothing is left behind
    True
    """
    edit_rows = _edit_rows(edits)
    wheres = [where] if isinstance(where, str | Positions) else list(where)
    known = [tokens] if tokens is None or isinstance(tokens, Tokens) else list(tokens)
    n_rows = max(len(edit_rows), len(wheres), len(known))
    for what, given in (("edits", edit_rows), ("positions", wheres), ("tokens", known)):
        if len(given) not in (1, n_rows):
            raise ConfigError(
                f"{what} are given for {len(given)} rows, others for {n_rows}; give each for every "
                "row or once for all"
            )
    tower = text_tower(model)
    site = resolve_site(model, sae.config.site)
    plan = Plan(sae, edit_rows, model.device)
    chosen = [Positions.of(one) for one in wheres]
    for one in chosen:
        patches = () if one.view is None and one.box is None else (Role.IMAGE,)
        flag_roles(sae.config.policy, one.roles or patches, "this edit")
    films = site.stream == "vision"
    if films and any(one.generated for one in chosen):
        raise ConfigError(
            f"{site.name!r} sees films only, none of which is generated; choose 'all', 'prompt' or "
            "patches"
        )
    if films:  # the prompt holds every film
        chosen = [Positions() if one == Positions(generated=False) else one for one in chosen]
    resolved = [
        Row(chosen[i % len(chosen)], known[i % len(known)], prompt_length, tokenizer)
        for i in range(n_rows if known[0] is not None else len(chosen))
    ]
    if not any(edit_rows):
        yield
        return
    with ExitStack() as stack:
        if films:
            stack.enter_context(rewrite(site, _over_films(site, plan, resolved)))
        else:
            _over_tokens(stack, model, tower, site, plan, Mask(resolved))
        yield


def _edit_rows(
    edits: Sequence[Change] | Sequence[Sequence[Change]],
) -> list[list[Change]]:
    one = [edit for edit in edits if isinstance(edit, Edit | Push)]
    if len(one) == len(edits):
        return [one]
    if one:
        raise ConfigError("edits and lists of edits are mixed; give edits, or one list for a row")
    return [list(row) for row in edits if not isinstance(row, Edit | Push)]


def _over_films(site: Site, plan: Plan, rows: Sequence[Row]) -> Callable[[Tensor], Tensor]:
    """Edits at a site with a row for each film, which knows nothing of the text."""
    everywhere = all(row.where.everywhere for row in rows)
    if everywhere and plan.n_rows == 1:
        return plan.apply
    if any(row.tokens is None for row in rows):
        raise ConfigError(
            f"{site.name!r} sees films, and only the prompt tells which is whose; give `tokens`"
        )
    masks, owner = [], []
    for i, row in enumerate(rows):
        patches = torch.from_numpy(row.patches())
        masks += list(patches)
        owner += [i] * len(patches)

    def change(value: Tensor) -> Tensor:
        n, length = value.shape[:2]
        if n % len(masks):
            raise ConfigError(
                f"positions are given for {len(masks)} films and the model sees {n}; give the "
                "`tokens` of the prompts that are run"
            )
        mask = torch.stack(masks).repeat_interleave(n // len(masks), 0)
        if length > mask.shape[1]:  # the CLS token comes first; it is no patch
            mask = torch.nn.functional.pad(mask, (length - mask.shape[1], 0), value=False)
        of_row = torch.tensor(owner).repeat_interleave(n // len(masks)).tolist()
        return plan.apply(value, mask.to(value.device), of_row)

    return change


def _over_tokens(
    stack: ExitStack, model: Any, tower: nn.Module, site: Site, plan: Plan, mask: Mask
) -> None:
    """Edits at a site with a row for each token."""
    if mask.everywhere and all(row.tokens is None for row in mask.rows):
        stack.enter_context(rewrite(site, plan.apply))
        return
    start, attention_mask = 0, None
    given: Tensor | None = None  # ids of the present forward pass
    history: Tensor | None = None  # ids of everything so far, as generate knows it

    def see_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal start, attention_mask
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        attention_mask = kwargs.get("attention_mask")

    def see_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal given
        given = args[0] if args else kwargs.get("input_ids")

    def change(value: Tensor) -> Tensor:
        n, length = value.shape[:2]
        if not (length == 1 and start and mask.known_pads(n)):
            mask.read_prompt(n, attention_mask)
            if given is not None and start == 0:
                mask.check_ids(given)
        ids = _all_ids(given, history, start) if mask.reads_ids else None
        at = mask.of(n, start, length, ids, value.device)
        if at is False:
            return value
        return plan.apply(value, None if at is True else at)

    stack.callback(tower.register_forward_pre_hook(see_call, with_kwargs=True).remove)
    if mask.reads_ids or any(row.tokens is not None for row in mask.rows):
        stack.callback(model.register_forward_pre_hook(see_ids, with_kwargs=True).remove)
    if mask.reads_ids:
        # The cache hides earlier tokens, and beams change places: only generate knows them all.
        prepare = model.prepare_inputs_for_generation

        def remember(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal history
            history = input_ids
            return prepare(input_ids, *args, **kwargs)

        stack.enter_context(_replaced(model, "prepare_inputs_for_generation", remember))
    stack.enter_context(rewrite(site, change))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance alone, put back afterwards."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _all_ids(given: Tensor | None, history: Tensor | None, start: int) -> Tensor:
    """Ids of all columns up to the end of this forward pass."""
    if given is not None and start == 0:
        return given
    if given is not None and history is not None:
        n = given.shape[1]
        if history.shape[1] == start + n and torch.equal(history[:, start:], given):
            return history
    raise ConfigError(
        "positions by sentence or grounding token need the ids of all tokens so far; call "
        "generate with input_ids, or run without a cache"
    )


class Comparison(NamedTuple):
    """A report without and with edits, under the same greedy decoding."""

    before: str
    after: str

    def _repr_html_(self) -> str:
        before, after = changed_words(self.before, self.after)
        return f"<p>plain: {marked(before)}</p><p>edited: {marked(after)}</p>"


@torch.no_grad()
def compare(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    sae: MatryoshkaSAE,
    edits: Sequence[Change],
    *,
    where: Where | Positions = "all",
    opening: str = "",
    max_new_tokens: int = 300,
) -> Comparison:
    """Generate a study's report twice, plainly and under ``edits``.

    Parameters
    ----------
    opening
        First words of the report, given to the model as its own. They count as prompt, and as the
        report's first sentence.

    >>> from phantom.tour import dictionary, model, studies
    >>> off = [Edit(3, mode="ablate")]
    >>> texts = compare(*model(), studies()[0], dictionary(), off, max_new_tokens=5)
    >>> texts._fields
    ('before', 'after')
    """
    encoding = encode_study(processor, study, with_report=False)
    inputs = _inputs(model, processor, encoding, opening)
    length = inputs["input_ids"].shape[1]
    at: dict[str, Any] = {"tokens": encoding.tokens, "tokenizer": processor.tokenizer}

    def report() -> str:
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return opening + processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True)

    before = report()
    with steered(model, sae, edits, where, length, **at):
        after = report()
    return Comparison(before.strip(), after.strip())


@torch.no_grad()
def generate_report(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    *,
    opening: str = "",
    max_new_tokens: int = 300,
) -> str:
    """A study's greedy report; under :func:`steered`, the steered one. ``opening`` is in it."""
    inputs = prompt_inputs(model, processor, study, opening)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = processor.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return (opening + said).strip()


def prompt_inputs(
    model: Any, processor: Maira2Processor, study: Study, opening: str = ""
) -> dict[str, Tensor]:
    """Model inputs of a study's prompt, without its report, on the model's device."""
    encoding = encode_study(processor, study, with_report=False)
    return _inputs(model, processor, encoding, opening)


def _inputs(
    model: Any, processor: Maira2Processor, encoding: Encoding, opening: str
) -> dict[str, Tensor]:
    inputs = processor.model_inputs(encoding)
    ids = inputs["input_ids"]
    if opening:
        said = processor.tokenizer(opening, add_special_tokens=False)["input_ids"]
        ids = torch.cat([ids, torch.tensor([said], dtype=ids.dtype)], dim=1)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": inputs["pixel_values"].to(model.device, model.dtype),
    }
