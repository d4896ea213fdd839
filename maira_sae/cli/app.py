"""The application that every subcommand is added to."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

ORDER = (
    "demo",
    "studies",
    "harvest",
    "train",
    "eval",
    "convert",
    "collect",
    "label",
    "score",
    "dashboard",
    "export",
    "steer",
    "review",
    "index",
    "search",
    "history",
    "draft",
    "publish",
    "verify",
    "bench",
)
"""The order in which help lists them: that of the work."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Open up MAIRA-2 with sparse autoencoders: harvest, train, label, steer.",
    pretty_exceptions_enable=False,
)
