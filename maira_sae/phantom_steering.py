"""By which latents, and where, each finding of the phantom can be turned on and off.

Everything is chosen on training studies, by trying candidates in order of size; the figures are of
other studies. A finding's latents are of two kinds, each in order of how far the finding raises
them, times the length of the decoder direction: on its own patches, against the same patches in
films without it; and over the whole film, since late in the vision tower the model may hold a
finding on patches that show nothing of it (:func:`maira_sae.phantom_sweep.written_on`).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hooks.files import ConfigError, nearest
from hooks.progress import track
from maira_sae.phantom_bench import Bench, SteeringBench
from maira_sae.phantom_sweep import Few, sweep, written_on
from maira_sae.phantom_trial import Trial
from phantom import LABELS, PhantomStudy
from sae import MatryoshkaSAE
from steering import Edit, Push, matched_latent
from steering.edits import Change

Kind = Literal["own", "film"]


class Choice(NamedTuple):
    """Latents, how they are edited, and where."""

    kind: Kind
    """Latents that the finding raises on its own patches, or over the film."""
    latents: tuple[int, ...]
    place: str
    strength: float | None
    """Of a clamp from below, in units of the latent's reference; None ablates."""


class Finding:
    """A finding's latents and their units, on the training studies."""

    def __init__(self, bench: Bench, label: str) -> None:
        self.bench, self.label, self.place = bench, label, LABELS.index(label)
        self.lengths = bench.sae.W_dec.norm(dim=1)
        self.own = bench.knows == self.place
        """Latents that know this finding best of all, by their largest activation on a film."""
        z, has = bench.latents, bench.present[:, self.place]
        shown = bench.shown[has, self.place]
        most = max(bench.config.sizes)
        self.order: dict[Kind, list[int]] = {}
        self.reference: dict[tuple[Kind, int], float] = {}
        rises: dict[Kind, Tensor] = {
            "own": bench.difference(z, label),
            "film": bench.film_difference(z, label).mean(0),
        }
        for kind, rise in rises.items():
            self.order[kind] = (rise * self.lengths).argsort(descending=True)[:most].tolist()
            for f in self.order[kind]:
                values = z[has][..., f]
                self.reference[kind, f] = _p99(values[shown] if kind == "own" else values)

    def edits(self, choice: Choice) -> list[Change]:
        return self.moved(choice, choice.latents)

    def moved(self, choice: Choice, latents: Sequence[int]) -> list[Change]:
        """``choice`` with other latents in place of its own, at the same decoded norm."""
        if choice.strength is None:
            return [Edit(g, mode="ablate") for g in latents]
        out: list[Change] = []
        for f, g in zip(choice.latents, latents, strict=True):
            unit = self.reference[choice.kind, f] * float(self.lengths[f] / self.lengths[g])
            out.append(Edit(g, choice.strength, unit, "minimum"))
        return out

    def candidates(self, on: bool) -> Iterator[Choice]:
        """Smaller edits first, so that they win ties."""
        c = self.bench.config
        kinds: tuple[tuple[Kind, tuple[str, ...], tuple[float, ...]], ...] = (
            ("own", ("centre", "region"), c.strengths),
            ("film", ("film",), c.film_strengths),
        )
        for size in c.sizes:
            for kind, places, strengths in kinds:
                latents = tuple(self.order[kind][:size])
                if not on:
                    yield Choice(kind, latents, "film", None)
                    continue
                for strength in strengths:
                    yield from (Choice(kind, latents, place, strength) for place in places)

    def choose(self, few: Sequence[PhantomStudy], on: bool) -> tuple[Choice, Trial]:
        """The best candidate, and what it did to the training studies."""
        best: tuple[Choice, Trial] | None = None
        for choice in self.candidates(on):
            got = self.attempt(few, choice, on)
            if best is None or got.score > best[1].score + 0.02:
                best = choice, got
            if got.settled:
                break
        assert best is not None
        return best

    def attempt(self, studies: Sequence[PhantomStudy], choice: Choice, on: bool) -> Trial:
        where = self.bench.places(self.label)[choice.place]
        return self.bench.attempt(studies, self.label, self.edits(choice), where, on)

    def drawn(self, choice: Choice, seed: int, without: Tensor) -> tuple[int, ...]:
        """For each latent of ``choice`` a random other one of like rate."""
        rates = self.bench.rates
        out: list[int] = []
        for f in choice.latents:
            rest = rates.clone()
            rest[without] = 0
            rest[[*choice.latents, *out]] = 0
            rest[f] = rates[f]
            out.append(matched_latent(f, rest, seed=seed))
        return tuple(out)


class Controls(NamedTuple):
    """Edits of the same norm that mean nothing."""

    random: Trial
    """Random latents, a draw for each study, but for those that know the finding best."""
    unfiltered: Trial
    """The same with those in."""
    directions: Trial
    """Random directions, as long as what the clamp adds where nothing fires."""
    turned: list[dict[str, Any]]
    """Random latents that turned the finding, with what they know."""


def controls(
    finding: Finding, choices: Mapping[bool, Choice], many: Mapping[bool, Sequence[PhantomStudy]]
) -> Controls:
    """Random latents and directions in place of the chosen ones, on test studies."""
    bench, sae = finding.bench, finding.bench.sae
    random, unfiltered = Trial([], [], []), Trial([], [], [])
    counts: dict[tuple[bool, int], list[int]] = {}
    nobody = torch.zeros_like(finding.own)
    for on, choice in choices.items():
        where = bench.places(finding.label)[choice.place]
        draws = [
            tuple(finding.drawn(choice, seed, without) for without in (finding.own, nobody))
            for seed in range(len(many[on]))
        ]

        everyone = range(len(many[on]))
        other = [i for i in everyone if draws[i][0] != draws[i][1]]
        kept, again = (
            bench.attempt(
                [many[on][i] for i in places],
                finding.label,
                [finding.moved(choice, draws[i][which]) for i in places],
                where,
                on,
            )
            for which, places in enumerate((everyone, other))
        )
        whole = kept.replaced(other, again)
        for (_, latents), hit in zip(draws, whole.hits, strict=True):
            for g in latents:
                count = counts.setdefault((on, g), [0, 0])
                count[0] += hit
                count[1] += 1
        random, unfiltered = random + kept, unfiltered + whole
    on = choices[True]
    added = torch.zeros_like(sae.W_dec[0])
    for edit in finding.edits(on):
        assert isinstance(edit, Edit)
        added = added + edit.target * sae.W_dec[edit.latent]
    pushes = [
        [Push(_random(len(added), seed), 1.0, float(added.norm()), "random direction")]
        for seed in range(len(many[True]))
    ]
    where = bench.places(finding.label)[on.place]
    directions = bench.attempt(many[True], finding.label, pushes, where, True)
    turned = [
        {
            "latent": g,
            "turned_on": turned_on,
            "flips": hits,
            "draws": drawn,
            "knows": LABELS[int(bench.of_films[g].argmax())],
            "auroc": float(bench.of_films[g].max()),
            "auroc_here": float(bench.of_films[g, finding.place]),
        }
        for (turned_on, g), (hits, drawn) in counts.items()
        if hits
    ]
    return Controls(random, unfiltered, directions, turned)


@torch.no_grad()
def measure_finding(bench: Bench, label: str) -> dict[str, Any]:
    """Choose on training studies, measure on the others."""
    c = bench.config
    few: Few = {on: bench.studies(bench.train, label, on)[: c.tried] for on in (True, False)}
    many = {on: bench.studies(bench.test, label, on)[: c.measured] for on in (True, False)}
    finding = Finding(bench, label)
    on, on_train = finding.choose(few[True], True)
    off, off_train = finding.choose(few[False], False)
    asserted = finding.attempt(many[True], on, True)
    removed = finding.attempt(many[False], off, False)
    against = controls(finding, {True: on, False: off}, many)
    swept = sweep(bench, label, few)
    with_md = {on: way.attempt(bench, many[on], label, on) for on, way in swept.best.items()}
    sides = asserted + removed
    trials = {
        "asserted": asserted,
        "removed": removed,
        "random_flips": against.random,
        "random_flips_unfiltered": against.unfiltered,
        "random_direction_flips": against.directions,
        "mean_difference_asserted": with_md[True],
        "mean_difference_removed": with_md[False],
    }
    return {
        "n": len(many[True]),
        "n_present": len(many[False]),
        **{name: trial.rate for name, trial in trials.items()},
        "side_effects": sides.side,
        "side_effects_clamped": asserted.side,
        "side_effects_ablated": removed.side,
        "mean_difference_side_effects": (with_md[True] + with_md[False]).side,
        "clamped": on._asdict(),
        "ablated": off._asdict(),
        "on_training_studies": {"asserted": on_train.rate, "removed": off_train.rate},
        "random_latents_that_turned_it": against.turned,
        "mean_difference": {
            "asserted" if on else "removed": way._asdict() for on, way in swept.best.items()
        },
        "intervals": {
            **{name: trial.rate_interval() for name, trial in trials.items()},
            "side_effects": sides.side_interval(),
        },
        "sweep": swept.table,
        "written_on": written_on(bench, label, few),
    }


_bench: Bench | None = None


def _begin(config: SteeringBench, sae: Path) -> None:
    global _bench
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _bench = Bench(config, MatryoshkaSAE.from_pretrained(sae))


def _measure(label: str) -> dict[str, Any]:
    assert _bench is not None
    return measure_finding(_bench, label)


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Findings by name, blanks left out.

    Raises
    ------
    ConfigError
        If one is unknown.
    """
    found = tuple(name.strip() for name in names if name.strip())
    for name in found:
        if name not in LABELS:
            raise ConfigError(
                f"unknown finding {name!r}{nearest(name, LABELS)}; choose from {list(LABELS)}"
            )
    return found


def run(sae: Path, config: SteeringBench, findings: Sequence[str] = ()) -> dict[str, Any]:
    """Measure findings with a dictionary of patches; one record a finding, see `RESULTS.md`.

    Parameters
    ----------
    findings
        Only these; empty for all.

    Raises
    ------
    ConfigError
        If the dictionary is not of a vision site.
    """
    labels = findings or LABELS
    site = MatryoshkaSAE.from_pretrained(sae).config.site
    if not site.startswith("vision."):
        raise ConfigError(f"{sae} is a dictionary of {site!r}; give one of a vision site")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.workers, context, initializer=_begin, initargs=(config, sae)
    ) as pool:
        found = list(track(pool.map(_measure, labels), "findings", total=len(labels)))
    return {"site": site, "findings": dict(zip(labels, found, strict=True))}


def _p99(values: Tensor) -> float:
    fired = values[values > 0]
    return float(torch.quantile(fired, 0.99)) if len(fired) else 1e-6


def _random(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


AIMS = {
    "asserted": (0.8, 1.0),
    "removed": (0.6, 1.0),
    "side_effects": (0.0, 0.1),
    "random_flips": (0.0, 0.05),
}
"""Least and most of each figure."""


def meets_aims(found: Mapping[str, Any]) -> bool:
    """Whether a finding's record is within :data:`AIMS`."""
    return all(low <= found[name] <= high for name, (low, high) in AIMS.items())


def table(result: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    keys = (
        "asserted",
        "removed",
        "side_effects",
        "random_flips",
        "mean_difference_asserted",
        "mean_difference_removed",
    )
    lines = [f"{'finding':<20} on    off   side  random  mean difference on, off"]
    for name, found in result["findings"].items():
        lines.append(f"{name:<20} " + "  ".join(f"{found[key]:.2f}" for key in keys))
    met = sum(map(meets_aims, result["findings"].values()))
    lines.append(f"all aims are met for {met} of {len(result['findings'])} findings")
    return "\n".join(lines)
