"""A report generated under chosen edits, every one of which is listed with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hooks.pages import RESEARCH
from hooks.processor import Maira2Processor
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit
from steering.generate import compare
from steering.positions import Positions, Where
from steering.sentences import split_sentences

NOTICE = RESEARCH


@dataclass(frozen=True)
class Draft:
    """A report that is not the model's own reading of the films, and why."""

    study: str
    site: str
    where: str
    edits: tuple[Mapping[str, Any], ...]
    """Fields of each edit, its name, and ``what``: the edit in words."""
    plain: str
    """What the model writes without them."""
    text: str
    """What it writes under them."""

    @property
    def heading(self) -> str:
        """What marks the text as edited, wherever it is shown: every edit, in words."""
        edits = "; ".join(
            f"latent {edit['latent']}{_named(edit)}: {edit['what']}" for edit in self.edits
        )
        return f"draft with edits: {edits}" if edits else "draft without edits"

    @property
    def marked(self) -> str:
        """The text under its heading."""
        return f"[{self.heading}]\n{self.text}"

    @property
    def sentences(self) -> list[tuple[str, bool]]:
        """The draft's sentences, each with whether the plain report lacks it."""
        before = set(split_sentences(self.plain))
        return [(sentence, sentence not in before) for sentence in split_sentences(self.text)]

    def __str__(self) -> str:
        lines = [
            f"[{self.heading}]",
            f"Study {self.study}, edits at {self.site}, {self.where}. {NOTICE}",
        ]
        marks = ("", "[differs] ")
        return "\n".join(lines + [marks[new] + sentence for sentence, new in self.sentences])


def _named(edit: Mapping[str, Any]) -> str:
    return f" ({edit['name']})" if edit["name"] else ""


def draft(
    model: Any,
    processor: Maira2Processor,
    study: Study,
    sae: MatryoshkaSAE,
    edits: Sequence[Edit],
    *,
    where: Where | Positions = "all",
    names: Mapping[int, str] | None = None,
    opening: str = "",
    max_new_tokens: int = 300,
) -> Draft:
    """Generate a study's report under ``edits``, beside the plain one, greedily."""
    texts = compare(
        model,
        processor,
        study,
        sae,
        edits,
        where=where,
        opening=opening,
        max_new_tokens=max_new_tokens,
    )
    listed = tuple(
        {**asdict(edit), "name": (names or {}).get(edit.latent), "what": str(edit)}
        for edit in edits
    )
    return Draft(study.id, sae.config.site, str(where), listed, texts.before, texts.after)
