"""The model card of a published dictionary: README.md with the metadata that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sae.model import SAEConfig
from sae.report import shown

CAUTIONS = """\
- **Research only; never for clinical use.** Not a medical device. No output may inform the care
  of a person. The model it reads is itself licensed for research.
- **Gated data.** The activations come from data that need credentials or an agreement. A
  dictionary is derived from them and may memorise; share it only as their terms allow, and do
  not try to recover reports, films or persons from it.
- **Population and site shift.** Films of other hospitals, scanners, views, ages, sexes or
  ethnic groups may fire other latents. Nothing here was measured by demographic group unless a
  table above says so.
- **Identifiers.** Films can carry burnt-in text and reports can carry names. A latent may fire
  on them; look before examples are shown.
- **Latents are correlational.** A label says what a latent fires with, in the data it was seen
  on. It is no proof that the model uses it so, and a high score may rest on a confounder (a
  tube, a view, a phrase).
- **Steering can fabricate findings.** An edited report may state disease that is not there, or
  omit disease that is. Mark such text as altered, and never mix it with reports of patients.
"""


def model_card(
    repo: str,
    config: SAEConfig,
    metrics: Mapping[str, Any],
    *,
    data: str,
    license: str,
    base_model: str,
    formats: Sequence[str],
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    n_labels: int | None = None,
    scored: bool = False,
    disclosed: Sequence[str] = (),
) -> str:
    """The card as Markdown.

    Parameters
    ----------
    data
        What it was trained on and under which terms, in the publisher's words.
    formats
        Other libraries whose format lies in a folder of the repository.
    evaluation
        Record of :func:`sae.evaluate`; without it the card says that nothing has an interval.
    n_labels, scored
        Latents with a label, and whether the labels' scores lie beside them.
    disclosed
        Files that hold patient text or images, sent because they were named.
    """
    head = {
        "license": license,
        "library_name": "maira-sae",
        "tags": ["sparse-autoencoder", "interpretability", "radiology", "research-only"],
    }
    if base_model:
        head["base_model"] = base_model
    # JSON is YAML, and needs no library to quote what a user wrote.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    parts = [
        "---\n" + "\n".join(lines) + "\n---\n",
        f"# {repo.split('/')[-1]}\n",
        f"A Matryoshka BatchTopK sparse autoencoder of `{config.site or 'a site nobody named'}` in "
        f"{base_model or 'a model nobody named'}: {config.n_latents:,} latents over width "
        f"{config.d_model}, k = {config.k}, nested groups {list(config.group_sizes)}.\n",
        _usage(repo, formats),
        "## Intended use\n\nTo study what a report-writing model represents: finding, testing "
        "and editing "
        "latents in research. Out of scope: diagnosis, triage, report drafting for patients, "
        "quality "
        "control of care, inference about a person.\n",
        f"## Training data\n\n{data}\n\n{_training(training)}",
        f"## Token policy\n\n`{config.policy or 'not recorded'}`: which tokens' activations "
        f"it was trained "
        "on. On other tokens its latents have not been tested.\n",
        "## Metrics\n\n" + _metrics(metrics, evaluation),
        _labels(n_labels, scored),
        "## Limitations and cautions\n\n" + CAUTIONS,
    ]
    if disclosed:
        named = "\n".join(f"- `{one}`" for one in disclosed)
        parts.append(
            "## Text and images in this repository\n\nThe publisher chose to include files "
            "with report "
            f"text, study names or films:\n\n{named}\n"
        )
    else:
        parts.append(
            "## Text and images in this repository\n\nNone of reports, films or study names "
            "was found in "
            "these files when they were sent.\n"
        )
    parts.append(
        f"## Licence\n\n`{license}`. The terms of the model and of the data stay in force.\n"
    )
    return "\n".join(part for part in parts if part)


def _usage(repo: str, formats: Sequence[str]) -> str:
    lines = [
        "## Loading\n\n```python\nfrom sae import MatryoshkaSAE\n\n"
        f'sae = MatryoshkaSAE.from_pretrained("{repo}")\n```\n'
    ]
    if "sae_lens" in formats:
        lines.append(
            "```python\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{repo}", "sae_lens")\n```\n'
        )
    if "dictionary_learning" in formats:
        lines.append(
            "```python\nfrom dictionary_learning.utils import load_dictionary\n"
            "from huggingface_hub import snapshot_download\n\n"
            f'folder = snapshot_download("{repo}", allow_patterns="dictionary_learning/*")\n'
            'sae, config = load_dictionary(f"{folder}/dictionary_learning", "cpu")\n```\n\n'
            "`ae.pt` is a pickle, because that library reads no other file.\n"
        )
    return "\n".join(lines)


def _training(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return "Training settings were not recorded.\n"
    kept = ("expansion", "k", "activation", "steps", "batch", "lr", "seed", "dtype")
    said = ", ".join(f"{name} {training[name]}" for name in kept if name in training)
    return f"Training settings: {said}.\n"


def _metrics(metrics: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        heldout = metrics.get("heldout")
        if not heldout:
            return "Not measured.\n"
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in heldout.items())
        return (
            "On rows of held-out patients, at the end of training. **No intervals were "
            "measured.**\n\n"
            f"| | |\n|---|---|\n{rows}\n"
        )
    header = "| dictionary | FVU | L0 | cosine |\n|---|---|---|---|\n"
    rows = "\n".join(
        f"| {name} | " + " | ".join(shown(one[key]) for key in ("fvu", "l0", "cosine")) + " |"
        for name, one in evaluation["dictionaries"].items()
    )
    text = (
        f"{evaluation['n_tokens']:,} held-out tokens of {evaluation['n_patients']:,} patients; "
        f"{evaluation['interval']}.\n\n{header}{rows}\n"
    )
    for name, one in evaluation.get("cross_entropy_recovered", {}).items():
        text += f"\nCross-entropy recovered, {name}: {shown(one['recovered_zero'])}.\n"
    return text


def _labels(n_labels: int | None, scored: bool) -> str:
    if n_labels is None:
        return ""
    tested = (
        "read each beside its score and that of another latent's label, in `scores.jsonl`"
        if scored
        else "they were not tested, or the tests are not in this repository"
    )
    return (
        f"## Labels\n\n`labels.jsonl` names {n_labels:,} latents. Labels are machine-written "
        f"phrases; {tested}.\n"
    )
