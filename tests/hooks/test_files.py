import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from hooks.files import (
    ConfigError,
    FolderError,
    atomic_folder,
    atomic_path,
    fingerprint,
    read_json,
    reject_unknown_keys,
    verify,
    write_json,
)
from hooks.store import ActivationFolder


@pytest.fixture
def copy(activations, tmp_path):
    return Path(shutil.copytree(activations.folder, tmp_path / "acts"))


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format_version(copy):
    edit_manifest(copy, format_version=99)
    with pytest.raises(FolderError, match="format version 99, this library reads 1"):
        ActivationFolder(copy)


def test_another_kind_of_folder(copy):
    edit_manifest(copy, kind="sae")
    with pytest.raises(FolderError, match="holds 'sae', expected 'activations'"):
        ActivationFolder(copy)


def test_truncated_part(copy):
    part = copy / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(FolderError, match=r"part-00001\.safetensors has \d+ bytes.*says \d+ bytes"):
        ActivationFolder(copy)


def test_missing_part(copy):
    (copy / "tokens-00000.parquet").unlink()
    with pytest.raises(FolderError, match=r"tokens-00000\.parquet is missing"):
        ActivationFolder(copy)


def test_unfinished_folder(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(FolderError, match=r"unfinished; run `maira-sae harvest`"):
        ActivationFolder(copy)
    with pytest.raises(FolderError, match="no folder"):
        ActivationFolder(copy / "absent")


def test_verify_finds_one_flipped_bit(copy):
    assert verify(copy) == 13  # 4 parts of 3 files, and config.json
    part = copy / "part-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    ActivationFolder(copy)  # sizes agree
    with pytest.raises(FolderError, match=r"part-00002\.safetensors has sha256"):
        verify(copy)


def test_atomic_path_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(FolderError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FolderError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {"a": "×"})
    assert read_json(tmp_path / "x.json") == {"a": "×"}


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no key 'expantion' .did you mean 'expansion'"):
        reject_unknown_keys(["expantion"], ["expansion", "k"], "config")


def test_fingerprint_ignores_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})


def test_atomic_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    for text, accepted in (("1", True), ("1", True), ("2", False)):
        expected = pytest.raises(FolderError, match="something else")
        with nullcontext() if accepted else expected, atomic_folder(tmp_path / "a") as folder:
            (folder / "sub").mkdir()
            (folder / "sub/x").write_text(text)
    assert (tmp_path / "a/sub/x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="something else"), atomic_folder(tmp_path / "file"):
        pass
