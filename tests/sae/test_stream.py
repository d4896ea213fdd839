import numpy as np
import pytest
import torch

from hooks.files import ConfigError, StudyError
from hooks.harvest import HarvestConfig, harvest
from hooks.roles import Role
from sae import stream
from sae.live import LiveRows
from sae.stream import FolderRows

SITE = "llm.1.resid_post"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_ROWS", 16)


def take(rows, n, batch=1, seed=0, position=None):
    batches = rows.batches([SITE], batch, seed, position or {})
    return [next(batches) for _ in range(n)]


def joined(batches):
    return torch.cat([batch.x[SITE] for batch in batches])


def key(row):
    return tuple(row.tolist())


def training_rows(activations):
    chosen = torch.from_numpy(~activations.heldout(0.3))
    return activations.rows(SITE, 0, activations.n_tokens)[chosen].float()


def test_an_epoch_is_every_training_row_once(activations):
    want = training_rows(activations)
    got = joined(take(FolderRows(activations, 0.3, 64), len(want)))
    assert sorted(map(key, got)) == sorted(map(key, want))
    assert not torch.equal(got, want)


def test_roles_belong_to_their_rows(activations):
    names = activations.column("role")
    everything = activations.rows(SITE, 0, activations.n_tokens).float()
    role_of = {key(x): name for x, name in zip(everything, names, strict=True)}
    for batch in take(FolderRows(activations, 0.3, 64), 20, batch=8):
        for x, role in zip(batch.x[SITE], batch.roles, strict=True):
            assert Role(int(role)).name.lower() == role_of[key(x)]


def test_held_out_rows_in_order(activations):
    rows = FolderRows(activations, 0.3, 64)
    chosen = activations.heldout(0.3)
    want = activations.rows(SITE, 0, activations.n_tokens)[torch.from_numpy(chosen)].float()
    assert torch.equal(joined(rows.heldout([SITE])), want)
    assert torch.equal(joined(rows.heldout([SITE], 21)), want[:21])


def test_epochs_and_seeds_differ(activations):
    n = len(training_rows(activations))
    rows = FolderRows(activations, 0.3, 64)
    first, other = joined(take(rows, 2 * n)), joined(take(rows, n, seed=1))
    assert not torch.equal(first[:n], first[n:])
    assert not torch.equal(first[:n], other)
    assert sorted(map(key, first[:n])) == sorted(map(key, first[n:]))


def same(straight, resumed):
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a.x[SITE], b.x[SITE]) and torch.equal(a.roles, b.roles)
        assert a.position == b.position


@pytest.mark.parametrize("done", [1, 4, 9, 23, 40])
def test_position_continues_exactly(activations, done):
    """Across buffers and epochs, with batches that span both."""
    rows = FolderRows(activations, 0.3, 48)
    straight = take(rows, done + 5, 13, 7)
    same(straight[done:], take(rows, 5, 13, 7, straight[done - 1].position))


def test_too_few_rows(activations):
    with pytest.raises(ConfigError, match="offers 0 rows, a batch needs 8"):
        take(FolderRows(activations, 1.0), 1, 8)


@pytest.fixture(scope="module")
def live(model, processor, studies):
    config = HarvestConfig((SITE,), dtype="float32", studies_per_part=4)
    return LiveRows(model, processor, studies, config, 0.3, buffer_rows=150)


def test_live_rows_are_the_harvested_rows(live, model, processor, studies, tmp_path):
    config = HarvestConfig((SITE,), dtype="float32")
    folder = harvest(model, processor, studies, config, tmp_path / "acts")
    want = training_rows(folder)
    got = joined(take(live, len(want), 1))
    mode = "donot_use_mm_for_euclid_dist"
    near = torch.cdist(got, want, compute_mode=mode) < 1e-4  # other batches round otherwise
    among = torch.cdist(want, want, compute_mode=mode) < 1e-4
    assert torch.equal(near.sum(dim=0), among.sum(dim=0)) and len(got) == len(want)
    kept_out = folder.rows(SITE, 0, folder.n_tokens)[torch.from_numpy(folder.heldout(0.3))]
    torch.testing.assert_close(joined(live.heldout([SITE])), kept_out)
    assert len(joined(live.heldout([SITE], 30))) == 30
    assert live.width(SITE) == folder.width(SITE) == len(live.moments(SITE).mean)


@pytest.mark.parametrize("done", [1, 11, 30, 60])
def test_live_position_continues_exactly(live, done):
    straight = take(live, done + 5, 13, 7)
    same(straight[done:], take(live, 5, 13, 7, straight[done - 1].position))
    assert any(batch.position["study"] > 0 for batch in take(live, 40, 13, 7))


def test_live_rows_need_both_sides_and_a_batch(live, model, processor, studies):
    config = HarvestConfig((SITE,))
    with pytest.raises(ConfigError, match="24 studies leave 0 to train on"):
        LiveRows(model, processor, studies, config, heldout=1.0)
    with pytest.raises(ConfigError, match="holds a batch of 100000 rows"):
        take(live, 1, 100_000)


def broken(studies, folder, ids):
    path = folder / "broken.png"
    path.write_bytes(b"not a film")
    swap = {"frontal": path}
    return [s.model_copy(update=swap) if s.id in ids else s for s in studies]


def test_live_rows_skip_a_study_that_cannot_be_read(model, processor, studies, tmp_path, caplog):
    training = [s.id for s in studies if s.split(0.3) != "heldout"]
    bad = {training[2], training[-1]}
    some = broken(studies, tmp_path, bad)
    config = HarvestConfig((SITE,), dtype="float32", studies_per_part=4)
    rows = LiveRows(model, processor, some, config, 0.3, buffer_rows=150)
    straight = take(rows, 60, 13, 7)
    assert {one.study_id for one in rows.skipped} == bad == {training[2], training[-1]}
    assert all(one.reason.startswith("unreadable: ") for one in rows.skipped)
    assert len([r for r in caplog.records if "is skipped" in r.message]) == 2  # once, not by epoch
    assert any(batch.position["epoch"] > 0 for batch in straight)
    for done in (3, 20, 41):
        again = LiveRows(model, processor, some, config, 0.3, buffer_rows=150)
        same(straight[done:], take(again, 60 - done, 13, 7, straight[done - 1].position))


def test_live_rows_stop_at_a_bad_study_if_strict(model, processor, studies, tmp_path):
    training = [s.id for s in studies if s.split(0.3) != "heldout"]
    config = HarvestConfig((SITE,), dtype="float32")
    some = broken(studies, tmp_path, {training[0]})
    with pytest.raises(StudyError, match=training[0]):
        take(LiveRows(model, processor, some, config, 0.3, strict=True), 1, 4)
    none = broken(studies, tmp_path, set(training))
    with pytest.raises(StudyError, match="studies to train on can be read"):
        LiveRows(model, processor, none, config, 0.3).moments(SITE)


def test_rows_are_floats_of_what_is_on_disk(activations):
    (batch,) = take(FolderRows(activations, 0.3), 1, 4)
    assert batch.x[SITE].dtype == torch.float32
    assert np.all(batch.roles.numpy() >= 0)
