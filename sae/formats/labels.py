"""Facts that travel beside weights: what we record in other formats, and names of places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hooks.files import FormatError
from sae.formats.tensors import field, whole_numbers
from sae.model import SAEConfig

KEY = "maira_sae"
"""Key of the configurations we write under which our own configuration lies."""
_KEPT = {
    "k": int,
    "group_sizes": list,
    "site": str,
    "policy": str,
    "norm_scale": float,
    "model": dict,
    "origin": dict,
}
_HOOKS = {"hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out", "hook_attn_out": "attn_out"}


def own_record(config: SAEConfig) -> dict[str, Any]:
    """What another library's configuration cannot say, to be written under :data:`KEY`."""
    return {name: value for name, value in asdict(config).items() if name in _KEPT}


def own_facts(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The record that :func:`own_record` left in a configuration; empty in files of others."""
    record = field(config, KEY, dict, where, {})
    unknown = sorted(set(record) - set(_KEPT))
    if unknown:
        raise FormatError(f"{where}: {KEY} has unknown keys {unknown}; remove them")
    facts = {name: field(record, name, _KEPT[name], where) for name in record}
    if "group_sizes" in facts:
        facts["group_sizes"] = whole_numbers(facts["group_sizes"], "group_sizes", where)
    return {name: value for name, value in facts.items() if value is not None}


def site_of_hook(hook: Any) -> str:
    """Our name of a TransformerLens hook, or an empty string.

    >>> site_of_hook("blocks.15.hook_resid_post")
    'llm.15.resid_post'
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", str(hook))
    place = _HOOKS.get(found[2]) if found else None
    return f"llm.{found[1]}.{place}" if found and place else ""


def hook_of_site(site: str) -> str:
    """The inverse of :func:`site_of_hook`; sites without a hook's name stay as they are."""
    found = re.fullmatch(r"llm\.(\d+)\.(\w+)", site)
    hooks = {place: hook for hook, place in _HOOKS.items()}
    return f"blocks.{found[1]}.{hooks[found[2]]}" if found and found[2] in hooks else site


def layer_of_site(site: str) -> int | None:
    """Layer number of a residual-stream site of the language model, or ``None``."""
    found = re.fullmatch(r"llm\.(\d+)\.resid_post", site)
    return int(found[1]) if found else None


def model_of(name: Any) -> dict[str, Any]:
    """Model identity as activation folders have it, from a plain name."""
    return {"id": name} if isinstance(name, str) and name else {}
