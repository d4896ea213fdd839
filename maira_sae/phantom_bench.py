"""Phantom studies on which steering is chosen, and others on which it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.grounding import Box
from hooks.roles import Role, Tokens, View
from hooks.sites import capture, resolve_sites
from maira_sae.phantom_trial import Trial
from phantom import LABELS, PhantomStudy, Reading, read_report, sample_study
from phantom.corpus import grey, normalised
from phantom.model import load
from phantom.score import write_reports
from sae import MatryoshkaSAE
from sae.latent_scores import aurocs, best_factors
from steering import Positions, steered
from steering.edits import Change

TRAIN_SEED = 700_000_000
TEST_SEED = 710_000_000
SWEEP = (
    "vision.1.resid_post",
    "vision.3.resid_post",
    "projector",
    "llm.1.resid_post",
    "llm.3.resid_post",
)
"""Sites at which mean-difference steering is tried; all of them hold a row for every patch."""
BATCH = 64
"""Reports written together."""

Steering = Callable[[Sequence[Tokens]], AbstractContextManager[None]]
"""Opens the context in which the reports of these prompts are written."""


@dataclass(frozen=True)
class SteeringBench:
    """Sizes of the measurement."""

    n_train: int = 250
    """Studies on which everything is chosen."""
    n_test: int = 300
    """Other studies, on which it is measured."""
    tried: int = 12
    """Training studies on which one candidate is tried."""
    measured: int = 40
    """Most test studies of a finding with it, and as many without."""
    rate: float = 0.2
    """How often each finding occurs, independently of the others."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Latents edited together."""
    strengths: tuple[float, ...] = (1.0, 2.0)
    """At the finding's patches, in units of the 99th percentile there; of mean differences, in
    units of their length."""
    film_strengths: tuple[float, ...] = (0.5, 1.0)
    """On whole films, in units of the 99th percentile on films with the finding."""
    sites: tuple[str, ...] = SWEEP
    workers: int = 2
    """Processes; each takes a finding at a time."""

    def quick(self) -> SteeringBench:
        """Small enough to check that it runs."""
        return replace(
            self,
            n_train=60,
            n_test=30,
            tried=2,
            measured=3,
            sizes=(2,),
            strengths=(1.0,),
            film_strengths=(0.5,),
            sites=SWEEP[1:2],
        )


class Bench:
    """Training and test studies, and what every finding's measurement needs of them."""

    def __init__(self, config: SteeringBench, sae: MatryoshkaSAE) -> None:
        self.config, self.sae = config, sae
        self.model: Any
        self.model, self.words = load()
        self.train = self._draw(TRAIN_SEED, config.n_train)
        self.test = self._draw(TEST_SEED, config.n_test)
        shown = [s.frontal.coverage().reshape(len(LABELS), -1) > 0.05 for s in self.train]
        self.shown = torch.from_numpy(np.stack(shown))  # [n, 14, P]
        self.present = torch.tensor([[x in s.factors.present for x in LABELS] for s in self.train])
        self.side = self.model.config.patch_grid

    def _draw(self, first: int, n: int) -> list[PhantomStudy]:
        return [
            sample_study(
                first + i,
                sampler="independent",
                rate=self.config.rate,
                lateral=False,
                prior=False,
                grounded=False,
            )
            for i in range(n)
        ]

    def tokens(self, study: PhantomStudy) -> Tokens:
        r = study.report
        return self.words.tokenize_reporting(
            indication=r.indication, technique=r.technique, comparison=r.comparison
        )

    @cached_property
    def plain(self) -> dict[int, str]:
        """Every study's report without edits, by seed."""
        studies = [*self.train, *self.test]
        texts = write_reports(self.model, self.words, studies)
        return {study.seed: text for study, text in zip(studies, texts, strict=True)}

    @cached_property
    def said(self) -> dict[int, Reading]:
        return {seed: read_report(text) for seed, text in self.plain.items()}

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Activations at every patch of the training films, by site: ``[n, P, d]``."""
        names = dict.fromkeys([*self.config.sites, self.sae.config.site])
        films = [name for name in names if not name.startswith("llm")]
        texts = [name for name in names if name.startswith("llm")]
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        n_patches = self.side**2
        for start in range(0, len(self.train), 16):
            part = self.train[start : start + 16]
            tokens = [self.tokens(study) for study in part]
            longest = max(map(len, tokens))
            ids = torch.full((len(part), longest), self.words.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for i, one in enumerate(tokens):
                ids[i, longest - len(one) :] = torch.from_numpy(one.ids)
                mask[i, longest - len(one) :] = 1
            pixels = normalised(np.stack([grey(s.frontal) for s in part]), self.words)
            for group in filter(None, (films, texts)):
                with capture(resolve_sites(self.model, group)) as run:
                    got = run(
                        self.model,
                        input_ids=ids,
                        attention_mask=mask,
                        pixel_values=pixels,
                        use_cache=False,
                    )
                for name, value in got.items():
                    if name in films:
                        found[name].append(value[:, -n_patches:].clone())
                        continue
                    own = [
                        value[i, longest - len(one) :][torch.from_numpy(one.of_role(Role.IMAGE))]
                        for i, one in enumerate(tokens)
                    ]
                    found[name].append(torch.stack(own))
        return {name: torch.cat(parts) for name, parts in found.items()}

    @cached_property
    def latents(self) -> Tensor:
        """``[n, P, F]``"""
        return self.sae.encode(self.rows[self.sae.config.site])

    @cached_property
    def rates(self) -> Tensor:
        """Share of training patches on which each latent fires: ``[F]``."""
        return (self.latents > 0).float().mean((0, 1))

    @cached_property
    def of_films(self) -> Tensor:
        """How well each latent's largest activation on a film tells each finding: ``[F, 14]``."""
        return aurocs(self.latents.amax(1), self.present)

    @cached_property
    def knows(self) -> Tensor:
        """Place of the finding that a latent tells best on films, -1 for none: ``[F]``."""
        return best_factors(self.latents.amax(1), self.present).factor

    def often(self, label: str) -> Tensor:
        """How often each patch shows a finding, of the training films that have it: ``[P]``."""
        i = LABELS.index(label)
        return self.shown[self.present[:, i], i].float().mean(0)

    def places(self, label: str) -> dict[str, Positions]:
        """Where a finding's patches are: its region, and one patch or few of a typical case."""
        often = self.often(label).reshape(self.side, -1)
        out = {}
        for name, least in (("region", 0.5), ("centre", 0.9)):
            rows, columns = (often >= least * often.max()).nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            x0, y0, x1, y1 = (float(edge) / self.side for edge in edges)
            inset = 0.01 / self.side  # a box that only touches a patch does not overlap it
            box = Box(x0 + inset, y0 + inset, x1 - inset, y1 - inset)
            out[name] = Positions(view=View.FRONTAL, box=box)
        return {**out, "film": Positions(view=View.FRONTAL)}

    def difference(self, x: Tensor, label: str) -> Tensor:
        """Mean on patches that show a finding, less the same patches without it: ``[d]``."""
        i = LABELS.index(label)
        has = self.present[:, i]
        shown = self.shown[has, i].float()
        base = x[~has].mean(0)
        return ((x[has] - base) * shown[..., None]).sum((0, 1)) / shown.sum()

    def film_difference(self, x: Tensor, label: str) -> Tensor:
        """Mean of each patch over films with a finding, less that over films without: ``[P, d]``"""
        has = self.present[:, LABELS.index(label)]
        return x[has].mean(0) - x[~has].mean(0)

    def studies(self, among: Sequence[PhantomStudy], label: str, on: bool) -> list[PhantomStudy]:
        """Studies in which the finding is to be turned on (neither there nor said), or off."""
        return [
            study
            for study in among
            if (label in study.factors.present) is not on
            and (label in self.said[study.seed].findings.seen) is not on
        ]

    def attempt(
        self,
        studies: Sequence[PhantomStudy],
        label: str,
        edits: Sequence[Change] | Sequence[Sequence[Change]],
        where: Positions,
        on: bool,
        sae: MatryoshkaSAE | None = None,
    ) -> Trial:
        """Write the reports of ``studies`` under ``edits``; a hit is a finding turned on (off).

        Parameters
        ----------
        edits
            For all studies, or a list of edits for each of them.
        """

        def steering(tokens: Sequence[Tokens]) -> AbstractContextManager[None]:
            known: dict[str, Any] = {"tokens": tokens, "tokenizer": self.words.tokenizer}
            return steered(self.model, sae or self.sae, edits, where, **known)

        return self.trial(studies, label, steering, on)

    def trial(
        self, studies: Sequence[PhantomStudy], label: str, steering: Steering, on: bool
    ) -> Trial:
        """Write the reports of at most ``BATCH`` studies under ``steering``."""
        assert len(studies) <= BATCH
        if not studies:
            return Trial([], [], [])
        with steering([self.tokens(study) for study in studies]):
            texts = write_reports(self.model, self.words, studies, batch=BATCH)
        return Trial.of([self.plain[study.seed] for study in studies], texts, label, on)
