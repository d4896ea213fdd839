"""Model → activations: MAIRA-2, its sites and roles, studies, and the activation folder.

Names load when they are first used, so ``import hooks`` does not import transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooks.files import MairaSaeError
    from hooks.generation import Decoding, harvest_generated, read_generations
    from hooks.grounding import Box, GroundedPhrase, parse_grounded, uncrop_box, write_grounded
    from hooks.harvest import POLICIES, HarvestConfig, harvest
    from hooks.images import read_image
    from hooks.loading import load_any
    from hooks.maira2 import Maira2Config, Maira2ForConditionalGeneration, load_model
    from hooks.plain import FilmScale, Text, harvest_films, harvest_texts
    from hooks.processor import Maira2Processor, load_processor
    from hooks.readers import read_openi, read_studies
    from hooks.roles import Role, Tokens, View
    from hooks.sites import Site, capture, resolve_site, rewrite, site_names
    from hooks.store import ActivationFolder
    from hooks.studies import Skipped, Study, check_splits, read_folder

_HOME = {
    "files": ("MairaSaeError",),
    "generation": ("Decoding", "harvest_generated", "read_generations"),
    "grounding": ("Box", "GroundedPhrase", "parse_grounded", "uncrop_box", "write_grounded"),
    "harvest": ("HarvestConfig", "POLICIES", "harvest"),
    "images": ("read_image",),
    "loading": ("load_any",),
    "maira2": ("Maira2Config", "Maira2ForConditionalGeneration", "load_model"),
    "plain": ("FilmScale", "Text", "harvest_films", "harvest_texts"),
    "processor": ("Maira2Processor", "load_processor"),
    "readers": ("read_openi", "read_studies"),
    "roles": ("Role", "Tokens", "View"),
    "sites": ("Site", "capture", "resolve_site", "rewrite", "site_names"),
    "store": ("ActivationFolder",),
    "studies": ("Skipped", "Study", "check_splits", "read_folder"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "POLICIES",
    "ActivationFolder",
    "Box",
    "Decoding",
    "FilmScale",
    "GroundedPhrase",
    "HarvestConfig",
    "Maira2Config",
    "Maira2ForConditionalGeneration",
    "Maira2Processor",
    "MairaSaeError",
    "Role",
    "Site",
    "Skipped",
    "Study",
    "Text",
    "Tokens",
    "View",
    "capture",
    "check_splits",
    "harvest",
    "harvest_films",
    "harvest_generated",
    "harvest_texts",
    "load_any",
    "load_model",
    "load_processor",
    "parse_grounded",
    "read_folder",
    "read_generations",
    "read_image",
    "read_openi",
    "read_studies",
    "resolve_site",
    "rewrite",
    "site_names",
    "uncrop_box",
    "write_grounded",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hooks' has no attribute {name!r}")
    return getattr(import_module(f"hooks.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps ``hooks.harvest`` the function, though a module has its name."""

    @property
    def harvest(self) -> Any:
        return import_module("hooks.harvest").harvest

    @harvest.setter
    def harvest(self, module: ModuleType) -> None:
        """The import system would put the module here."""


sys.modules[__name__].__class__ = _Package
