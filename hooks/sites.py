"""Names of places in a model, and the hooks that read or change what flows through them.

``llm.15.resid_pre``, ``llm.15.resid_mid``, ``llm.15.resid_post``
    residual stream before decoder layer 15, between its attention and its MLP, and after it (what
    ``layers[15]`` returns)
``llm.15.attn_out``, ``llm.15.mlp_out``
    what that layer's attention or MLP adds to the stream
``vision.11.resid_post`` …
    the same five for the vision encoder (after LayerScale: what is added)
``projector``
    projected image features, which take the place of image tokens

Models are told apart by their parts, not by their class: MAIRA-2, any LLaVA of transformers, a
causal language model alone (``llm`` sites) and an image encoder alone (``vision`` sites).

Sites of one *stream* share their rows: ``text`` sites have a row per prompt token, ``vision``
sites a row per image patch (the CLS token is not kept).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from hooks.files import SiteError, nearest

PLACES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""In the order a forward pass reaches them."""
_NAME = re.compile(rf"(llm|vision)\.(\d+)\.({'|'.join(PLACES)})")

Stream = Literal["text", "vision"]

_TEXT_LAYERS = (
    "model.language_model.layers",  # LLaVA and MAIRA-2 with their head
    "language_model.layers",
    "model.layers",  # Llama, Mistral, Qwen, Gemma
    "layers",
    "gpt_neox.layers",
    "transformer.h",
    "h",
)
_VISION_TOWERS = ("model.vision_tower", "vision_tower")
_VISION_ALONE = ("dinov2", "vit", "vision_model", "")
_VISION_LAYERS = ("encoder.layer", "encoder.layers", "vision_model.encoder.layers", "layers")
_PROJECTORS = ("model.multi_modal_projector", "multi_modal_projector")


class _Parts(NamedTuple):
    """Names, in a layer, of what adds to the stream, and of the norm that reads it in between."""

    attn: str
    mlp: str
    mid_norm: str


_PARTS = (
    _Parts("layer_scale1", "layer_scale2", "norm2"),  # DINOv2
    _Parts(  # Gemma 2 and 3 normalise what they add
        "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm"
    ),
    _Parts("self_attn", "mlp", "post_attention_layernorm"),  # Llama and its kin
    _Parts("self_attn", "mlp", "layer_norm2"),  # CLIP, SigLIP
    _Parts("attention", "mlp", "post_attention_layernorm"),  # GPT-NeoX
    _Parts("attention", "mlp", "layernorm_after"),  # ViT
    _Parts("attn", "mlp", "ln_2"),  # GPT-2
)


class Site(NamedTuple):
    """A named place and the module at which it is read."""

    name: str
    stream: Stream
    module: nn.Module
    order: tuple[int, int, int]
    """Sorts sites in the order a forward pass reaches them."""
    side: Literal["input", "output"] = "output"
    """Which side of ``module`` is read."""
    block: nn.Module | None = None
    """Of ``resid_mid``, whose value also flows past ``module``: the layer around it."""


def _part(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    found: Any = module
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


def _first(module: nn.Module, paths: Sequence[str]) -> Any:
    return next((p for path in paths if (p := _part(module, path)) is not None), None)


def _towers(model: nn.Module) -> dict[str, Sequence[nn.Module]]:
    """Layers by tower, vision before text."""
    towers: dict[str, Sequence[nn.Module]] = {}
    sees_only = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    vision = _first(model, _VISION_ALONE if sees_only else _VISION_TOWERS)
    if vision is not None and (layers := _first(vision, _VISION_LAYERS)) is not None:
        towers["vision"] = layers
    if not sees_only and (layers := _first(model, _TEXT_LAYERS)) is not None:
        towers["llm"] = layers
    if not towers:
        parts = [name for name, _ in model.named_children()]
        raise SiteError(
            f"no layers were found in a {type(model).__name__}, whose parts are {parts}; give a "
            "LLaVA, a causal language model or an image encoder of transformers"
        )
    return towers


def text_tower(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers and is called with ``past_key_values``."""
    for path in _TEXT_LAYERS:
        if _part(model, path) is not None:
            return _part(model, path.rpartition(".")[0])
    raise SiteError(
        f"a {type(model).__name__} has no decoder layers, so it writes no text; give a LLaVA or a "
        "causal language model"
    )


def _parts(block: nn.Module) -> _Parts:
    for parts in _PARTS:
        if all(isinstance(getattr(block, name, None), nn.Module) for name in parts):
            return parts
    found = [name for name, _ in block.named_children()]
    raise SiteError(
        f"a {type(block).__name__} has parts {found}, none of the known layouts of attention and "
        "MLP; use resid_pre or resid_post, which need none"
    )


def _places(block: nn.Module) -> tuple[str, ...]:
    """The places a layer has."""
    try:
        _parts(block)
    except SiteError:
        return ("resid_pre", "resid_post")
    if getattr(block, "use_parallel_residual", False):
        return tuple(place for place in PLACES if place != "resid_mid")
    return PLACES


def site_names(model: nn.Module) -> list[str]:
    """Every site of ``model``, in the order a forward pass reaches them."""
    names = {
        tower: [f"{tower}.{i}.{place}" for i, b in enumerate(layers) for place in _places(b)]
        for tower, layers in _towers(model).items()
    }
    projector = [] if _first(model, _PROJECTORS) is None else ["projector"]
    return [*names.get("vision", []), *projector, *names.get("llm", [])]


def resolve_site(model: nn.Module, name: str) -> Site:
    """The module behind a site name.

    Raises
    ------
    SiteError
        For an unknown name (with the nearest known one), or a tower, layer or place the model
        does not have.
    """
    towers = _towers(model)
    if name == "projector":
        projector = _first(model, _PROJECTORS)
        if projector is None:
            raise SiteError(
                f"a {type(model).__name__} has no projector; its sites are those of "
                f"{' and '.join(towers)}, such as {site_names(model)[-1]!r}"
            )
        return Site(name, "vision", projector, (1, 0, 0))
    match = _NAME.fullmatch(name)
    if match is None:
        raise SiteError(
            f"unknown site {name!r}{nearest(name, site_names(model))}; sites are 'projector' and "
            f"'{{llm,vision}}.<layer>.{{{','.join(PLACES)}}}'"
        )
    tower, layer, place = match[1], int(match[2]), match[3]
    if tower not in towers:
        raise SiteError(
            f"site {name!r} asks for {tower} layers, a {type(model).__name__} has only "
            f"{next(iter(towers))} layers; choose one such as {site_names(model)[-1]!r}"
        )
    layers = towers[tower]
    if layer >= len(layers):
        raise SiteError(
            f"site {name!r} asks for layer {layer}, this model's {tower} layers are "
            f"0–{len(layers) - 1}; choose one of those"
        )
    block = layers[layer]
    stream: Stream = "text" if tower == "llm" else "vision"
    order = (2 if tower == "llm" else 0, layer, PLACES.index(place))
    if place == "resid_pre":
        return Site(name, stream, block, order, side="input")
    if place == "resid_post":
        return Site(name, stream, block, order)
    parts = _parts(block)
    if place not in _places(block):
        raise SiteError(
            f"site {name!r} does not exist: attention and MLP of a {type(block).__name__} read the "
            "same stream; use resid_pre or resid_post"
        )
    if place == "resid_mid":
        return Site(name, stream, getattr(block, parts.mid_norm), order, "input", block)
    return Site(
        name, stream, getattr(block, parts.attn if place == "attn_out" else parts.mlp), order
    )


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


def input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module is called with, by position or as ``hidden_states``."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def observe(site: Site, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the value at ``site`` in every forward pass while the context is open."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        see(input_tensor(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        see(output_tensor(output))

    if site.side == "input":
        handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = site.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture(sites: Sequence[Site], stop: bool = True) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Yield ``run(forward, **inputs)``: it calls ``forward`` and returns what the sites gave.

    Parameters
    ----------
    sites
        In execution order, as :func:`resolve_sites` returns them.
    stop
        Leave the forward pass right after the last site.

    Threads may each capture of one model at the same time: a pass gives its values to the ``run``
    that started it.
    """
    captured: dict[str, Tensor] = {}
    runner: int | None = None

    def reader(site: Site, last: bool) -> Callable[[Tensor], None]:
        def see(value: Tensor) -> None:
            if runner != threading.get_ident():
                return
            captured[site.name] = value.detach()
            if last and stop:
                raise _StopForward

        return see

    def run(forward: Callable[..., Any], **inputs: Any) -> dict[str, Tensor]:
        nonlocal runner
        captured.clear()
        runner = threading.get_ident()
        try:
            with suppress(_StopForward):
                forward(**inputs)
        finally:
            runner = None
        return dict(captured)

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(observe(site, reader(site, site is sites[-1])))
        yield run


@contextmanager
def rewrite(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what flows through ``site`` by ``change(value)`` while the context is open.

    ``change`` may return its argument itself, in which case nothing is replaced.
    """
    past: Tensor | None = None

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal past
        value = input_tensor(args, kwargs)
        changed = change(value)
        past = None if changed is value else changed - value
        if changed is value:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        value = output_tensor(output)
        changed = change(value)
        return None if changed is value else with_value(output, changed)

    def add_past(module: nn.Module, args: Any, output: Any) -> Any:
        return None if past is None else with_value(output, output_tensor(output) + past)

    def with_value(output: Any, value: Tensor) -> Any:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    # First of all hooks: transformers collects the hidden states that a vision backbone's feature
    # maps are made of in a hook of its own, which must see the changed value.
    if site.side == "input":
        handles = [site.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)]
    else:
        handles = [site.module.register_forward_hook(after, prepend=True)]
    if site.block is not None:
        # The stream runs past the norm at which resid_mid is read: what was changed is added after.
        handles.append(site.block.register_forward_hook(add_past, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def site_width(model: nn.Module, site: Site) -> int:
    """Width ``d`` of what a site gives."""
    config: Any = model.config
    tower = "vision_config" if site.name.startswith("vision.") else "text_config"
    return (getattr(config, tower, None) or config).hidden_size
