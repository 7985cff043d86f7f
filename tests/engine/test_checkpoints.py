"""Checkpoints are written atomically, verified by their hash, and never contain pickles."""

import pytest

from engine.checkpoints import read_checkpoint, write_checkpoint
from engine.errors import CharterError, UsageError


def save(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 100)


def test_checkpoint_round_trips(tmp_path):
    written = write_checkpoint(tmp_path / "policy-000001", save, {"phase": "sft"})
    checkpoint = read_checkpoint(written.folder, written.content_hash)
    assert checkpoint.manifest["phase"] == "sft" and checkpoint.content_hash == written.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["policy-000001"]


def test_failed_save_leaves_no_files(tmp_path):
    def fail(folder):
        save(folder)
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "policy-000001", fail, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda f: (f / "model.safetensors").write_bytes(b"x"), lambda f: (f / "more").touch()])
def test_changed_checkpoint_is_rejected(tmp_path, damage):
    written = write_checkpoint(tmp_path / "policy-000001", save, {})
    damage(written.folder)
    with pytest.raises(CharterError, match="damaged"):
        read_checkpoint(written.folder, written.content_hash)


def test_pickle_files_are_rejected(tmp_path):
    with pytest.raises(UsageError, match="pickle"):
        write_checkpoint(tmp_path / "a", lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), {})
    written = write_checkpoint(tmp_path / "b", save, {})
    (written.folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="pickle"):
        read_checkpoint(written.folder)


def test_folder_without_a_checkpoint_is_rejected(tmp_path):
    with pytest.raises(UsageError, match="not a Charter checkpoint"):
        read_checkpoint(tmp_path)
