"""Which parts of a model are untrained, as the model itself or its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks.files import MANIFEST, read_json

UNTRAINED = "untrained"


def untrained_parts(source: str | Path | None = None, model: Any = None) -> tuple[str, ...]:
    """Names of the parts whose record says ``untrained``, such as ``projector``.

    The record is ``parts`` of the model's configuration, or of the manifest of the checkpoint's
    folder or the one above. A checkpoint that says nothing is taken as trained.

    Parameters
    ----------
    source
        Checkpoint folder; a Hub id has no folder and is passed over.
    model
        The loaded model, if it is.
    """
    records: list[Any] = [getattr(getattr(model, "config", None), "parts", None)]
    folder = Path(source) if source is not None else None
    if folder is not None and folder.is_dir():
        for path in (folder / "config.json", folder / MANIFEST, folder.resolve().parent / MANIFEST):
            if path.is_file():
                found = read_json(path)
                records.append(found.get("parts") if isinstance(found, Mapping) else None)
    names = [
        name
        for record in records
        if isinstance(record, Mapping)
        for name, said in record.items()
        if said == UNTRAINED
    ]
    return tuple(dict.fromkeys(names))


def warning_of(untrained: tuple[str, ...]) -> str | None:
    """What a page says of them.

    >>> warning_of(())
    >>> warning_of(("projector",)).split(";")[0]
    'The projector of this model is untrained'
    """
    if not untrained:
        return None
    are = "is" if len(untrained) == 1 else "are"
    return (
        f"The {' and '.join(untrained)} of this model {are} untrained; its reports do not depend "
        "on the films and mean nothing clinically."
    )
