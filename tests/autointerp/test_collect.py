"""The collecting pass against dense float64 arithmetic, and the promises of its examples."""

import signal
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.collect import CollectConfig, collect
from autointerp.examples import VALUE_RESOLUTION
from autointerp.features import SILENT, Features
from autointerp.sweep import BLOCK_ROWS, Encoder
from autointerp.tally import RESOLUTION, Running, Sketch
from hooks.files import ConfigError, FolderError
from hooks.roles import NONE, Role, Tokens, View
from hooks.store import StudyRows
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.1.resid_post"
WIDTH, LATENTS = 8, 24
GRID = 3


def study_rows(number: int, rng: np.random.Generator) -> StudyRows:
    """Two films, a line of prompt, and a report of three sentences."""
    patches, prompt, sentences = GRID**2, 4, (5, 6, 7)
    words = sum(sentences)
    n = 2 * patches + prompt + words
    role = [Role.IMAGE] * (2 * patches) + [Role.CLINICAL] * prompt + [Role.REPORT] * words
    view = [View.FRONTAL] * patches + [View.LATERAL] * patches + [NONE] * (prompt + words)
    row, column = np.divmod(np.arange(patches), GRID)
    none = np.full(prompt + words, NONE)
    sentence = np.concatenate(
        [np.full(2 * patches + prompt, NONE), np.repeat(np.arange(3), sentences)]
    )
    tokens = Tokens(
        ids=rng.integers(0, 30, n),
        role=np.array(role, dtype=np.int8),
        view=np.array(view, dtype=np.int16),
        row=np.concatenate([row, row, none]).astype(np.int16),
        column=np.concatenate([column, column, none]).astype(np.int16),
        sentence=sentence.astype(np.int16),
    )
    x = torch.from_numpy(rng.normal(size=(n, WIDTH))).bfloat16()
    return StudyRows(f"s{number}", f"p{number // 2}", number, np.arange(n), tokens, {SITE: x})


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    return [study_rows(i, rng) for i in range(400)]


@pytest.fixture(scope="module")
def sae():
    one = MatryoshkaSAE(SAEConfig(WIDTH, LATENTS, 2, (LATENTS,), site=SITE), seed=3)
    with torch.no_grad():
        one.b_enc[0] = 10.0  # fires on all
        one.b_enc[1] = -99.0  # on nothing
        one.threshold.fill_(1.5)
    return one


@pytest.fixture(scope="module")
def features(rows, sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "f"
    return collect(sae, rows, CollectConfig(score=0.3, steer=0.2), out)


def dense(rows, sae):
    x = torch.cat([one.activations[SITE] for one in rows]).double()
    pre = torch.relu((x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double())
    return (pre * (pre > float(sae.threshold))).detach().numpy()


def masks(rows):
    role = np.concatenate([one.tokens.role for one in rows])
    view = np.concatenate([one.tokens.view for one in rows])
    return {
        "frontal": view == int(View.FRONTAL),
        "lateral": view == int(View.LATERAL),
        "prompt": role == int(Role.CLINICAL),
        "report": role == int(Role.REPORT),
    }


def test_statistics_equal_those_of_dense_arithmetic(features, rows, sae):
    z = dense(rows, sae)
    assert features.modalities == ("frontal", "lateral", "prompt", "report")
    assert len(z) > 3 * BLOCK_ROWS
    for modality, own in masks(rows).items():
        for latent in range(LATENTS):
            found, column = features.stats(latent)[modality], z[own, latent]
            fired = column[column > 0]
            assert (found.n_rows, found.n_fired) == (len(column), len(fired))
            assert found.rate == len(fired) / len(column)
            assert found.mean == pytest.approx(column.mean(), rel=1e-5)
            if len(fired):
                assert found.mean_fired == pytest.approx(fired.mean(), rel=1e-5)
                assert found.max == pytest.approx(fired.max(), rel=1e-5)
                for q, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
                    near = (
                        np.quantile(fired, q, method="lower"),
                        np.quantile(fired, q, method="higher"),
                    )
                    assert near[0] * (1 - RESOLUTION) <= value <= near[1] * (1 + RESOLUTION)
            else:
                assert found.mean_fired == found.max == found.p50 == found.p99 == 0


def test_what_fires_everywhere_is_dense_and_what_never_fires_has_no_examples(features):
    assert features.dense(0) and not features.dense(1)
    assert features.examples(1) == []
    assert 0 not in features.alive() and 1 not in features.alive()
    assert {e.kind for e in features.examples(0)} <= {"top", "quantile"}


def test_top_examples_are_the_strongest_studies_of_their_set(features, rows, sae):
    z, own = dense(rows, sae), masks(rows)
    lengths = [len(one.tokens) for one in rows]
    study = np.repeat(np.arange(len(rows)), lengths)
    config = CollectConfig(score=0.3, steer=0.2)
    sets = np.array([config.set_of(one.patient) for one in rows])
    for modality, mask in own.items():
        for latent in range(2, LATENTS):
            peaks = np.zeros(len(rows))
            np.maximum.at(peaks, study[mask], z[mask, latent])
            for number, name in enumerate(("explain", "score", "steer")):
                best = np.sort(peaks[(sets == number) & (peaks > 0)])[::-1][: config.n_top]
                found = features.examples(latent, modality, "top", name)
                assert [e.peak for e in found] == pytest.approx(best.tolist(), rel=1e-5)
                assert len({e.study for e in found}) == len(found)


def test_examples_hold_the_latents_values_on_their_rows(features, rows, sae):
    z, own = dense(rows, sae), masks(rows)
    ids = np.concatenate([one.tokens.ids for one in rows])
    starts = np.cumsum([0] + [len(one.tokens) for one in rows])
    for latent in range(LATENTS):
        for e in features.examples(latent):
            first, last = e.rows
            number = int(e.study[1:])
            assert starts[number] <= first <= e.peak_row <= last < starts[number + 1]
            assert e.patient == f"p{number // 2}" and e.sequence == number
            assert own[e.modality][first : last + 1].all()
            exact, values = z[first : last + 1, latent], np.array(e.values)
            assert (values <= exact * (1 + 1e-5)).all()
            assert (values >= exact * (1 - VALUE_RESOLUTION - 1e-5)).all()
            assert e.peak == pytest.approx(z[e.peak_row, latent], rel=1e-5)
            if e.view:
                assert e.patch_shape == (GRID, GRID) and e.token_ids == []
            else:
                assert e.token_ids == ids[first : last + 1].tolist()
            if e.kind in SILENT:
                rows_of = slice(starts[number], starts[number + 1])
                assert e.peak == 0 and not z[rows_of, latent][own[e.modality][rows_of]].any()
            else:
                assert e.peak == max(e.values) == e.values[e.peak_index] > 0


def test_quantile_examples_are_other_studies_than_the_top_ones(features):
    for latent in range(2, LATENTS):
        studies = defaultdict(list)
        for e in features.examples(latent):
            if e.kind in ("top", "quantile"):
                studies[e.modality, e.set].append(e.study)
        assert all(len(set(found)) == len(found) for found in studies.values())


def test_no_patient_is_in_two_sets(features):
    table = features.table("examples").to_pydict()
    sets = defaultdict(set)
    for patient, name in zip(table["patient"], table["set"], strict=True):
        sets[patient].add(name)
    assert all(len(names) == 1 for names in sets.values())
    assert {name for names in sets.values() for name in names} == {"explain", "score", "steer"}


def test_hard_negatives_are_what_they_claim(rows, sae, tmp_path):
    class Labelled:
        def __init__(self, one, labels):
            self.id, self.labels = one.study, labels

    labels = [Labelled(one, ("a",) if i % 3 == 0 else ("b",)) for i, one in enumerate(rows)]
    found = collect(sae, rows, CollectConfig(score=0.3), tmp_path / "f", labels)
    z = dense(rows, sae)
    ids = np.concatenate([one.tokens.ids for one in rows])
    kinds = set()
    for latent in range(2, LATENTS):
        for modality in found.modalities:
            for name in ("explain", "score"):
                own = found.examples(latent, modality, set=name)
                top = [e for e in own if e.kind == "top"]
                kinds |= {e.kind for e in own}
                groups = {int(e.study[1:]) % 3 == 0 for e in top}
                for e in own:
                    if e.kind == "same_finding_absent":
                        assert (int(e.study[1:]) % 3 == 0) in groups
                    if e.kind == "neighbour":
                        assert (z[e.peak_row] > 0).any()
                    if e.kind == "same_region" and e.view:
                        assert e.peak_index in {t.peak_index for t in top}
                    if e.kind == "same_region" and not e.view:
                        assert ids[e.peak_row] in {i for t in top for i in t.token_ids}
    assert kinds >= set(SILENT)


def test_two_passes_give_the_same_bytes(rows, sae, tmp_path):
    one = collect(sae, rows, None, tmp_path / "a")
    other = collect(sae, iter(rows), None, tmp_path / "b")
    assert one.manifest["files"] == other.manifest["files"]


def test_a_folder_read_in_any_steps_gives_the_same_bytes(many_acts, tmp_path):
    folder, sae = many_acts
    found = [
        collect(sae, folder, None, tmp_path / str(step), read_rows=step).manifest["files"]
        for step in (7, 1000, 8192)
    ]
    assert found[0] == found[1] == found[2]
    again = collect(sae, folder, None, tmp_path / "7")
    assert again.manifest["files"] == found[0]
    with pytest.raises(FolderError, match="other features"):
        collect(sae, folder, CollectConfig(n_top=3), tmp_path / "7")


@pytest.fixture
def many_acts(tmp_path, model, processor, studies):
    from hooks.harvest import HarvestConfig, harvest

    folder = harvest(
        model, processor, studies, HarvestConfig((SITE,), policy="all"), tmp_path / "x"
    )
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE, policy="all"))
    return folder, sae


def test_a_value_that_is_not_finite_is_refused(rows, sae, tmp_path):
    x = rows[0].activations[SITE].clone()
    x[3, 1] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        collect(sae, [rows[0]._replace(activations={SITE: x})], None, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_one_threshold_for_each_latent_and_the_k_largest(sae, rows):
    x = rows[0].activations[SITE].float()
    each = MatryoshkaSAE(sae.config, seed=3)
    each.threshold = torch.linspace(0, 3, LATENTS)
    topk = MatryoshkaSAE(
        SAEConfig(WIDTH, LATENTS, 2, (LATENTS,), site=SITE, activation="topk"), seed=3
    )
    for one in (sae, each, topk):
        torch.testing.assert_close(Encoder(one)(x).dense(), one.encode(x).detach())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_running_best_is_the_best_of_all(data):
    k = data.draw(st.integers(1, 4))
    entries = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=60), label="entries"
    )
    running, at = Running(4, k), 0
    while at < len(entries):
        step = data.draw(st.integers(1, 20))
        part = entries[at : at + step]
        slot = np.array([s for s, _ in part])
        priority = np.array([p for _, p in part], dtype=np.float32)
        running.add(slot, priority, np.arange(at, at + len(part)), priority * 2)
        if data.draw(st.booleans()):
            running.settle()
        at += step
    running.settle()
    for slot in range(4):
        own = [(-p, row) for row, (s, p) in enumerate(entries) if s == slot]
        want = [row for _, row in sorted(own)[:k]]
        assert running.row[slot].tolist() == want + [-1] * (k - len(want))


def test_a_sketch_is_within_its_resolution():
    values = np.random.default_rng(0).lognormal(0, 1, 20000).astype(np.float32)
    sketch = Sketch(2, 1.0)
    sketch.add(np.ones(len(values), dtype=np.int64), values)
    for q in (0.01, 0.5, 0.9, 0.99):
        assert sketch.quantile(q)[1] == pytest.approx(np.quantile(values, q), rel=RESOLUTION)
    assert sketch.quantile(1.0)[1] <= sketch.max[1] == values.max()
    assert sketch.quantile(0.5)[0] == 0 and sketch.count.tolist() == [0, len(values)]


def test_unknown_names_are_refused_with_the_nearest(features):
    with pytest.raises(ConfigError, match="did you mean 'report'"):
        features.examples(2, modality="reprot")
    with pytest.raises(ConfigError, match="outside"):
        features.stats(LATENTS)
    with pytest.raises(FolderError, match="maira-sae collect"):
        Features.open(features.folder / "nowhere")


KILLED = """
import importlib, os, signal, sys, threading
from pathlib import Path

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

import pyarrow.parquet
from autointerp.sweep import Sweep
from hooks.store import ActivationFolder
from sae.model import MatryoshkaSAE

module = importlib.import_module("autointerp.collect")
acts, sae, out, place = sys.argv[1:]
if place == "count":
    Sweep._settle = die
elif place == "examples":
    pyarrow.parquet.ParquetWriter.write_table = die
elif place == "seal":
    module.seal = die
else:
    threading.Timer(float(place), die).start()
model = MatryoshkaSAE.from_pretrained(Path(sae))
module.collect(model, ActivationFolder(Path(acts)), None, Path(out))
die()
"""


def test_a_killed_pass_leaves_no_folder_and_the_next_gives_the_same_bytes(many_acts, tmp_path):
    folder, sae = many_acts
    sae.save(tmp_path / "sae", {})
    want = collect(sae, folder, None, tmp_path / "whole").manifest["files"]
    for place in ("count", "examples", "seal", "0.05"):
        out = tmp_path / f"at-{place}"
        command = [sys.executable, "-c", KILLED, *map(str, (folder.folder, tmp_path / "sae", out))]
        done = subprocess.run([*command, place], check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        if place != "0.05":
            assert not out.exists()
        assert collect(sae, folder, None, out).manifest["files"] == want
        assert {p.name for p in out.iterdir()} == {*want, "manifest.json"}


def test_rows_of_a_running_model_give_what_their_folder_gives(many_acts, model, processor, studies):
    from hooks.harvest import HarvestConfig, harvest_rows

    folder, sae = many_acts
    rows = harvest_rows(model, processor, studies, HarvestConfig((SITE,), policy="all"))
    here = folder.folder.parent
    live = collect(sae, rows, None, here / "live", studies)
    stored = collect(sae, folder, None, here / "stored", studies)
    assert live.manifest["files"] == stored.manifest["files"]
    assert {"frontal", "prompt", "report"} <= set(stored.modalities)


def test_words_the_model_wrote_are_a_modality_of_their_own(tmp_path, model, processor, studies):
    from hooks.generation import Decoding, harvest_generated
    from hooks.harvest import HarvestConfig

    config = HarvestConfig((SITE,), policy="all")
    folder = harvest_generated(
        model, processor, studies[:5], config, tmp_path / "acts", Decoding(4)
    )
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE, policy="all"))
    found = collect(sae, folder, None, tmp_path / "f")
    assert "generated" in found.modalities and "report" not in found.modalities
    written = np.isin(folder.roles(), [int(Role.REPORT), int(Role.GROUNDING)])
    ids = folder.column("token_id")
    assert found.stats(0)["generated"].n_rows == written.sum() > 0
    examples = [e for i in range(64) for e in found.examples(i, "generated")]
    assert examples
    for e in examples:
        assert written[e.rows[0] : e.rows[1] + 1].all()
        assert e.token_ids == ids[e.rows[0] : e.rows[1] + 1].tolist()


def test_the_size_is_told_first_and_a_full_disk_is_refused(rows, sae, many_acts, tmp_path):
    folder, own = many_acts
    told = []
    found = collect(own, folder, None, tmp_path / "f", before=told.append)
    size = told[0]
    assert size.rows == folder.n_tokens and size.examples >= found.manifest["n_examples"]
    assert size.bytes >= (found.folder / "examples.parquet").stat().st_size
    full = size._replace(free_bytes=size.bytes)
    with pytest.raises(ConfigError, match="--n-contrast"):
        full.check_room()

    def refuse(size):
        size._replace(free_bytes=0).check_room()

    for number, (one, source) in enumerate([(own, folder), (sae, rows)]):
        with pytest.raises(ConfigError, match="free"):
            collect(one, source, None, tmp_path / str(number), before=refuse)
        assert not (tmp_path / str(number)).exists()
