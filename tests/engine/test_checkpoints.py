"""Checkpoints are whole or not there, are what they say, and are no pickles."""

import pytest

from engine.checkpoints import read_checkpoint, write_checkpoint
from engine.errors import CharterError, UsageError


def save(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 100)


def test_written_is_what_is_read(tmp_path):
    made = write_checkpoint(tmp_path / "policy-000001", save, {"phase": "sft"})
    found = read_checkpoint(made.folder, made.content_hash)
    assert found.manifest["phase"] == "sft" and found.content_hash == made.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["policy-000001"]


def test_a_failed_save_leaves_nothing(tmp_path):
    def fail(folder):
        save(folder)
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "policy-000001", fail, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda f: (f / "model.safetensors").write_bytes(b"x"), lambda f: (f / "more").touch()])
def test_a_changed_checkpoint_is_not_loaded(tmp_path, damage):
    made = write_checkpoint(tmp_path / "policy-000001", save, {})
    damage(made.folder)
    with pytest.raises(CharterError, match="damaged"):
        read_checkpoint(made.folder, made.content_hash)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(UsageError, match="pickle"):
        write_checkpoint(tmp_path / "a", lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), {})
    made = write_checkpoint(tmp_path / "b", save, {})
    (made.folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="pickle"):
        read_checkpoint(made.folder)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        read_checkpoint(tmp_path)
