"""Rewriting a dictionary in another library's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hooks.files import FormatError, atomic_folder, nearest, reject_unknown_keys
from sae.formats import dictionary_learning, sae_lens, sparsify
from sae.formats.given import Given
from sae.formats.read import read
from sae.model import MatryoshkaSAE


def _write_own(sae: MatryoshkaSAE, folder: Path) -> None:
    sae.save(folder, {"converted": dict(sae.config.origin)})


WRITERS: dict[str, Callable[[MatryoshkaSAE, Path], None]] = {
    "dictionary_learning": dictionary_learning.write,
    "sae_lens": sae_lens.write,
    "sparsify": sparsify.write,
    "maira_sae": _write_own,
}


def convert(
    source: Path | str | MatryoshkaSAE,
    destination: Path | str,
    to: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    format: str | None = None,
    **given: Any,
) -> MatryoshkaSAE:
    """Write the dictionary at ``source`` as the folder ``destination``, whole or not at all.

    Parameters
    ----------
    source
        What :meth:`sae.MatryoshkaSAE.from_pretrained` reads, or a dictionary.
    to
        ``dictionary_learning``, ``sae_lens``, ``sparsify`` or ``maira_sae``.
    revision, subfolder, format, given
        As for ``from_pretrained``. ``activation="topk"`` makes a threshold dictionary select
        its k largest latents of each token instead, which changes what is active.

    Returns
    -------
    MatryoshkaSAE
        The dictionary that was written.

    Raises
    ------
    FormatError
        If the format is unknown or cannot express the dictionary.
    FolderError
        If ``destination`` exists and holds anything but the same files.

    >>> from tempfile import TemporaryDirectory
    >>> from phantom.tour import dictionary
    >>> with TemporaryDirectory() as folder:
    ...     _ = convert(dictionary(), Path(folder) / "other", to="sae_lens")
    ...     sorted(path.name for path in (Path(folder) / "other").iterdir())
    ['cfg.json', 'sae_weights.safetensors']
    """
    if to not in WRITERS:
        known = ", ".join(WRITERS)
        raise FormatError(f"no format {to!r}{nearest(to, WRITERS)} to write; there are {known}")
    if isinstance(source, MatryoshkaSAE):
        sae = source
        if given.keys() - {"activation"} or revision or subfolder or format:
            raise FormatError("a dictionary in memory says everything but activation itself")
        if "activation" in given:
            config = replace(sae.config, activation=given["activation"])
            state = sae.state_dict()
            sae = MatryoshkaSAE(config, dtype=sae.W_dec.dtype)
            sae.threshold = state["threshold"].cpu().clone()
            sae.load_state_dict(state)
    else:
        reject_unknown_keys(given, [f.name for f in fields(Given)], "convert")
        sae = read(source, Given(**given), revision=revision, subfolder=subfolder, format=format)
    with atomic_folder(Path(destination)) as folder:
        WRITERS[to](sae, folder)
    return sae
