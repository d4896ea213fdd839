"""Labels of others: delphi's files, and interpretations whose layout nobody has told us."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp.delphi_results import (
    read_explanations,
    read_scores,
    write_explanations,
    write_scores,
)
from autointerp.interpretations import Columns, candidates, read_interpretations
from autointerp.scores import Said, Verdict
from hooks.files import FolderError, FormatError
from maira_sae.causal_reports import _kept

WANTED = {3: "left effusion", 12: None}
RECORDS = [
    {"feature_id": 3, "interpretation": " left  effusion", "detection_score": 0.9, "n": 4},
    {"feature_id": 12, "interpretation": "None", "detection_score": None, "n": 2},
]
LAYOUTS = {
    "mapping": {"3": "left effusion", "12": "no clear concept."},
    "mapping of records": {
        "latent_3": {"label": "left effusion", "f1": 0.5},
        "latent_12": {"label": None, "f1": 0.1},
    },
    "records": RECORDS,
    "one level deeper": {"model": "an LLM", "features": RECORDS},
    "a list of mappings": [{"3": "left effusion"}, {"12": "unknown"}],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_of_several_layouts(tmp_path, layout):
    (tmp_path / "interpretations.json").write_text(json.dumps(LAYOUTS[layout]))
    (tmp_path / "config.json").write_text("{}")
    found = read_interpretations(tmp_path, n_latents=16)
    assert found.texts == WANTED and found.file == "interpretations.json"
    if layout == "mapping of records":
        assert found.scores == {3: {"f1": 0.5}, 12: {"f1": 0.1}}
    elif layout in ("records", "one level deeper"):
        assert found.scores == {3: {"detection_score": 0.9}}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path, suffix):
    path = tmp_path / f"labels.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        rows = [("feature_id", "interpretation", "detection_score")]
        rows += [("3", "left effusion", "0.9"), ("12", "", "")]
        path.write_text("\n".join(mark.join(row) for row in rows))
    found = read_interpretations(path)
    assert found.texts == WANTED and found.scores == {3: {"detection_score": 0.9}}


def test_a_list_of_texts_counts_from_zero(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["effusion", None]))
    assert read_interpretations(path).texts == {0: "effusion", 1: None}
    with pytest.raises(FormatError, match="latent 1, and the dictionary has 0–0"):
        read_interpretations(path, n_latents=1)


def test_unusual_names_are_asked_for(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps([{"which": 3, "says": "left effusion"}]))
    with pytest.raises(FormatError, match=r"fields \['which', 'says'\], none of which"):
        read_interpretations(path)
    assert read_interpretations(path, Columns("which", "says")).texts == {3: "left effusion"}
    path.write_text(json.dumps([{"latent": 3, "label": "a"}, {"latent": 3, "label": "b"}]))
    with pytest.raises(FormatError, match="two interpretations of latent 3"):
        read_interpretations(path)
    path.write_text("[1, 2]")
    with pytest.raises(FormatError, match=r"a list of \['int'\]"):
        read_interpretations(path)
    path.write_text("{")
    with pytest.raises(FormatError, match=r"cannot be read as \.json"):
        read_interpretations(path)


def test_which_file_is_never_guessed(tmp_path):
    with pytest.raises(FolderError, match="no file, no folder and no Hub repository"):
        read_interpretations(tmp_path / "a" / "b c")
    with pytest.raises(FolderError, match=r"has no \.json"):
        read_interpretations(tmp_path)
    for name in ("a_labels.csv", "b_labels.csv", "other.csv"):
        (tmp_path / name).write_text("latent,label\n3,left effusion\n")
    with pytest.raises(FolderError, match="2 files that could hold"):
        read_interpretations(tmp_path)
    assert candidates(["a/manifest.json", "a/features.json"]) == ["a/features.json"]


def test_delphi_both_ways(tmp_path):
    labels = {3: "left effusion", 5: 'a "quoted" tube', 7: None}
    assert write_explanations(labels, tmp_path / "explanations", "layers.15") == 2
    path = tmp_path / "explanations"
    (path / "layers.15_latent9.txt").write_text('"Explanation could not be parsed."')
    (path / "layers.2_latent9.txt").write_text('"of another layer"')
    (tmp_path / "run_config.json").write_text('{"explainer_model": "an-llm"}')
    found = read_explanations(path, "layers.15")
    assert found.texts == {3: "left effusion", 5: 'a "quoted" tube'}
    assert (found.missing, found.model) == ((9,), "an-llm")
    with pytest.raises(FormatError, match=r"\['layers.15', 'layers.2'\]"):
        read_explanations(path, "layers.1")
    (path / "layers.15_latent9.txt").write_text('["a list"]')
    with pytest.raises(FormatError, match="holds a list"):
        read_explanations(path, "layers.15")


def test_what_delphi_could_not_read_is_missing(tmp_path):
    verdicts = [Verdict("a", True, True, 0.9), Verdict("b", False, False, 0.2)]
    verdicts += [Verdict("c", True, False, 0.4), Verdict("d", False, None)]
    said = [Said(3, "detection", "report", tuple(verdicts))]
    assert write_scores(said, tmp_path / "scores", "layers.15", {}) == 1
    (score,) = read_scores(tmp_path / "scores", "layers.15")
    assert (score.latent, score.scorer, score.value) == (3, "detection", 0.75)
    assert (score.coverage, score.n, score.auroc) == (0.75, 3, 1.0)
    assert score.standard_error is None and score.n_patients == 0
    with pytest.raises(FormatError, match="neither detection nor fuzz"):
        read_scores(tmp_path, "layers.15")
    (tmp_path / "scores/detection/layers.15_latent3.txt").write_text('[{"text": "x"}]')
    with pytest.raises(FormatError, match="no list of delphi's examples"):
        read_scores(tmp_path / "scores", "layers.15")


def test_a_torn_report_is_written_anew(tmp_path):
    path = tmp_path / "steered.jsonl"
    whole = '{"latent": null, "report": "Clear."}\n{"latent": 3, "report": "Effusion."}\n'
    path.write_text(whole + '{"latent": 5, "rep')
    assert _kept(path) == {None: "Clear.", 3: "Effusion."}
    assert path.read_text() == whole
    assert _kept(tmp_path / "none.jsonl") == {}
