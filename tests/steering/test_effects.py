"""Reports whose differences are known: alignment, entailment, boxes, repetition, doses."""

import csv
import json

import pytest
import torch

from hooks.files import ConfigError, FolderError
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit
from steering.boxes import box_shifts
from steering.degeneration import degeneration
from steering.effects import dose_response, effect, names_any
from steering.entailment import entailment, write_radfact
from steering.likelihood import token_effects
from steering.sentences import align


def test_sentences_are_kept_lost_added_and_contradicted():
    before = "The heart is enlarged. No pleural effusion. Old rib fracture. Lungs are clear."
    after = "Lungs are clear. Small left pleural effusion. The heart is enlarged. Pacemaker."
    found = align(before, after)
    assert found.kept == (
        ("The heart is enlarged.", "The heart is enlarged."),
        ("Lungs are clear.", "Lungs are clear."),
    )
    assert found.contradicted == (("No pleural effusion.", "Small left pleural effusion."),)
    assert found.lost == ("Old rib fracture.",) and found.added == ("Pacemaker.",)
    assert found.n_before == 4


def test_a_judge_can_be_plugged_in_and_reports_may_be_empty():
    found = align("Cardiomegaly.", "The heart is big.", lambda a, b: "same")
    assert found.kept and not found.changes
    assert align("", "").n_before == 0
    assert align("", "One.").added == ("One.",)


def test_entailment_counts_failures_as_missing():
    answers = {"A.": '{"verdict": "entailed"}', "B.": None, "C.": "no JSON"}

    def ask(messages, schema):
        return answers[messages[1]["content"].rsplit("Sentence: ", 1)[1]]

    found = entailment("A. B.", "A. C.", ask)
    assert found.before == [True, None] and found.after == [True, None]
    assert found.missing == 2 and found.precision == found.recall == 1.0
    assert entailment("B.", "C.", ask).recall is None


def test_radfact_reads_what_is_written(tmp_path):
    write_radfact([("s1", "New, text.", "Old.")], tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert rows == [{"example_id": "s1", "prediction": "New, text.", "target": "Old."}]
    box = "<obj>Nodule.<box><x10><y20><x29><y39></box></obj>"
    write_radfact([("s1", box, "<obj>Clear.</obj>")], tmp_path / "r.json")
    (one,) = json.loads((tmp_path / "r.json").read_text())
    assert one["target"] == [{"text": "Clear.", "boxes": None}]
    assert one["prediction"][0]["boxes"][0] == pytest.approx(
        {"x_min": 0.105, "y_min": 0.205, "x_max": 0.295, "y_max": 0.395}
    )
    with pytest.raises(FolderError, match="no phrase"):
        write_radfact([("s1", "", "Old.")], tmp_path / "r.json")
    with pytest.raises(FolderError, match=r"\.csv"):
        write_radfact([], tmp_path / "r.txt")


def test_boxes_that_move():
    at = "<obj>Nodule.<box><x{}><y10><x{}><y29></box></obj><obj>Clear.</obj>"
    (shift,) = box_shifts(at.format(10, 29), at.format(20, 39))
    assert shift.iou == pytest.approx(0.09 / 0.29) and shift.distance == pytest.approx(0.1)
    assert box_shifts(at.format(10, 29), "<obj>Clear.</obj>") == []


def test_repetition():
    assert degeneration("a b c d e").repeated_4grams == 0
    looped = degeneration("x y " * 10)
    assert looped.longest_loop == 18 and looped.repeated_4grams == 1 - 2 / 17
    assert degeneration("A b. A b. C d.").repeated_sentences == pytest.approx(1 / 3)


def test_doses_have_intervals_over_patients():
    about = names_any(["effusion"])
    effects = [
        effect(f"s{i}", f"p{i // 2}", "steered", s, "No effusion. Heart normal.", text, about)
        for s, hit in ((1.0, 2), (2.0, 8))
        for i in range(8)
        for text in ["Left effusion. Heart normal." if i < hit else "No effusion. Pacemaker."]
    ]
    low, high = dose_response(effects)
    assert (low.strength, low.on_target.value, high.on_target.value) == (1.0, 0.25, 1.0)
    assert low.on_target.low == 0.0 and low.on_target.high < 1 and high.on_target.low == 1.0
    assert low.side_effects.value == pytest.approx(6 * 2 / 16) and high.side_effects.value == 0


def test_kl_is_zero_without_an_edit_and_positive_with_one(model, processor, studies):
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site="llm.1.resid_post"), seed=3).eval()
    study, report = studies[1], "The heart is normal."
    none = token_effects(model, processor, study, report, sae, [])
    assert set(none.kl) == {0.0} and none.plain_nll == none.steered_nll
    some = token_effects(model, processor, study, report, sae, [Edit(4, 40.0, 1.0)])
    assert some.mean_kl > 1e-3 and some.plain_nll == none.plain_nll
    assert some.perplexity == pytest.approx(
        float(torch.tensor(none.plain_nll).double().mean().exp()), rel=1e-6
    )
    with pytest.raises(ConfigError, match="empty"):
        token_effects(model, processor, study, " ", sae, [])
