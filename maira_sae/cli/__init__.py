"""The command line: one thin function per subcommand, one file a room.

Exit status: 0 done, 2 wrong arguments or input (one line says why), 3 incomplete but resumable.
"""

from __future__ import annotations

import os
import sys

import typer

# Set before transformers is imported: its own messages and bars would break the contract that
# nothing but errors and results is printed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

from hooks.files import MairaSaeError
from maira_sae import bench
from maira_sae.cli import (  # noqa: F401  # each adds its subcommands
    clinic,
    collect,
    dashboard,
    dictionaries,
    export,
    finding,
    folders,
    harvest,
    labels,
    publish,
    steering,
    train,
)
from maira_sae.cli.app import app

app.add_typer(bench.app, name="bench")


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
