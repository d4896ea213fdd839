"""What counts as turned and as changed, of reports written by hand."""

import pytest

from maira_sae.phantom_trial import Trial, changed_sentences

HEART, NODULE = "cardiomegaly .", "left lower lung nodule ."
EFFUSION, LARGER = "small left pleural effusion .", "large left pleural effusion ."


@pytest.mark.parametrize(
    ("before", "after", "label", "want"),
    [
        ([HEART, NODULE], [HEART, NODULE], "cardiomegaly", (0, 1)),
        ([HEART, NODULE], [NODULE], "cardiomegaly", (0, 1)),
        ([HEART, NODULE], [HEART], "cardiomegaly", (1, 1)),
        ([NODULE], [HEART, NODULE], "cardiomegaly", (0, 1)),
        ([NODULE], [HEART, NODULE], "pacemaker", (1, 2)),
        ([EFFUSION, NODULE], [LARGER, NODULE], "pacemaker", (1, 2)),
        ([EFFUSION, NODULE], [LARGER, NODULE], "effusion_left", (0, 1)),
        ([HEART], [HEART, "no words of this world ."], "cardiomegaly", (1, 1)),
    ],
)
def test_sentences_about_other_findings_that_change(before, after, label, want):
    assert changed_sentences(" ".join(before), " ".join(after), label) == want


def test_hits_side_effects_and_intervals():
    before = [NODULE, NODULE, HEART]
    after = [f"{HEART} {NODULE}", NODULE, f"{HEART} {NODULE}"]
    on = Trial.of(before, after, "cardiomegaly", True)
    assert on.hits == [True, False, True]
    assert (on.changed, on.total) == ([0, 0, 1], [1, 1, 1])
    assert on.rate == pytest.approx(2 / 3) and on.side == pytest.approx(1 / 3)
    off = Trial.of(before, after, "cardiomegaly", False)
    assert off.hits == [False, True, False]
    whole = on + off
    assert len(whole.hits) == 6 and whole.rate == 0.5
    interval = whole.rate_interval()
    assert interval["n"] == 6 and interval["low"] < 0.5 < interval["high"]
    assert whole.side_interval()["n"] == sum(whole.total)


def test_other_results_take_the_place_of_some_studies():
    whole = Trial([True, False, True], [0, 1, 2], [3, 3, 3])
    again = whole.replaced([2, 0], Trial([False, True], [9, 8], [7, 6]))
    assert again == Trial([True, False, False], [8, 1, 9], [6, 3, 7])
    assert whole.replaced([], Trial([], [], [])) == whole
