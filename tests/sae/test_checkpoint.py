import json
import logging

import pytest
import torch

from sae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def write(folder, step, keep=2):
    tensors = {"w": torch.full((3, 4), float(step)), "n": torch.tensor(step)}
    save_checkpoint(folder, Checkpoint(step, {"batches": step}, tensors), keep)


@pytest.fixture
def two(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    return tmp_path


def test_round_trip_and_the_last_are_kept(two):
    assert sorted(path.name for path in two.iterdir()) == ["step_00000020", "step_00000030"]
    checkpoint, refused = load_checkpoint(two)
    assert (checkpoint.step, checkpoint.position, refused) == (30, {"batches": 30}, [])
    assert torch.equal(checkpoint.tensors["w"], torch.full((3, 4), 30.0))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": (lambda c: flip(c / "state.safetensors"), "sha256"),
    "truncated": (lambda c: (c / "state.safetensors").write_bytes(b"123"), "3 bytes"),
    "tensors gone": (lambda c: (c / "state.safetensors").unlink(), "is missing"),
    "torn manifest": (lambda c: (c / "manifest.json").write_text('{"kind":'), "not valid JSON"),
    "old version": (
        lambda c: (c / "manifest.json").write_text(
            json.dumps(json.loads((c / "manifest.json").read_text()) | {"format_version": 1})
        ),
        "format version 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_refused_and_the_one_before_is_used(two, damage, caplog):
    spoil, reason = DAMAGE[damage]
    spoil(two / "step_00000030")
    with caplog.at_level(logging.WARNING):
        checkpoint, refused = load_checkpoint(two)
    assert checkpoint.step == 20
    assert len(refused) == 1 and "step_00000030" in refused[0] and reason in refused[0]
    assert "checkpoint refused" in caplog.text
    write(two, 30)
    assert load_checkpoint(two).checkpoint.step == 30


def test_leftovers_of_a_crash_do_not_count(two):
    (two / "step_00000040").mkdir()
    (two / "step_00000040" / "state.safetensors").write_bytes(b"torn")
    assert load_checkpoint(two).checkpoint.step == 30
    write(two, 40)
    assert load_checkpoint(two).checkpoint.step == 40
    assert load_checkpoint(two / "nowhere").checkpoint is None
