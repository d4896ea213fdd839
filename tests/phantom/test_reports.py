"""Reports: they say the factors and nothing else, and are read back exactly."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phantom import (
    ABSENT,
    LABELS,
    Box,
    Factors,
    Finding,
    Findings,
    PhantomError,
    State,
    bins_of,
    box_from,
    clinical_factors,
    independent_factors,
    prior_factors,
    read_report,
    sample_study,
    states_of,
    vocabulary,
    write_report,
)
from phantom.language import COMPARISONS, DENIALS, INDICATIONS, TECHNIQUES, phrasings, sentences

SEEDS = st.integers(0, 2**40)
DOUBT = {"possible", "suspected", "may", "cannot"}


@st.composite
def findings(draw: st.DrawFn, compared: bool) -> Findings:
    """Any findings at all, also those that no sampler gives."""
    return Findings.where(
        {
            label: draw(st.sampled_from((ABSENT, ABSENT, *states_of(label, compared=compared))))
            for label in LABELS
        }
    )


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    edges = st.floats(0, 1)
    x0, x1 = sorted((draw(edges), draw(edges)))
    y0, y1 = sorted((draw(edges), draw(edges)))
    return Box(x0, y0, x1, y1)


# --- write, then read -------------------------------------------------------------------------


@given(st.data(), st.booleans(), st.booleans(), SEEDS)
@settings(max_examples=150, deadline=None)
def test_reading_what_was_written_is_the_identity(data, prior, lateral, seed):
    said = data.draw(findings(compared=prior))
    report = write_report(said, seed, prior=prior, lateral=lateral)
    reading = read_report(report.text)
    assert reading.findings == said
    assert reading.impression == said.acute()
    assert reading.prior is prior
    assert reading.lateral is lateral
    assert reading.indication == report.indication
    assert reading.unknown == reading.conflicts == ()
    assert reading.boxes == {}
    assert read_report(report.findings).findings == said


@given(st.data(), st.booleans(), st.integers(1, 100), SEEDS)
@settings(max_examples=100, deadline=None)
def test_reading_the_grounded_form_is_the_identity(data, prior, bins, seed):
    said = data.draw(findings(compared=prior))
    places = {label: data.draw(boxes()) for label in said.seen}
    report = write_report(said, seed, prior=prior, boxes=places, bins=bins)
    for text in (report.grounded, report.grounded_text):
        reading = read_report(text, bins)
        assert reading.findings == said
        assert reading.unknown == reading.conflicts == ()
        assert set(reading.boxes) == set(said.seen)
        for label, (box,) in reading.boxes.items():
            assert box == pytest.approx(places[label], abs=0.5 / bins + 1e-12)
    assert (
        " ".join(re.sub(r"</?obj>|<box>.*?</box>", "", report.grounded).split()) == report.findings
    )


@given(SEEDS, st.sampled_from(["clinical", "independent"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_studies_are_read_back(seed, sampler, prior):
    study = sample_study(seed, sampler=sampler, prior=prior)
    plain, grounded = read_report(study.report.text), read_report(study.report.grounded_text)
    assert plain.findings == grounded.findings == study.findings
    assert plain.findings == Findings.of(study.factors, study.prior_factors)
    assert plain.prior is prior is (study.prior is not None)
    assert plain.lateral is (study.lateral is not None)
    assert set(study.findings.seen) == set(study.factors.present) == set(grounded.boxes)
    for label, (box,) in grounded.boxes.items():
        assert box == pytest.approx(study.frontal.boxes[label], abs=0.005 + 1e-12)


# --- what it says follows from the factors -----------------------------------------------------


@given(SEEDS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_the_same_findings_get_the_same_words_whatever_the_patient(one, two):
    """Positions and extents within a grade do not show in a report, nor does the latent state."""
    factors = clinical_factors(one)
    moved = Factors(
        tuple(
            Finding(f.label, f.extent, 1 - f.across, 1 - f.along, 1 - f.depth, f.subtle)
            for f in factors.findings
        ),
        not factors.sick,
    )
    first, second = (write_report(Findings.of(f), two) for f in (factors, moved))
    assert first == second


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_presence_subtlety_and_grade_are_those_of_the_factors(seed):
    factors = independent_factors(seed, 0.4)
    said = Findings.of(factors)
    for label in LABELS:
        finding = factors.get(label)
        if finding is None:
            assert said[label] == ABSENT
        else:
            assert said[label].status == ("possible" if finding.subtle else "present")
            assert said[label].grade == finding.grade
            assert said[label].change == ""


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_comparisons_need_the_prior(seed):
    now = independent_factors(seed, 0.5)
    before = prior_factors(now, seed)
    assume(now.present)
    said = Findings.of(now, before)
    assert said.compared and not Findings.of(now).compared
    assert all(said[label].change for label in now.present)
    assert {label for label in said.stated if said[label].change == "resolved"} == set(
        before.present
    ) - set(now.present)
    with pytest.raises(PhantomError, match="exactly where there is a prior"):
        write_report(said, 0)
    with pytest.raises(PhantomError, match="exactly where there is a prior"):
        write_report(Findings.of(now), 0, prior=True)


def test_a_resolved_finding_needs_the_prior():
    gone = Findings.where({"pacemaker": State("absent", "", "resolved")})
    with pytest.raises(PhantomError, match="pass prior=True"):
        write_report(gone, 0)


@given(st.data(), st.booleans(), SEEDS)
@settings(max_examples=60, deadline=None)
def test_doubt_is_voiced_exactly_where_something_is_subtle(data, prior, seed):
    said = data.draw(findings(compared=prior))
    words = set(write_report(said, seed, prior=prior).findings.split())
    assert bool(words & DOUBT) == any(state.status == "possible" for state in said.states)


def test_every_wording_says_doubt_and_comparison_as_its_state_does():
    compares = {"new", "unchanged", "stable", "increased", "decreased", "larger", "smaller"}
    compares |= {"resolved", "longer", "removed"}
    for label in LABELS:
        for compared in (False, True):
            for state in states_of(label, compared=compared):
                for sentence in phrasings(label, state):
                    words = set(sentence.split())
                    assert bool(words & DOUBT) == (state.status == "possible"), sentence
                    assert bool(words & compares) == bool(state.change), sentence


def test_the_reason_tells_nothing_of_what_is_seen():
    """Findings are as common with each reason as over all, within four standard errors."""
    seen, reasons = [], []
    for seed in range(3000):
        said = Findings.of(clinical_factors(seed))
        seen.append([label in said.seen for label in LABELS])
        reasons.append(INDICATIONS.index(write_report(said, seed).indication))
    rate, reasons = np.mean(seen, 0), np.array(reasons)
    for reason in range(len(INDICATIONS)):
        own = np.array(seen)[reasons == reason]
        assert (np.abs(own.mean(0) - rate) < 4 * np.sqrt(rate * (1 - rate) / len(own))).all()


def test_every_choice_of_words_is_made_sometimes():
    used, reasons = set(), set()
    for seed in range(1200):
        study_findings = Findings.of(clinical_factors(seed))
        report = write_report(study_findings, seed, lateral=seed % 2 == 0)
        used |= {f"{text} ." for text in report.findings.split(" . ")}
        used |= {report.technique, report.comparison}
        reasons.add(report.indication)
    assert reasons == set(INDICATIONS)
    assert used.issuperset(text for texts in TECHNIQUES.values() for text in texts)
    assert used.issuperset(COMPARISONS[False])
    alone = [texts for kinds, texts in DENIALS.items() if len(kinds) < 4]
    assert {text.removesuffix(" .") for texts in alone for text in texts} <= {
        text.removesuffix(" .").removesuffix(" .") for text in used
    }


def test_same_seed_same_words_and_other_seeds_other_words():
    said = Findings.of(clinical_factors(1))
    assert write_report(said, 5) == write_report(said, 5)
    assert len({write_report(said, seed).findings for seed in range(30)}) > 10


def test_known_report():
    factors = Factors(
        (Finding("effusion_left", 0.06), Finding("pneumothorax_right", 0.1, subtle=True))
    )
    said = Findings.of(factors)
    assert said.stated == {
        "effusion_left": State("present", "small"),
        "pneumothorax_right": State("possible"),
    }
    text = (
        "<obj> no tubes or devices . </obj> <obj> heart size is normal . </obj> "
        "<obj> the lungs are clear . </obj> <obj> small left pleural effusion . <box> <x17> <y19> "
        "<x24> <y22> </box> </obj> <obj> right pneumothorax cannot be excluded . <box> <x3> <y2> "
        "<x11> <y14> </box> </obj>"
    )
    reading = read_report(text, bins=28)
    assert reading.findings == said
    assert reading.unknown == ()
    assert reading.boxes["effusion_left"] == (Box(17.5 / 28, 19.5 / 28, 24.5 / 28, 22.5 / 28),)


# --- the language -----------------------------------------------------------------------------


def test_every_sentence_has_one_meaning_and_every_state_several_wordings():
    assert len(sentences()) > 500  # building the table refuses a sentence with two meanings
    for label in LABELS:
        for compared in (False, True):
            for state in states_of(label, compared=compared):
                wordings = phrasings(label, state)
                assert len(set(wordings)) == len(wordings) >= 2, (label, state)
                assert set(phrasings(label, state, brief=True)) <= set(wordings)
                for sentence in wordings:
                    assert sentences()[sentence] == ((label, state),)


def test_vocabulary_is_closed_modest_and_lower_case():
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens))
    assert 300 <= len(tokens) <= 350
    assert all(token == token.lower() and token.split() == [token] for token in tokens)
    for seed in range(300):
        report = sample_study(seed, size=84).report
        assert set(report.grounded_text.split()) <= set(tokens)
        assert set(report.text.split()) <= set(tokens)
        for section in (report.findings, report.impression, report.indication):
            assert section.endswith(" .")
    assert set(tokens) - set(vocabulary(28)) == {f"<{a}{n}>" for a in "xy" for n in range(28, 100)}
    assert vocabulary(extra=["you are an expert"])[-1] == "you"
    assert vocabulary()[:9] == vocabulary(50)[:9]


# --- boxes ------------------------------------------------------------------------------------


@given(boxes(), st.integers(1, 200))
def test_boxes_round_trip_within_half_a_bin(box, bins):
    places = bins_of(box, bins)
    assert all(0 <= place < bins for place in places)
    assert box_from(places, bins) == pytest.approx(box, abs=0.5 / bins + 1e-12)
    assert bins_of(box_from(places, bins), bins) == places


def test_known_bins():
    assert bins_of(Box(0, 0.125, 0.5, 1), 100) == (0, 12, 50, 99)
    assert box_from((0, 12, 50, 99), 100) == Box(0.005, 0.125, 0.505, 0.995)


# --- what cannot be read ----------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from(["moon", "heart", "no", "left", "effusion", "seen", "xyz"]), min_size=1
    )
)
def test_an_unknown_sentence_is_reported_word_for_word(words):
    junk = " ".join(words) + " ."
    assume(junk not in sentences())
    reading = read_report(f"no consolidation . {junk} cardiomegaly .")
    assert reading.unknown == (junk,)
    assert reading.findings == Findings.where({"cardiomegaly": State("present")})


@given(st.lists(st.sampled_from((*vocabulary(3)[5:], "moon")), max_size=40))
@settings(max_examples=200)
def test_no_word_is_silently_dropped(tokens):
    """Whatever the tokens, every word is part of a known sentence, of a heading, or reported."""
    assume(":" not in tokens)
    reading = read_report(" ".join(tokens), 3)
    reported = Counter(" ".join(reading.unknown).split())
    text = " ".join(token for token in tokens if not token.startswith("<"))
    for sentence in re.findall(r"[^.]+\.", text):
        if sentence.strip() in sentences():
            text = text.replace(sentence.strip(), "", 1)
    assert reported >= Counter(text.split())


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("cardiomegaly", ("cardiomegaly",)),
        ("no pneumothorax . small left", ("small left",)),
        (
            "<obj> cardiomegaly . <box> <x1> <y2> <x3> </box> </obj>",
            ("<box> <x1> <y2> <x3> </box>",),
        ),
        ("cardiomegaly . <box> <y1> <x2> <y3> <x4> </box>", ("<box> <y1> <x2> <y3> <x4> </box>",)),
        ("cardiomegaly . <box> <x9> <y2> <x3> <y4> </box>", ("<box> <x9> <y2> <x3> <y4> </box>",)),
        (
            "cardiomegaly . <box> <x1> <y2> <x3> <y400> </box>",
            ("<box> <x1> <y2> <x3> <y400> </box>",),
        ),
        ("cardiomegaly . <box> <x1> <y2>", ("<box> <x1> <y2>",)),
        ("cardiomegaly . <box> <x1> moon </box>", ("<box> <x1> moon", "</box>")),
        (
            "no pneumothorax . <box> <x1> <y1> <x2> <y2> </box>",
            ("<box> <x1> <y1> <x2> <y2> </box>",),
        ),
        ("<box> <x1> <y1> <x2> <y2> </box>", ("<box> <x1> <y1> <x2> <y2> </box>",)),
        ("cardiomegaly . <x1>", ("<x1>",)),
        ("<obj> cardiomegaly .", ("<obj>",)),
        ("cardiomegaly . </obj>", ("</obj>",)),
        ("<obj> cardiomegaly . <obj> no pneumothorax . </obj>", ("<obj>",)),
        ("hello findings : cardiomegaly .", ("hello",)),
        ("technique : by hand . findings : cardiomegaly .", ("by hand .",)),
        ("comparison : x . findings : cardiomegaly .", ("x .",)),
        ("findings : cardiomegaly . impression : cardiomegaly . odd .", ("odd .",)),
        ("findings : cardiomegaly . findings : no pneumothorax .", ("findings :",)),
        ("Cardiomegaly .", ("Cardiomegaly .",)),
    ],
)
def test_broken_text_is_reported(text, unknown):
    assert read_report(text).unknown == unknown


def test_contradictions_are_reported_and_the_first_counts():
    reading = read_report("small left pleural effusion . no pleural effusion . cardiomegaly .")
    assert reading.conflicts == ("effusion_left",)
    assert reading.findings["effusion_left"] == State("present", "small")
    assert reading.unknown == ()
    assert read_report("cardiomegaly . the heart is enlarged .").conflicts == ()


def test_a_finding_may_have_several_boxes():
    text = "cardiomegaly . <box> <x1> <y1> <x2> <y2> </box> <box> <x3> <y3> <x4> <y4> </box>"
    reading = read_report(text, 10)
    assert len(reading.boxes["cardiomegaly"]) == 2
    assert reading.unknown == ()


def test_empty_text_says_nothing():
    reading = read_report("")
    assert reading.findings == Findings()
    assert reading.impression is reading.prior is reading.lateral is reading.indication is None


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Findings.where({"pacemaker": State("possible")}), "pacemaker cannot be State"),
        (lambda: Findings.where({"lung": ABSENT}), "no label is called 'lung'"),
        (lambda: Findings((ABSENT,)), "1 states given; give one for each of"),
        (lambda: Findings.where({"nodule_left_upper": State("present", "small")}), "see states_of"),
        (lambda: bins_of(Box(0.5, 0, 0.2, 1)), "is no box; give x0 <= x1"),
        (lambda: bins_of(Box(0, 0, 1, 1), 0), "0 bins asked for; use at least 1"),
        (lambda: box_from((1, 2, 3), 10), "no four bins from 0 to 9"),
        (lambda: box_from((5, 2, 3, 4), 10), "ends before it starts"),
        (lambda: vocabulary(0), "0 bins asked for"),
        (
            lambda: write_report(Findings.where({"cardiomegaly": State("present")}), 0, boxes={}),
            "cardiomegaly is seen but has no box",
        ),
        (lambda: write_report(Findings(), 0).grounded_text, "give write_report the boxes"),
    ],
)
def test_errors_say_what_was_asked_and_what_to_do(make, text):
    with pytest.raises(PhantomError, match=text):
        make()
