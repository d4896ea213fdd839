"""Studies written and drawn again, and factor tables against masks and sentences."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hooks.files import FolderError, verify
from hooks.roles import Role, View
from hooks.store import ActivationFolder, ActivationWriter, StudyRows
from hooks.studies import read_folder
from phantom import (
    CARRIES,
    DEVICES,
    FACTORS,
    HIERARCHY,
    LABELS,
    MEMBERS,
    PhantomError,
    Truth,
    film_shares,
    folder_factors,
    read_report,
    read_truth,
    sentence_factors,
    study_factors,
    token_factors,
    token_shares,
    write_studies,
)
from phantom.model import processor
from phantom.truth import id_of, seed_of

SEEDS = (3, 11, 12, 40)
BUSY = {"sampler": "independent", "rate": 0.5}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def words():
    return processor()


def tokens_of(words, study, grounded):
    report = study.report
    return words.tokenize_reporting(
        has_lateral=study.lateral is not None,
        has_prior=study.prior is not None,
        indication=report.indication,
        technique=report.technique,
        comparison=report.comparison,
        grounded=grounded,
        assistant_text=report.grounded if grounded else report.findings,
    )


@pytest.mark.parametrize("grounded", [False, True])
def test_written_studies_are_the_drawn_ones(tmp_path, grounded):
    written = write_studies(tmp_path, SEEDS, grounded=grounded, **BUSY)
    assert written == read_folder(tmp_path)
    assert verify(tmp_path) > len(SEEDS)
    truth = read_truth(tmp_path)
    assert truth == Truth(**BUSY, grounded=grounded)
    for seed, study in zip(SEEDS, written, strict=True):
        assert study.id == study.patient == f"phantom-{seed:07d}"
        drawn = truth.study(study.id)
        assert drawn.seed == seed
        assert study.labels == drawn.factors.present
        assert study.grounded == grounded
        assert study.report == (drawn.report.grounded if grounded else drawn.report.findings)
        assert (study.indication, study.technique, study.comparison) == (
            drawn.report.indication,
            drawn.report.technique,
            drawn.report.comparison,
        )
        assert read_report(study.report).findings == drawn.findings
        for view in ("frontal", "lateral", "prior"):
            path, film = getattr(study, view), getattr(drawn, view)
            assert (path is None) == (film is None)
            if film is not None:
                assert np.array_equal(np.asarray(Image.open(path)), film.pixels)


def test_writing_twice_and_resuming_give_the_same_bytes(tmp_path):
    write_studies(tmp_path / "a", SEEDS)
    whole = contents(tmp_path / "a")
    write_studies(tmp_path / "a", SEEDS)
    assert contents(tmp_path / "a") == whole
    write_studies(tmp_path / "b", np.array(SEEDS))
    assert contents(tmp_path / "b") == whole
    # As after a kill: no manifest, no studies, one film missing.
    films = sorted((tmp_path / "b" / "films").iterdir())
    kept = films[1].stat().st_mtime_ns
    for path in (tmp_path / "b" / "manifest.json", tmp_path / "b" / "studies.jsonl", films[0]):
        path.unlink()
    with pytest.raises(FolderError, match="unfinished"):
        read_truth(tmp_path / "b")
    write_studies(tmp_path / "b", SEEDS)
    assert contents(tmp_path / "b") == whole
    assert films[1].stat().st_mtime_ns == kept


def test_rates_of_single_labels_come_back(tmp_path):
    rate = {"pacemaker": 1.0}
    (study,) = write_studies(tmp_path, [5], sampler="independent", rate=rate)
    assert study.labels == ("pacemaker",)
    assert read_truth(tmp_path).rate == rate


def test_a_folder_of_something_else_is_refused(tmp_path):
    write_studies(tmp_path / "a", [1])
    with pytest.raises(PhantomError, match="begun with sampler 'clinical'"):
        write_studies(tmp_path / "a", [1], sampler="independent")
    with pytest.raises(PhantomError, match="begun with seeds"):
        write_studies(tmp_path / "a", [2])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(PhantomError, match="not empty"):
        write_studies(tmp_path / "b", [1])
    for seeds in ([], [1, 1]):
        with pytest.raises(PhantomError, match="seeds"):
            write_studies(tmp_path / "c", seeds)
    with pytest.raises(PhantomError, match="no sampler"):
        write_studies(tmp_path / "c", [1], sampler="typical")
    assert not (tmp_path / "c").exists()


def test_films_that_this_version_draws_otherwise_are_refused(tmp_path):
    write_studies(tmp_path, [1])
    record = json.loads((tmp_path / "truth.json").read_text())
    size = (tmp_path / "truth.json").stat().st_size
    text = json.dumps(record | {"sampler": "independent"}).ljust(size)[:size]
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(PhantomError, match="differs from what this version draws"):
        read_truth(tmp_path)


@pytest.mark.parametrize("name", ["phantom-12", "phantom-00000012", "study-1", "phantom-0000012 "])
def test_ids(name):
    assert seed_of(id_of(12)) == 12 and seed_of(id_of(2**61 + 1)) == 2**61 + 1
    with pytest.raises(PhantomError, match="no phantom's id"):
        seed_of(name)


def test_composites_follow_from_their_members():
    assert FACTORS[: len(LABELS)] == LABELS
    for seed in range(40):
        study = Truth(sampler="independent", rate=0.15).draw(seed)
        on = dict(zip(FACTORS, study_factors(study), strict=True))
        assert tuple(label for label in LABELS if on[label]) == study.factors.present
        assert on["device"] == any(on[label] for label in DEVICES)
        assert on["tube"] == (on["endotracheal_tube"] or on["nasogastric_tube"])
    for parent, child in HIERARCHY:
        assert set(MEMBERS[child]) < set(MEMBERS[parent])


def test_shares_agree_with_masks():
    for seed in SEEDS:
        study = Truth(**BUSY).draw(seed)
        for film in study.films():
            shares = film_shares(film)
            np.testing.assert_array_equal(shares[: len(LABELS)], film.coverage())
            for factor in ("device", "tube"):
                masks = [film.masks[m] for m in MEMBERS[factor] if m in film.masks]
                union = sum(int(pixel) for pixel in np.any(masks, 0).flat) if masks else 0
                assert shares[FACTORS.index(factor)].sum() * 14**2 == pytest.approx(union)
            # Everything on a film is carried by some patch of it.
            found = (shares >= CARRIES).any((1, 2))
            assert set(np.array(FACTORS)[found]) >= set(film.factors.present)
            for parent, child in HIERARCHY:
                assert (shares[FACTORS.index(parent)] >= shares[FACTORS.index(child)]).all()
    with pytest.raises(PhantomError, match="no grid of 9"):
        film_shares(study.frontal, 9)


@pytest.mark.parametrize("grounded", [False, True])
def test_token_tables_agree_with_masks_and_sentences(words, grounded):
    for seed in SEEDS:
        study = Truth(**BUSY).draw(seed)
        tokens = tokens_of(words, study, grounded)
        shares, carries = token_shares(study, tokens), token_factors(study, tokens)
        assert shares.dtype == np.float32 and shares.shape == (len(tokens), 16)
        np.testing.assert_array_equal(carries, shares >= np.float32(CARRIES))
        for view in View:
            film = getattr(study, view.name.lower())
            image = (tokens.role == Role.IMAGE) & (tokens.view == view)
            assert image.sum() == (64 if film else 0)
            if film:
                for row, column, share in zip(
                    tokens.row[image], tokens.column[image], shares[image], strict=True
                ):
                    corner = np.s_[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
                    for label, mask in film.masks.items():
                        want = mask[corner].mean()
                        assert share[LABELS.index(label)] == pytest.approx(want, abs=1e-6)
        # Word for word: the report's own tokens, cut at its objects or stops, say what they say.
        spoken = np.flatnonzero(tokens.of_role(Role.REPORT, Role.GROUNDING))
        text = words.tokenizer.convert_ids_to_tokens(tokens.ids[spoken].tolist())
        end = "</obj>" if grounded else "."
        start = 0
        said = set()
        for place, word in enumerate(text):
            if word == end:
                reading = read_report(" ".join(text[start : place + 1]))
                assert not reading.unknown
                for row in carries[spoken[start : place + 1]]:
                    on = set(np.array(FACTORS)[row])
                    assert on & set(LABELS) == set(reading.findings.seen)
                    assert ("device" in on) == bool(on & set(DEVICES))
                said |= set(reading.findings.seen)
                start = place + 1
        assert start == len(text) and said == set(study.findings.seen)
        others = ~tokens.of_role(Role.IMAGE, Role.REPORT, Role.GROUNDING)
        assert others.any() and not shares[others].any()


def test_tokens_of_another_study_are_refused(words):
    truth = Truth(lateral=True, prior=False)
    study = truth.draw(1)
    tokens = tokens_of(words, study, False)
    with pytest.raises(PhantomError, match="no lateral film"):
        token_shares(replace(truth, lateral=False).draw(1), tokens)
    with pytest.raises(PhantomError, match="grid of 4"):
        token_shares(study, tokens, 4)
    longer = replace(tokens, sentence=np.where(tokens.sentence >= 0, tokens.sentence + 9, -1))
    with pytest.raises(PhantomError, match="its own report"):
        token_shares(study, longer)
    with pytest.raises(PhantomError, match="threshold"):
        token_factors(study, tokens, 0)
    for text in ("the moon is full .", "possible left pneumothorax"):
        with pytest.raises(PhantomError):
            sentence_factors(text)


def test_folder_tables_are_those_of_its_studies(tmp_path, words):
    truth = Truth(**BUSY)
    writer, expected = ActivationWriter(tmp_path, {}), []
    for part, seeds in enumerate((SEEDS[:2], SEEDS[2:])):
        rows = []
        for number, seed in enumerate(seeds):
            study = truth.draw(seed)
            tokens = tokens_of(words, study, grounded=bool(number))
            kept = np.flatnonzero(tokens.of_role(Role.IMAGE, Role.REPORT, Role.GROUNDING))
            own = tokens.take(kept)
            expected.append(token_factors(study, own, 0.2))
            site = {"llm.1.resid_post": torch.zeros(len(kept), 2)}
            name = id_of(seed)
            rows.append(StudyRows(name, name, 2 * part + number, kept, own, site))
        writer.write(part, rows, ["llm.1.resid_post"])
    writer.seal(2, sites=["llm.1.resid_post"])
    found = folder_factors(truth, ActivationFolder(tmp_path), 0.2)
    np.testing.assert_array_equal(found, np.concatenate(expected))
    with pytest.raises(PhantomError):
        folder_factors(Truth(lateral=False, prior=False), ActivationFolder(tmp_path))
