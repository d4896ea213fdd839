"""Where, and by which latents, each finding of the phantom can be turned on and off.

Everything is chosen on training studies: the site and strength of mean-difference steering by a
sweep; the latents, their number, the place and the strength by trying them in order of size. The
figures are of other studies. A finding's latents are those that its patches raise most: mean
activation on patches that show it, less that of the same patches in films without it, times the
length of the decoder direction.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooks.files import ConfigError
from hooks.grounding import Box
from hooks.roles import Role, Tokens, View
from hooks.sites import capture, resolve_sites
from phantom import LABELS, PhantomStudy, Reading, read_report, sample_study
from phantom.corpus import grey, normalised
from phantom.language import sentences
from phantom.model import load
from phantom.score import write_reports
from sae import MatryoshkaSAE, SAEConfig
from sae.intervals import mean_interval, patient_draws, ratio
from steering import Edit, Positions, Push, matched_latent, steered
from steering.edits import Change
from steering.sentences import split_sentences

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
    """In units of the 99th percentile where the finding is; of mean differences, of their length.
    """
    sites: tuple[str, ...] = SWEEP
    workers: int = 2
    """Processes; each takes a finding at a time."""

    def quick(self) -> SteeringBench:
        """Small enough to check that it runs."""
        return replace(
            self, n_train=60, n_test=30, tried=2, measured=3, sizes=(2,), sites=SWEEP[1:2]
        )


class Trial(NamedTuple):
    """What an edit did to some reports."""

    hits: list[bool]
    """Whether the finding turned, of each study."""
    changed: list[int]
    """Sentences about other findings that changed, of each study."""
    total: list[int]
    """Sentences about other findings."""

    @property
    def rate(self) -> float:
        return float(np.mean(self.hits)) if self.hits else 0.0

    @property
    def side(self) -> float:
        """Share of other findings' sentences that changed."""
        return sum(self.changed) / max(1, sum(self.total))

    def __add__(self, other: object) -> Trial:
        assert isinstance(other, Trial)
        return Trial(self.hits + other.hits, self.changed + other.changed, self.total + other.total)


def changed_sentences(before: str, after: str, label: str) -> tuple[int, int]:
    """How many sentences about other findings changed, and how many there are.

    A sentence changes when the other report gives any finding it names, but for ``label``, another
    state (grade, certainty and comparison included). One that is new counts in both numbers.
    """
    was, now = read_report(before), read_report(after)
    changed = total = 0
    named: set[str] = set()
    for text in split_sentences(before):
        others = [(name, state) for name, state in sentences().get(text, ()) if name != label]
        named |= {name for name, _ in others}
        if others or text not in sentences():
            total += 1
            lost = any(now.findings[name] != state for name, state in others)
            changed += lost if others else text not in after
    for text in split_sentences(after):
        meaning = sentences().get(text)
        new = [n for n, _ in meaning or () if n != label and n not in named]
        if any(was.findings[name] != now.findings[name] for name in new) or (
            meaning is None and text not in before
        ):
            total += 1
            changed += 1
    return changed, total


class Choice(NamedTuple):
    """What was chosen for one direction of one finding."""

    latents: tuple[int, ...]
    place: str
    strength: float | None


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

    def places(self, label: str) -> dict[str, Positions]:
        """Where a finding's patches are: its region, and one patch or few of a typical case."""
        i = LABELS.index(label)
        often = self.shown[self.present[:, i], i].float().mean(0).reshape(self.side, -1)
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
        edits: Sequence[Change],
        where: Positions,
        on: bool,
        sae: MatryoshkaSAE | None = None,
    ) -> Trial:
        """Write the reports of ``studies`` under ``edits``; a hit is a finding turned on (off)."""
        out = Trial([], [], [])
        for start in range(0, len(studies), 64):
            part = studies[start : start + 64]
            tokens = [self.tokens(study) for study in part]
            at: dict[str, Any] = {"tokens": tokens, "tokenizer": self.words.tokenizer}
            with steered(self.model, sae or self.sae, edits, where, **at):
                texts = write_reports(self.model, self.words, part)
            for study, text in zip(part, texts, strict=True):
                changed, total = changed_sentences(self.plain[study.seed], text, label)
                out.hits.append((label in read_report(text).findings.seen) is on)
                out.changed.append(changed)
                out.total.append(total)
        return out


_bench: Bench | None = None


def _begin(config: SteeringBench, sae: Path) -> None:
    global _bench
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _bench = Bench(config, MatryoshkaSAE.from_pretrained(sae))


def _measure(label: str) -> dict[str, Any]:
    assert _bench is not None
    return measure_finding(_bench, label)


def run(sae: Path, config: SteeringBench) -> dict[str, Any]:
    """Measure every finding with a dictionary of patches; one record a finding, see `RESULTS.md`.

    Raises
    ------
    ConfigError
        If the dictionary is not of a vision site.
    """
    site = MatryoshkaSAE.from_pretrained(sae).config.site
    if not site.startswith("vision."):
        raise ConfigError(f"{sae} is a dictionary of {site!r}; give one of a vision site")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.workers, context, initializer=_begin, initargs=(config, sae)
    ) as pool:
        found = list(pool.map(_measure, LABELS))
    return {"site": site, "findings": dict(zip(LABELS, found, strict=True))}


@torch.no_grad()
def measure_finding(bench: Bench, label: str) -> dict[str, Any]:
    """Choose on training studies, measure on the others."""
    c, sae = bench.config, bench.sae
    few = {on: bench.studies(bench.train, label, on)[: c.tried] for on in (True, False)}
    many = {on: bench.studies(bench.test, label, on)[: c.measured] for on in (True, False)}
    places = bench.places(label)
    rise = bench.difference(bench.latents, label) * sae.W_dec.norm(dim=1)
    order = rise.argsort(descending=True)[: max(c.sizes)].tolist()
    i = LABELS.index(label)
    on_it = bench.latents[bench.present[:, i]][bench.shown[bench.present[:, i], i]]
    reference = {f: _p99(on_it[:, f]) for f in order}

    def clamps(latents: Sequence[int], strength: float) -> list[Change]:
        return [Edit(f, strength, reference[f], "minimum") for f in latents]

    def choose(on: bool) -> Choice:
        best, best_score = Choice((), "", None), -np.inf
        for size in c.sizes:
            for strength in c.strengths if on else (None,):
                for place in ("centre", "region") if on else ("film",):
                    latents = tuple(order[:size])
                    edits: list[Change]
                    if strength is None:
                        edits = [Edit(f, mode="ablate") for f in latents]
                    else:
                        edits = clamps(latents, strength)
                    got = bench.attempt(few[on], label, edits, places[place], on)
                    # A finding turned is worth more than a sentence spared, and smaller edits
                    # come first, so they win ties.
                    score = got.rate - 2 * max(0.0, got.side - 0.05)
                    if score > best_score + 0.02:
                        best, best_score = Choice(latents, place, strength), score
                    if got.rate > 0.98 and got.side < 0.03:
                        return best
        return best

    on, off = choose(True), choose(False)
    assert on.strength is not None
    asserted = bench.attempt(
        many[True], label, clamps(on.latents, on.strength), places[on.place], True
    )
    ablations: list[Change] = [Edit(f, mode="ablate") for f in off.latents]
    removed = bench.attempt(many[False], label, ablations, places[off.place], False)
    rates = (bench.latents > 0).float().mean((0, 1))
    random_on, random_off = Trial([], [], []), Trial([], [], [])
    for draw in range(3):
        for ours, chosen, total in ((True, on, random_on), (False, off, random_off)):
            others: list[int] = []
            rest = rates.clone()
            for f in chosen.latents:
                rest[[*[g for g in chosen.latents if g != f], *others]] = 0
                others.append(matched_latent(f, rest, seed=draw))
                rest = rates.clone()
            edits: list[Change] = [Edit(g, mode="ablate") for g in others]
            if chosen.strength is not None:
                length = sae.W_dec.norm(dim=1)
                edits = [
                    Edit(g, chosen.strength, reference[f] * float(length[f] / length[g]), "minimum")
                    for f, g in zip(chosen.latents, others, strict=True)
                ]
            got = bench.attempt(many[ours][draw::3], label, edits, places[chosen.place], ours)
            for mine, new in zip(total, got, strict=True):
                mine += new
    sweep, best_site = _sweep(bench, label, few, places)
    site, place, strength = best_site
    with_md = {
        ours: bench.attempt(
            many[ours],
            label,
            [_push(bench, site, label, strength if ours else -2.0)],
            places[place],
            ours,
            _stand_in(bench, site),
        )
        for ours in (True, False)
    }
    flips = random_on + random_off
    sides = asserted + removed
    return {
        "n": len(many[True]),
        "n_present": len(many[False]),
        "asserted": asserted.rate,
        "removed": removed.rate,
        "side_effects": sides.side,
        "random_flips": flips.rate,
        "mean_difference_asserted": with_md[True].rate,
        "mean_difference_removed": with_md[False].rate,
        "mean_difference_side_effects": (with_md[True] + with_md[False]).side,
        "clamped": on._asdict(),
        "ablated": off._asdict(),
        "side_effects_clamped": asserted.side,
        "side_effects_ablated": removed.side,
        "mean_difference": {"site": site, "place": place, "strength": strength},
        "intervals": {
            "asserted": _interval(asserted.hits),
            "removed": _interval(removed.hits),
            "side_effects": _ratio(sides),
            "random_flips": _interval(flips.hits),
            "mean_difference_asserted": _interval(with_md[True].hits),
            "mean_difference_removed": _interval(with_md[False].hits),
        },
        "sweep": sweep,
    }


def _sweep(
    bench: Bench,
    label: str,
    few: Mapping[bool, Sequence[PhantomStudy]],
    places: Mapping[str, Positions],
) -> tuple[dict[str, Any], tuple[str, str, float]]:
    """Mean-difference steering at every site on training studies, and the best of them."""
    table: dict[str, Any] = {}
    best, best_score = (bench.sae.config.site, "region", 1.0), -np.inf
    for site in bench.config.sites:
        stand_in = _stand_in(bench, site)
        on_rates, row = [], {}
        for place in ("centre", "region"):
            for strength in bench.config.strengths:
                push = [_push(bench, site, label, strength)]
                got = bench.attempt(few[True], label, push, places[place], True, stand_in)
                on_rates.append(got.rate)
                score = got.rate - 2 * max(0.0, got.side - 0.05)
                if score > best_score + 0.02:
                    best, best_score = (site, place, strength), score
                if got.rate > 0.98:
                    break
            if max(on_rates) > 0.98:
                break
        push = [_push(bench, site, label, -2.0)]
        row["asserted"] = max(on_rates)
        row["removed"] = bench.attempt(
            few[False], label, push, places["region"], False, stand_in
        ).rate
        table[site] = row
    return table, best


def _push(bench: Bench, site: str, label: str, strength: float) -> Push:
    direction = bench.difference(bench.rows[site], label)
    return Push(direction, strength, float(direction.norm()), "mean difference")


def _stand_in(bench: Bench, site: str) -> MatryoshkaSAE:
    """A dictionary that only names the site: pushes need none."""
    width = bench.rows[site].shape[-1]
    return MatryoshkaSAE(SAEConfig(width, 8, 1, (8,), site=site), seed=0).eval()


def _p99(values: Tensor) -> float:
    fired = values[values > 0]
    return float(torch.quantile(fired, 0.99)) if len(fired) else 1e-6


def _interval(hits: Sequence[bool]) -> dict[str, Any]:
    return mean_interval(torch.tensor([float(hit) for hit in hits])).record()


def _ratio(trial: Trial) -> dict[str, Any]:
    top, bottom = torch.tensor(trial.changed), torch.tensor(trial.total)
    return ratio(top, bottom, int(bottom.sum()), patient_draws(len(top))).record()


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{'finding':<20} on    off   side  random  mean difference on, off"]
    for name, found in result["findings"].items():
        numbers = [
            found[key]
            for key in (
                "asserted",
                "removed",
                "side_effects",
                "random_flips",
                "mean_difference_asserted",
                "mean_difference_removed",
            )
        ]
        lines.append(f"{name:<20} " + "  ".join(f"{value:.2f}" for value in numbers))
    return "\n".join(lines)
