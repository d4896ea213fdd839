"""The samplers, how findings change, and what a factor may not be."""

import numpy as np
import pytest

from phantom import (
    BANDS,
    CHANGE_MARGIN,
    CLINICAL,
    DEVICES,
    LABELS,
    SICK_RATE,
    SUBTLE_RATE,
    Factors,
    Finding,
    PhantomError,
    change,
    clinical_factors,
    independent_factors,
    parts,
    prior_factors,
)


def only(label: str, grade: str | None = None, *, subtle: bool = False, at: float = 0.5) -> Factors:
    """One finding, in the middle of its band unless asked."""
    bands = BANDS[parts(label).kind]
    low, high = bands[grade] if grade is not None else next(iter(bands.values()))
    return Factors((Finding(label, low + at * (high - low), subtle=subtle),))


@pytest.fixture(scope="module")
def clinical() -> list[Factors]:
    return [clinical_factors(seed) for seed in range(6000)]


@pytest.fixture(scope="module")
def independent() -> list[Factors]:
    return [independent_factors(seed, 0.3) for seed in range(6000)]


def test_independent_factors_do_not_correlate(independent):
    vectors = np.stack([factors.vector() for factors in independent])
    assert vectors.shape == (6000, 14)
    assert vectors.mean(0) == pytest.approx(np.full(14, 0.3), abs=0.03)
    correlation = np.corrcoef(vectors.T) - np.eye(14)
    assert np.abs(correlation).max() < 0.055  # four standard errors of 1 / sqrt(6000)


def test_clinical_factors_occur_at_the_stated_rates_given_their_causes(clinical):
    there = {label: np.array([label in f.present for f in clinical]) for label in LABELS}
    there["sick"] = np.array([factors.sick for factors in clinical])
    assert there["sick"].mean() == pytest.approx(SICK_RATE, abs=0.03)
    assert set(CLINICAL) == set(LABELS)
    for label, (rate, causes) in CLINICAL.items():
        for pattern in np.ndindex(*(2 for _ in causes)):
            chosen = np.ones(len(clinical), bool)
            for cause, on in zip(causes, pattern, strict=True):
                chosen &= there[cause] == on
            stated = rate + sum(a for a, on in zip(causes.values(), pattern, strict=True) if on)
            assert there[label][chosen].mean() == pytest.approx(stated, abs=0.07), (label, pattern)


def test_clinical_factors_correlate(clinical):
    vectors = np.stack([factors.vector() for factors in clinical])
    correlation = np.corrcoef(vectors.T)

    def between(one, two):
        return correlation[LABELS.index(one), LABELS.index(two)]

    assert between("endotracheal_tube", "nasogastric_tube") > 0.5
    assert between("cardiomegaly", "pacemaker") > 0.3
    assert between("effusion_left", "effusion_right") > 0.1
    assert between("cardiomegaly", "effusion_left") > 0.15
    assert abs(between("nodule_left_upper", "effusion_left")) < 0.055


def test_grades_and_subtlety_are_drawn_at_their_rates(independent):
    findings = [finding for factors in independent for finding in factors.findings]
    effusions = [f.grade for f in findings if parts(f.label).kind == "effusion"]
    assert np.mean([grade == "large" for grade in effusions]) == pytest.approx(0.5, abs=0.04)
    tubes = [f.grade for f in findings if f.label == "nasogastric_tube"]
    assert np.mean([grade == "high" for grade in tubes]) == pytest.approx(0.35, abs=0.05)
    nodules = [f.subtle for f in findings if parts(f.label).kind == "nodule"]
    assert np.mean(nodules) == pytest.approx(SUBTLE_RATE, abs=0.03)
    assert not any(f.subtle for f in findings if f.grade == "large" or f.label in DEVICES)


def test_rates_can_be_given_for_each_label():
    for seed in range(30):
        assert independent_factors(seed, {"pacemaker": 1.0}).present == ("pacemaker",)
        assert independent_factors(seed, 0.0).present == ()
        assert independent_factors(seed, 1.0).present == LABELS


def test_priors_cover_every_change_with_clear_margins():
    found = {label: set() for label in LABELS}
    for seed in range(1500):
        now = independent_factors(seed, 0.4)
        before = prior_factors(now, seed)
        for label in LABELS:
            how = change(label, now, before)
            found[label].add(how)
            new, old = now.get(label), before.get(label)
            if how in ("larger", "smaller"):
                assert new is not None and old is not None
                assert abs(new.extent - old.extent) >= CHANGE_MARGIN
                assert (new.extent > old.extent) == (how == "larger")
            if how == "unchanged":
                assert new == old
    for label, changes in found.items():
        sizes = {"larger", "smaller"} if parts(label).kind == "effusion" else set()
        assert changes == {"", "new", "unchanged", "resolved"} | sizes, label


def test_change_refuses_what_no_word_describes():
    now, before = only("effusion_left", "large", at=0.0), only("effusion_left", "large", at=0.3)
    with pytest.raises(PhantomError, match="neither a clear change nor none"):
        change("effusion_left", now, before)
    small, faint = only("effusion_left"), only("effusion_left", subtle=True)
    with pytest.raises(PhantomError, match="subtle"):
        change("effusion_left", small, faint)
    with pytest.raises(PhantomError, match="nasogastric_tube"):
        change(
            "nasogastric_tube",
            only("nasogastric_tube", "high"),
            only("nasogastric_tube", "stomach"),
        )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Finding("effusion", 0.06), "no label is called 'effusion'; use one of"),
        (lambda: Finding("effusion_left", 0.15), "0.15 is in no band; choose in small 0.05 to"),
        (lambda: Finding("nodule_left_upper", 0.04, across=1.5), "across is 1.5; give a number"),
        (
            lambda: Finding("effusion_left", 0.3, subtle=True),
            "large effusion_left cannot be subtle",
        ),
        (lambda: Finding("pacemaker", 0.65, subtle=True), "leave subtle=False"),
        (lambda: Factors(only("pacemaker").findings * 2), "unique and in the order of LABELS"),
        (lambda: Factors().get("heart"), "no label is called 'heart'"),
        (lambda: independent_factors(0, 1.5), "give a number from 0 to 1"),
        (lambda: independent_factors(0, {"lung": 0.5}), "no label is called 'lung'"),
        (lambda: clinical_factors(-1), "the seed is -1; give a whole number"),
        (lambda: clinical_factors(0.5), "the seed is 0.5; give a whole number"),  # type: ignore[arg-type]
    ],
)
def test_errors_say_what_was_asked_and_what_to_do(make, text):
    with pytest.raises(PhantomError, match=text) as caught:
        make()
    assert isinstance(caught.value, ValueError)
