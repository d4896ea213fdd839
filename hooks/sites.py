"""Names of places in a model, and the hooks that read or change what flows through them.

``llm.15.resid_post``
    residual stream after decoder layer 15 (what ``layers[15]`` returns)
``llm.15.attn_out``, ``llm.15.mlp_out``
    what that layer's attention or MLP adds to the stream
``vision.11.resid_post``, ``vision.11.attn_out``, ``vision.11.mlp_out``
    the same for the vision backbone (after LayerScale: what is added)
``projector``
    projected image features, which take the place of image tokens

Sites of one *stream* share their rows: ``text`` sites have a row per prompt token, ``vision``
sites a row per image patch (the CLS token is not kept).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from hooks.files import SiteError, nearest

PLACES = ("attn_out", "mlp_out", "resid_post")
_NAME = re.compile(rf"(llm|vision)\.(\d+)\.({'|'.join(PLACES)})")

Stream = Literal["text", "vision"]


class Site(NamedTuple):
    """A named place and the module whose output is read there."""

    name: str
    stream: Stream
    module: nn.Module
    order: tuple[int, int, int]
    """Sorts sites in the order a forward pass reaches them."""


def _towers(model: nn.Module) -> dict[str, Sequence[Any]]:
    core: Any = getattr(model, "model", model)
    return {"vision": core.vision_tower.encoder.layer, "llm": core.language_model.layers}


def site_names(model: nn.Module) -> list[str]:
    """Every site of ``model``, in the order a forward pass reaches them."""
    towers = _towers(model)

    def names(tower: str) -> list[str]:
        return [f"{tower}.{i}.{place}" for i in range(len(towers[tower])) for place in PLACES]

    return [*names("vision"), "projector", *names("llm")]


def resolve_site(model: nn.Module, name: str) -> Site:
    """The module behind a site name.

    Raises
    ------
    SiteError
        For an unknown name (with the nearest known one) or a layer the model does not have.
    """
    if name == "projector":
        core: Any = getattr(model, "model", model)
        return Site(name, "vision", core.multi_modal_projector, (1, 0, 0))
    match = _NAME.fullmatch(name)
    if match is None:
        raise SiteError(
            f"unknown site {name!r}{nearest(name, site_names(model))}; sites are 'projector' and "
            "'{llm,vision}.<layer>.{resid_post,mlp_out,attn_out}'"
        )
    tower, layer, place = match[1], int(match[2]), match[3]
    layers = _towers(model)[tower]
    if layer >= len(layers):
        raise SiteError(
            f"site {name!r} asks for layer {layer}, this model's {tower} layers are "
            f"0–{len(layers) - 1}; choose one of those"
        )
    block = layers[layer]
    if tower == "llm":
        module = {"attn_out": block.self_attn, "mlp_out": block.mlp, "resid_post": block}[place]
        return Site(name, "text", module, (2, layer, PLACES.index(place)))
    scales = {"attn_out": block.layer_scale1, "mlp_out": block.layer_scale2, "resid_post": block}
    return Site(name, "vision", scales[place], (0, layer, PLACES.index(place)))


def resolve_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    """Sites of one stream in execution order; duplicates and mixed streams are errors."""
    if not names:
        raise SiteError("no site was named; name at least one, for example llm.15.resid_post")
    if len(set(names)) < len(names):
        raise SiteError(f"a site is named twice in {list(names)}; name each once")
    sites = sorted((resolve_site(model, name) for name in names), key=lambda site: site.order)
    if len({site.stream for site in sites}) > 1:
        raise SiteError(
            f"{sites[0].name!r} has a row per patch and {sites[-1].name!r} a row per token; "
            "harvest vision sites and llm sites into two folders"
        )
    return sites


class _StopForward(Exception):
    """Raised by the last site's hook: nothing after it is needed."""


def output_tensor(output: Any) -> Tensor:
    """A module's output, which some transformers releases wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def capture(sites: Sequence[Site], stop: bool = True) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Yield ``run(forward, **inputs)``: it calls ``forward`` and returns what the sites gave.

    Parameters
    ----------
    sites
        In execution order, as :func:`resolve_sites` returns them.
    stop
        Leave the forward pass right after the last site.
    """
    captured: dict[str, Tensor] = {}
    handles = []

    def reader(site: Site, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured[site.name] = output_tensor(output).detach()
            if last and stop:
                raise _StopForward

        return hook

    def run(forward: Callable[..., Any], **inputs: Any) -> dict[str, Tensor]:
        captured.clear()
        with suppress(_StopForward):
            forward(**inputs)
        return dict(captured)

    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(reader(site, site is sites[-1])))
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rewrite(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what flows through ``site`` by ``change(value)`` while the context is open.

    ``change`` may return its argument itself, in which case nothing is replaced.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = output_tensor(output)
        changed = change(value)
        if changed is value:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # First of all hooks: transformers collects the hidden states that a vision backbone's feature
    # maps are made of in a hook of its own, which must see the changed value.
    handle = site.module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def site_width(model: nn.Module, site: Site) -> int:
    """Width ``d`` of what a site gives."""
    config: Any = model.config
    tower = config.vision_config if site.name.startswith("vision.") else config.text_config
    return tower.hidden_size
