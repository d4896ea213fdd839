"""Data sets of any size: on disk until asked for, the same as the lists they stand for."""

import logging
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hooks.files import StudyError, WriteError, fingerprint
from hooks.harvest import Harvest, HarvestConfig, harvest
from hooks.studies import Film, Section, Sentence, Skipped, Study
from hooks.study_list import Chosen, Mapped, Spool, StudyList, studies_sha256

WORDS = "The lungs are clear, without focal consolidation. "


def study(i, **more):
    """About as large as one of MIMIC-CXR; names of files are few, since pathlib interns them."""
    place = Path("mimic/files/p10/p10000032/s50414267")
    films = tuple(Film(path=place / f"{i % 9:040}-{view}.jpg", view=view) for view in ("PA", "LL"))
    text = f"{i}: {WORDS * 6}"
    fields = {
        **{"id": f"s{50_000_000 + i}", "patient": f"p{10_000_000 + i // 2}", "images": films},
        **{"frontal": films[0].path, "lateral": films[1].path, "report": text},
        **{"sections": (Section(name="findings", text=text),), "labels": ("Edema",)},
        **{"sentences": (Sentence(text="é", boxes=((0.1, 0.2, 0.3, 0.4),)),)},
        **{"taken": "2180-05-06T08:30:45", "given_split": "train"},
    }
    return Study(**{**fields, **more})


def test_it_is_the_list_it_was_made_of():
    want = [study(i) for i in range(7)]
    gap = Skipped("x", "no image file: é.png")
    found = StudyList([*want[:3], gap, *want[3:]])
    assert list(found) == want and len(found) == 7 and found[-1] == want[-1]
    assert found[2:5] == want[2:5] and found[::-2] == want[::-2] and found[9:] == []
    assert list(found.skipped) == [gap]
    with pytest.raises(IndexError, match="record 7 of 7"):
        found[7]
    records = [one.model_dump(mode="json", exclude_defaults=True) for one in want]
    assert studies_sha256(found) == fingerprint(records)
    some = Chosen(found, np.array([5, 0]))
    assert list(some) == [want[5], want[0]] and some[1:] == [want[0]]
    names = Mapped(some, lambda one: one.id)
    assert list(names) == [want[5].id, want[0].id] and names[:1] == [want[5].id]


def test_memory_does_not_grow_with_the_studies():
    """As a list, 227,000 studies of MIMIC-CXR take 1.4 GB, and as much again for their sum."""
    StudyList([study(0)])  # imports are done
    n = 4000
    tracemalloc.start()
    try:
        found = StudyList(study(i) if i % 2 else Skipped(str(i), WORDS) for i in range(2 * n))
        shown = Mapped(found, lambda one: one.model_copy(update={"report": None}))
        studies_sha256(shown)
        peak = tracemalloc.get_traced_memory()[1]
        names = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*pathlib.py")])
        # pathlib interns names, and the table of them, the process's, may grow just now.
        peak -= sum(one.size for one in names.traces)
    finally:
        tracemalloc.stop()
    assert len(shown) == len(found.skipped) == n
    assert peak < 3e6, f"{peak / 1e6:.1f} MB; a list of them takes 17 MB"


def test_what_cannot_be_split_or_told_apart_is_refused():
    with pytest.raises(StudyError, match="1 leak between splits, the first: patient p10000000 is"):
        StudyList([study(0), study(1, given_split="test")])
    with pytest.raises(StudyError, match="study s50000000 is of patient a and of patient b"):
        StudyList([study(0, patient="b"), study(0, patient="a")])
    with pytest.raises(StudyError, match="it has two studies 's50000000'; make ids unique"):
        StudyList([study(0), study(0)], "it")
    with pytest.raises(StudyError, match="has no study that can be read; 1 were skipped, a for b"):
        StudyList([Skipped("a", "b")])


def test_a_full_temporary_folder_is_named(monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(WriteError, match="set TMPDIR to a folder with more room"):
        Spool[str](str, str).append("x")


def test_what_the_reader_left_out_is_in_the_folder(model, processor, studies, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    torn = studies[1].model_copy(update={"frontal": tmp_path / "none.png"})
    gap = Skipped("row 7", "malformed row: é")
    given = StudyList([studies[0], gap, torn, *studies[2:5]])
    config = HarvestConfig(("llm.1.resid_post",), studies_per_part=2)
    folder = harvest(model, processor, given, config, tmp_path / "one")
    assert [one.study_id for one in folder.skipped()] == ["row 7", "s1"]
    assert folder.skipped()[0] == gap and folder.manifest["n_skipped"] == 2
    assert folder.verify() == 11
    for rank in (1, 0):
        out = tmp_path / "two"
        Harvest(model, processor, given, config, out, rank=rank, world=2).run()
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    with pytest.raises(StudyError, match="1 left out by the reader, the first row 7 for malformed"):
        harvest(model, processor, given, config, tmp_path / "strict", strict=True)


def test_places_of_an_estimate_are_those_still_missing(model, processor, studies, tmp_path):
    config = HarvestConfig(("llm.1.resid_post",), studies_per_part=5)
    job = Harvest(model, processor, StudyList(studies), config, tmp_path / "acts", world=2)
    job.run()
    left, counted = job.estimate(), []
    assert left.studies == 10  # parts 1 and 3 of 5, the last of which has four studies
    job._maker.count = lambda place: counted.append(place) or 1
    job.estimate()
    assert counted == [*range(5, 10), *range(15, 20)]
