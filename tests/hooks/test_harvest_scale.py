"""Harvests of many studies: bad ones skipped, parts shared, patches sampled, sizes estimated."""

import json
import logging
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hooks import estimate as estimates
from hooks import rows as rows_module
from hooks.estimate import Estimate
from hooks.files import ConfigError, FolderError, StudyError, WriteError, write_json
from hooks.films import Films
from hooks.harvest import Harvest, HarvestConfig, harvest
from hooks.images import read_image
from hooks.policies import PatchSample, check_roles
from hooks.prompts import PromptRunner
from hooks.roles import Role
from hooks.rows import HostCopies
from hooks.store import ActivationFolder
from hooks.tensor_files import read_rows, tensor_layout
from hooks.writing import BackgroundWriter

SITE = "llm.1.resid_post"
CONFIG = HarvestConfig((SITE,), studies_per_part=4)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}


@pytest.fixture
def broken(studies, tmp_path):
    """The first ten studies, the fourth with half a film."""
    data = studies[3].frontal.read_bytes()
    (tmp_path / "torn.png").write_bytes(data[: len(data) // 2])
    torn = studies[3].model_copy(update={"frontal": tmp_path / "torn.png"})
    return [*studies[:3], torn, *studies[4:10]]


def test_a_bad_study_is_skipped_with_its_reason(model, processor, broken, tmp_path, caplog):
    folder = harvest(model, processor, broken, CONFIG, tmp_path / "acts")
    (skipped,) = folder.skipped()
    assert skipped.study_id == "s3" and "torn.png is not an image" in skipped.reason
    assert folder.manifest["n_skipped"] == 1 and folder.manifest["n_studies"] == 9
    assert set(folder.column("study")) == {s.id for s in broken} - {"s3"}
    assert "study 's3' is skipped" in caplog.text
    assert folder.verify() == 11

    others = [study for study in broken if study.id != "s3"]
    alone = harvest(model, processor, others, CONFIG, tmp_path / "others")
    torch.testing.assert_close(
        folder.rows(SITE, 0, folder.n_tokens).float(),
        alone.rows(SITE, 0, alone.n_tokens).float(),
        atol=0.05,
        rtol=0.02,
    )


def test_strict_stops_at_a_bad_study_and_goes_on_once_it_is_mended(
    model, processor, broken, tmp_path
):
    out, film = tmp_path / "acts", broken[3].frontal
    config = replace(CONFIG, studies_per_part=2)
    with pytest.raises(StudyError, match=r"study 's3'.*torn.png"):
        harvest(model, processor, broken, config, out, strict=True)
    assert (out / "part-00000.json").is_file() and not (out / "part-00001.json").exists()
    shutil.copy(broken[0].frontal, film)
    mended = harvest(model, processor, broken, config, out, strict=True)
    assert mended.manifest["n_skipped"] == 0 and mended.skipped() == []
    whole = harvest(model, processor, broken, config, tmp_path / "whole")
    assert files(whole.folder) == files(out)


def test_skipped_studies_are_read_again_when_asked(model, processor, broken, tmp_path):
    out = tmp_path / "acts"
    harvest(model, processor, broken, CONFIG, out)
    shutil.copy(broken[0].frontal, broken[3].frontal)
    assert harvest(model, processor, broken, CONFIG, out).manifest["n_skipped"] == 1
    again = harvest(model, processor, broken, CONFIG, out, retry_skipped=True)
    assert again.manifest["n_skipped"] == 0 and "s3" in set(again.column("study"))
    whole = harvest(model, processor, broken, CONFIG, tmp_path / "whole")
    assert files(whole.folder) == files(out)


def test_a_part_of_nothing_but_bad_studies(model, processor, broken, tmp_path):
    config = replace(CONFIG, studies_per_part=1)
    folder = harvest(model, processor, broken, config, tmp_path / "acts")
    assert folder.manifest["part_rows"][3] == 0 and folder.verify() == 32
    start = sum(folder.manifest["part_rows"][:3])
    assert len(folder.rows(SITE, start - 1, start + 1)) == 2
    with pytest.raises(StudyError, match="none of 1 studies could be read"):
        harvest(model, processor, [broken[3]], config, tmp_path / "none")


@pytest.mark.parametrize("seed", range(20))
def test_damaged_films_are_study_errors(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / ("film.png" if seed % 2 else "film.jpg")
    Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, min(len(data), 200), 12):
        data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
        assert read_image(path).mode == "L"
    except StudyError as error:
        assert "film" in str(error)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_writer_that_fails_stops_the_harvest_and_keeps_what_was_written(
    model, processor, studies, tmp_path, monkeypatch, streams
):
    from hooks.store import ActivationWriter

    write = ActivationWriter.write
    threads = set()

    def failing(self, index, *rest):
        threads.add(threading.current_thread().name)
        if index == 2:
            raise WriteError("the disk is full")
        write(self, index, *rest)

    out = tmp_path / "acts"
    monkeypatch.setattr(ActivationWriter, "write", failing)
    job = Harvest(model, processor, studies, CONFIG, out)
    job.streams = streams
    with pytest.raises(WriteError, match="full"):
        job.run()
    kept = sorted(p.name for p in out.glob("part-*.json"))
    if streams == 1:
        assert kept == ["part-00000.json", "part-00001.json"]
    else:  # in any order, but for what failed
        assert "part-00002.json" not in kept and len(kept) >= 1
    assert threads == {"writer"}
    monkeypatch.undo()
    harvest(model, processor, studies, CONFIG, out)
    whole = harvest(model, processor, studies, CONFIG, tmp_path / "whole")
    assert files(whole.folder) == files(out)


def test_background_calls_wait_for_room_and_finish_when_the_block_fails():
    done, gate = [], threading.Event()
    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writing:
        writing.put(lambda: (gate.wait(10), done.append(1)))
        writing.put(lambda: done.append(2))
        third = threading.Thread(target=writing.put, args=(lambda: done.append(3),))
        third.start()
        third.join(0.1)
        assert third.is_alive(), "the queue is bounded"
        gate.set()
        third.join(10)
        raise ZeroDivisionError
    assert done == [1, 2, 3]


@pytest.mark.parametrize("streams", [2, 3])
def test_any_number_of_streams_gives_the_same_bytes(model, processor, broken, tmp_path, streams):
    """A study that is skipped included; and torch's threads are as they were."""
    folders, threads = [], torch.get_num_threads()
    for count in (1, streams):
        job = Harvest(model, processor, broken, CONFIG, tmp_path / str(count))
        job.streams = count
        folders.append(job.run())
        assert torch.get_num_threads() == threads
    alone, together = folders
    assert alone.manifest["n_skipped"] > 0 and files(alone.folder) == files(together.folder)


def test_any_number_of_ranks_gives_the_same_bytes(model, processor, studies, tmp_path):
    whole = harvest(model, processor, studies, CONFIG, tmp_path / "one")
    for world in (2, 5, 9):
        out = tmp_path / f"world{world}"
        jobs = [
            Harvest(model, processor, studies, CONFIG, out, rank=r, world=world)
            for r in reversed(range(world))
        ]
        folders = [job.run() for job in jobs]
        assert [f is None for f in folders] == [True] * (world - 1) + [False]
        assert folders[-1] is not None and files(out) == files(whole.folder)
    with pytest.raises(ConfigError, match="rank 2 is outside 0–1"):
        Harvest(model, processor, studies, CONFIG, tmp_path / "x", rank=2, world=2)


def test_temporary_files_of_the_dead_are_swept_and_of_the_living_kept(
    model, processor, studies, tmp_path
):
    out = tmp_path / "acts"
    job = Harvest(model, processor, studies[:8], CONFIG, out)
    dead, alive = out / ".part-00001.safetensors.999999999.tmp", out / ".tokens-00001.parquet.1.tmp"
    dead.write_bytes(b"torn")
    alive.write_bytes(b"being written")
    job.run()
    assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("sites", [(SITE,), ("vision.1.resid_post", "projector")])
@pytest.mark.parametrize("by", ["uniform", "norm"])
def test_sampled_patches(model, processor, studies, tmp_path, sites, by):
    whole = harvest(
        model, processor, studies, HarvestConfig(sites, "patches", "float32"), tmp_path / "whole"
    )
    sample = PatchSample(by, fraction=0.25)
    config = HarvestConfig(sites, "patches", "float32", patches=sample)
    folder = harvest(model, processor, studies, config, tmp_path / "some")
    assert folder.manifest["harvest"]["patches"] == {"by": by, "fraction": 0.25, "count": None}
    key = ("study", "position")
    at = {k: i for i, k in enumerate(zip(*map(whole.column, key), strict=True))}
    places = torch.tensor([at[k] for k in zip(*map(folder.column, key), strict=True)])
    for site in sites:
        rows = whole.rows(site, 0, whole.n_tokens)
        assert torch.equal(folder.rows(site, 0, folder.n_tokens), rows[places])
    for study in studies:
        n = int((whole.column("study") == study.id).sum())
        mine = whole.column("study")[places.numpy()] == study.id
        assert mine.sum() == sample.size(n)
        norms = None
        if by == "norm":
            own = torch.from_numpy(whole.column("study") == study.id)
            norms = whole.rows(sites[-1], 0, whole.n_tokens)[own].double().norm(dim=1).numpy()
        first = int(np.flatnonzero(whole.column("study") == study.id)[0])
        want = first + sample.choose(study.id, n, norms)
        assert places.numpy()[mine].tolist() == want.tolist()
    other = harvest(
        model, processor, studies, replace(config, studies_per_part=5), tmp_path / "other"
    )
    if by == "uniform":
        assert other.column("position").tolist() == folder.column("position").tolist()


def test_a_sample_by_norm_prefers_large_norms():
    norms = np.concatenate([np.full(500, 1.0), np.full(500, 4.0)])
    sample = PatchSample("norm", count=100)
    large = np.mean([(sample.choose(f"s{i}", 1000, norms) >= 500).mean() for i in range(40)])
    assert 0.74 < large < 0.84  # 4 of 5 at the start, fewer as the large ones run out
    even = PatchSample(count=100)
    assert 0.46 < np.mean([(even.choose(f"s{i}", 1000) >= 500).mean() for i in range(40)]) < 0.54
    assert len(even.choose("s", 7)) == 7


def test_bad_samples():
    for text in ("uniform", "norm:", "norm:x", "norms:3", "uniform:1.5", "uniform:0"):
        with pytest.raises(ConfigError):
            PatchSample.parse(text)
    with pytest.raises(ConfigError, match="give one of them"):
        PatchSample()
    with pytest.raises(ConfigError, match="keeps no image patches"):
        HarvestConfig((SITE,), "report", patches=PatchSample(count=3))


def test_clinical_policy(model, processor, studies, tmp_path):
    folder = harvest(
        model, processor, studies, HarvestConfig((SITE,), "clinical"), tmp_path / "acts"
    )
    assert set(folder.roles()) == {int(Role.CLINICAL)} and folder.policy == "clinical"


def test_roles_a_dictionary_was_not_trained_on(caplog):
    with caplog.at_level(logging.WARNING):
        check_roles("published", "report", "acts-a")
        check_roles("", "patches", "acts-a")
        assert not caplog.records
        check_roles("report", "all", "acts-b")
        check_roles("report", "all", "acts-b")
    (record,) = caplog.records
    assert "acts-b has image, boilerplate, clinical tokens" in record.getMessage()
    with pytest.raises(ConfigError, match=r"trained on report, grounding tokens.*only image"):
        check_roles("report", "patches", "acts-c")
    with pytest.raises(ConfigError, match="did you mean 'report'"):
        check_roles("reports", "report", "acts-d")


@torch.no_grad()
def test_a_film_is_computed_once(model, processor, studies, monkeypatch):
    runner = PromptRunner(model, processor, batch_tokens=200)
    prompts = [runner.prompt(i, study) for i, study in enumerate(studies)]
    planes = {film: runner.plane(film) for study in studies for film in study.films()}
    films, computed = Films(model, planes), []
    compute = model.model.get_image_features

    def counted(pixel_values, **rest):
        computed.append(len(pixel_values))
        return compute(pixel_values=pixel_values, **rest)

    monkeypatch.setattr(model.model, "get_image_features", counted)
    given = {}
    for ran in runner.run(prompts, lambda batch, start, inputs: inputs, films):
        if "inputs_embeds" in ran.result and ran.prefix is None:
            want = model.get_input_embeddings()(runner.inputs(ran.prompts)["input_ids"])
            given[len(ran.prompts)] = ran.result["inputs_embeds"].shape == want.shape
    assert sum(computed) == len(planes) == 3
    assert all(given.values())
    assert films._features == {}, "features are let go after their last use"


def test_host_copies_on_a_cpu_and_in_turns():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copies = HostCopies(device)
    batches = [
        {"a": torch.randn(n, 4, device=device), "b": torch.randn(n, 8, device=device)}
        for n in (3, 50, 7, 1, 200)
    ]
    waiting, got = None, []
    for batch in batches:
        coming = copies.start(batch)
        if waiting is not None:
            got.append(waiting())
        waiting = coming
    got.append(waiting())
    for batch, found in zip(batches, got, strict=True):
        for name, tensor in batch.items():
            assert torch.equal(found[name], tensor.cpu())


@pytest.mark.parametrize("streams", [1, 2])
def test_memory_holds_two_parts_beside_those_being_made(
    model, processor, studies, tmp_path, monkeypatch, streams
):
    """However slow the disk is, rows that were made and not written are no more than that."""
    from hooks.store import ActivationWriter

    made, written, most = [0], [0], [0]
    real_rows, real_write = rows_module.part_rows, ActivationWriter.write

    def rows(*args):
        found = real_rows(*args)
        made[0] += 1
        most[0] = max(most[0], made[0] - written[0])
        return found

    def write(self, *args):
        threading.Event().wait(0.05)
        real_write(self, *args)
        written[0] += 1

    monkeypatch.setattr(rows_module, "part_rows", rows)
    monkeypatch.setattr(ActivationWriter, "write", write)
    job = Harvest(model, processor, studies, replace(CONFIG, studies_per_part=2), tmp_path / "acts")
    job.streams = streams
    job.run()
    assert made[0] == 12 and most[0] <= streams + 2


def test_estimate(model, processor, studies, tmp_path, monkeypatch):
    job = Harvest(model, processor, studies, CONFIG, tmp_path / "acts")
    left = job.estimate()
    folder = job.run()
    assert (left.studies, left.tokens) == (len(studies), folder.n_tokens)
    size = sum(p.stat().st_size for p in folder.folder.glob("part-*.safetensors"))
    assert 0.8 * size < left.bytes < 2 * size and left.seconds > 0
    left.check_room(tmp_path)
    with pytest.raises(ConfigError, match=r"needs about 2.0 TB and its disk has 1.0 GB free"):
        Estimate(1, 1, 2 * 10**12, 1.0, 10**9).check_room(tmp_path)
    assert job.estimate().studies == 0
    assert estimates.shown_bytes(7.6e12) == "7.6 TB"


def test_verify_counts_rows(model, processor, studies, tmp_path):
    folder = harvest(model, processor, studies, CONFIG, tmp_path / "acts")
    assert folder.verify() == 19
    manifest = json.loads((folder.folder / "manifest.json").read_text())
    manifest["part_rows"][0] += 1
    manifest["part_rows"][1] -= 1
    write_json(folder.folder / "manifest.json", manifest)
    with pytest.raises(FolderError, match=r"part-00000.safetensors holds"):
        ActivationFolder(folder.folder).verify()


def test_tensor_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(9, 5), "b": torch.randn(4, 3).bfloat16(), "c": torch.ones(3).half()}
    save_file(tensors, path)
    layout = tensor_layout(path)
    assert {name: (p.dtype, p.shape) for name, p in layout.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    for name in ("a", "b"):
        out = torch.empty(2, tensors[name].shape[1], dtype=tensors[name].dtype)
        read_rows(path, layout[name], 1, out)
        assert torch.equal(out, tensors[name][1:3])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FolderError, match="too early"):
        read_rows(path, layout["a"], 0, torch.empty(9, 5)) or read_rows(
            path, layout["b"], 0, torch.empty(4, 3, dtype=torch.bfloat16)
        )
    path.write_bytes(b"\xff" * 30)
    with pytest.raises(FolderError, match="not a readable tensor file"):
        tensor_layout(path)
