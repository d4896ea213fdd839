"""Reports that a model writes of a blank film with latents turned up, one latent after another.

Nothing but the latent can bring a finding into such a report, and no patient's film is needed. Each
report is kept as it is written, so that a run that is killed goes on with the next latent.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from autointerp import Features
from autointerp.causal import SteeredReports
from autointerp.collect import digest_of
from hooks.files import ConfigError, fingerprint
from hooks.progress import track
from hooks.studies import Study
from sae import MatryoshkaSAE
from steering import Edit, steered
from steering.generate import generate_report

GREY = 128
"""Of the blank film, everywhere."""


@dataclass(frozen=True)
class CausalConfig:
    """How a latent is turned up."""

    strength: float = 2.0
    """In units of the latent's 99th percentile, where it fires most often."""
    max_new_tokens: int = 300

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"strength {self.strength}, max_new_tokens {self.max_new_tokens}: give a positive "
                "strength, and at least one token"
            )


def write_causal_reports(
    model: Any,
    processor: Any,
    sae: MatryoshkaSAE,
    features: Features,
    latents: Sequence[int],
    out: Path,
    config: CausalConfig | None = None,
) -> SteeredReports:
    """The report of a blank film, plainly and with each latent added; kept in the folder ``out``.

    Dense latents are left out, since they are not labelled.

    Raises
    ------
    ConfigError
        If the features are not of this dictionary.
    """
    config = config or CausalConfig()
    if digest_of(sae) != features.manifest["dictionary_sha256"]:
        raise ConfigError(
            f"{features.folder} was not collected with this SAE; give the one that it was "
            "collected with"
        )
    wanted = [n for n in dict.fromkeys(latents) if not features.dense(n)]
    # The references say which latent of which features, the rest how it is turned up.
    record = {**asdict(config), "features": features.manifest["files"], "film": GREY}
    path = out / f"steered-{fingerprint(record)[:12]}.jsonl"
    kept = _kept(path)
    with tempfile.TemporaryDirectory(prefix="maira-sae-blank-") as folder:
        film = Path(folder) / "blank.png"
        size = getattr(processor, "image_size", 518)
        Image.new("L", (size, size), GREY).save(film)
        study = Study(id="blank", frontal=film)

        def write() -> str:
            tokens = config.max_new_tokens
            return generate_report(model, processor, study, max_new_tokens=tokens)

        if None not in kept:
            kept[None] = _keep(path, None, write())
        left = [latent for latent in wanted if latent not in kept]
        for latent in track(left, "steer", total=len(left)):
            edit = Edit(latent, config.strength, features.reference(latent), "add")
            with steered(model, sae, [edit]):
                kept[latent] = _keep(path, latent, write())
    return SteeredReports({n: kept[n] for n in wanted}, kept[None])


def _kept(path: Path) -> dict[int | None, str]:
    """Reports of an earlier run; a line that a kill tore is written anew."""
    found: dict[int | None, str] = {}
    if path.is_file():
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole + newline))
        for line in whole.splitlines():
            row = json.loads(line)
            found[row["latent"]] = row["report"]
    return found


def _keep(path: Path, latent: int | None, report: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write((json.dumps({"latent": latent, "report": report}) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return report
