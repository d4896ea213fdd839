"""A folder that delphi (EleutherAI) reads in place of its own cache of latent activations.

``<out>/<hookpoint>/{first}_{last}.safetensors``, one for each stretch of latents, with

``locations``
    ``[n, 3]`` unsigned: text row, position in it, latent counted from ``first``
``activations``
    ``[n]`` float16, above 1e-5
``tokens``
    ``[rows, context]`` int64, in every file

and ``config.json`` (delphi's cache settings and the model's name). ``rows.jsonl`` is ours: the
study and the row of the activation folder that each text row begins with. delphi's explainers and
scorers start from there: ``LatentDataset(raw_dir=out, modules=[hookpoint], tokenizer=…, …)``.

Each study begins a text row of its own and the last one is padded, where delphi's cache runs texts
together. Image patches are shown as the image token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from hooks.files import ConfigError, atomic_folder
from hooks.store import ActivationFolder
from sae.latents import gather
from sae.model import MatryoshkaSAE

LEAST = 1e-5
"""delphi takes no smaller activation for one."""
LARGEST = float(np.finfo(np.float16).max)
_HOOKPOINTS = {"resid_post": "layers.{}", "mlp_out": "layers.{}.mlp", "attn_out": "layers.{}.attn"}


@dataclass(frozen=True)
class DelphiConfig:
    """Shape of the cache."""

    context: int = 256
    """Tokens in a text row; a multiple of delphi's ``example_ctx_len`` (32)."""
    n_splits: int = 5
    """Files that the latents are split over."""
    pad_token_id: int = 0
    """What fills a study's last text row."""
    hookpoint: str = ""
    """delphi's name of the place; default: sparsify's, such as ``layers.15``."""
    tokenizer: str = ""
    """Folder or Hub id that delphi loads the tokenizer from; default: the model of the harvest."""

    def __post_init__(self) -> None:
        for name in ("context", "n_splits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def hookpoint_of(site: str) -> str:
    """sparsify's name of one of our sites, which delphi uses, or the site's own name.

    >>> hookpoint_of("llm.15.resid_post"), hookpoint_of("llm.3.mlp_out"), hookpoint_of("projector")
    ('layers.15', 'layers.3.mlp', 'projector')
    """
    found = re.fullmatch(r"llm\.(\d+)\.(\w+)", site)
    if found is None or found[2] not in _HOOKPOINTS:
        return site
    return _HOOKPOINTS[found[2]].format(found[1])


@torch.no_grad()
def write_delphi_cache(
    sae: MatryoshkaSAE,
    folder: ActivationFolder,
    out: Path,
    config: DelphiConfig | None = None,
    *,
    include_text: bool = False,
    batch: int = 2048,
) -> Path:
    """Write the activations of every latent on ``folder`` as delphi's cache; see the module.

    The non-zero activations are held in memory, 8 bytes each.

    Parameters
    ----------
    out
        A new folder. One that holds this very cache is kept.
    include_text
        The cache holds the tokens of every report, which is why this must be said.
    batch
        Rows encoded at a time.

    Raises
    ------
    ConfigError
        Without ``include_text``, if the rows are no tokens, or an activation does not fit float16.
    FolderError
        If ``out`` holds something else.
    """
    config = config or DelphiConfig()
    if not include_text:
        raise ConfigError(
            "delphi's cache holds the tokens of every report; pass include_text=True if they may "
            "be where it is going"
        )
    folder.check_trained(sae.config.policy)
    site = folder.check_site(sae.config.site)
    ids = folder.column("token_id")
    if ids.min() < 0:
        raise ConfigError(
            f"{folder.folder} holds patches of an image encoder alone, and delphi shows tokens; "
            "use a harvest of a model with text"
        )
    row, position, starts = _layout(folder.column("sequence"), config.context)
    tokens = np.full((len(starts), config.context), config.pad_token_id, dtype=np.int64)
    tokens[row, position] = ids

    def encoded() -> Iterator[Tensor]:
        for start in range(0, folder.n_tokens, batch):
            x = folder.rows(site, start, min(start + batch, folder.n_tokens)).to(sae.W_dec)
            z = sae.encode(x)
            yield z * (z > LEAST)

    latents = gather(encoded())
    if len(latents.values) and float(latents.values.max()) > LARGEST:
        raise ConfigError(
            f"an activation is {float(latents.values.max()):.4g}, and delphi stores float16, at "
            f"most {LARGEST:.0f}; scale the dictionary's latents down"
        )
    bounds = np.linspace(0, latents.n_latents, config.n_splits + 1).astype(int)
    owner = latents.owner.numpy()
    at = latents.rows.numpy()
    with atomic_folder(out) as temporary:
        inside = temporary / (config.hookpoint or hookpoint_of(site))
        inside.mkdir(parents=True)
        for first, after in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if first == after:
                raise ConfigError(
                    f"{latents.n_latents} latents cannot be split over {config.n_splits} files; "
                    "ask for fewer"
                )
            own = slice(int(latents.starts[first]), int(latents.starts[after]))
            where = np.stack([row[at[own]], position[at[own]], owner[own] - first], axis=1)
            small = where.size == 0 or where.max() < 2**16
            split = {
                "locations": where.astype(np.uint16 if small else np.uint32),
                "activations": latents.values[own].numpy().astype(np.float16),
                "tokens": tokens,
            }
            save_file(split, inside / f"{first}_{after - 1}.safetensors")
        settings = {
            "dataset_repo": str(folder.folder),
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "",
            "batch_size": batch,
            "cache_ctx_len": config.context,
            "n_tokens": tokens.size,
            "n_splits": config.n_splits,
            "model_name": config.tokenizer or folder.manifest["model"]["id"],
        }
        (inside / "config.json").write_text(json.dumps(settings, indent=4) + "\n")
        studies = folder.column("study")
        lines = [
            json.dumps({"row": i, "study": str(studies[start]), "folder_row": int(start)}) + "\n"
            for i, start in enumerate(starts)
        ]
        (inside / "rows.jsonl").write_text("".join(lines))
    return out


def _layout(sequences: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text row and position of each folder row, and the folder row that each text row begins with.

    Parameters
    ----------
    sequences
        ``[n_tokens]``; tokens of one study are contiguous.
    """
    begins = np.flatnonzero(np.diff(sequences, prepend=sequences[0] - 1))
    lengths = np.diff(begins, append=len(sequences))
    within = np.arange(len(sequences)) - np.repeat(begins, lengths)
    position = within % context
    row = np.cumsum(position == 0) - 1
    return row, position, np.flatnonzero(position == 0)
