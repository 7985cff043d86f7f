"""Checkpoints are copied to a URL and downloaded from it, complete and verified, or not at all."""

import importlib.util
import os
import uuid

import fsspec
import pytest

from engine.checkpoints import write_checkpoint
from engine.errors import CharterError, CheckpointsUnreachable, UsageError
from engine.remote_checkpoints import fetch_checkpoint, has_checkpoint, remove_remote_checkpoint, upload_checkpoint


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/checkpoints/" if request.param == "memory" else f"file://{tmp_path}/remote"


def save(folder):
    (folder / "model.safetensors").write_bytes(os.urandom(1000))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")


def write(folder, version=1):
    return write_checkpoint(folder / "data" / "checkpoints" / f"policy-{version:06d}", save, {"phase": "sft"})


def test_responder_without_a_shared_disk_downloads_a_checkpoint_once(tmp_path, url):
    written, responder = write(tmp_path / "trainer"), tmp_path / "responder" / "checkpoints"
    uri = upload_checkpoint(written, url)
    fetched = fetch_checkpoint(uri, responder, written.content_hash)
    assert fetched.folder == tmp_path / "responder" / "downloads" / "policy-000001"
    assert (fetched.manifest, fetched.content_hash) == (
        written.manifest | {"content_hash": written.content_hash},
        written.content_hash,
    )
    assert (fetched.folder / "adapter" / "adapter_model.safetensors").read_bytes() == b"adapter"
    remove_remote_checkpoint(uri)
    assert fetch_checkpoint(uri, responder, written.content_hash) == fetched  # the download is used again
    assert fetch_checkpoint(uri, written.folder.parent, written.content_hash).folder == written.folder  # the trainer's own one


def test_copy_is_not_repeated_and_that_of_another_log_is_not_replaced(tmp_path, url):
    written = write(tmp_path / "one")
    uri = upload_checkpoint(written, url)
    (written.folder / "model.safetensors").unlink()
    assert upload_checkpoint(written, url) == uri  # reads nothing
    with pytest.raises(UsageError, match="another data folder") as caught:
        upload_checkpoint(write(tmp_path / "two"), url)
    assert len(str(caught.value).splitlines()) == 3


def damage(files, path):
    files.pipe_file(f"{path}/model.safetensors", b"x")


def remove_file(files, path):
    files.rm(f"{path}/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("change", [damage, remove_file])
def test_partial_copy_is_never_used(tmp_path, url, change):
    written, responder = write(tmp_path / "trainer"), tmp_path / "responder" / "checkpoints"
    uri = upload_checkpoint(written, url)
    change(*fsspec.core.url_to_fs(uri))
    with pytest.raises(CheckpointsUnreachable, match="incomplete") as caught:
        fetch_checkpoint(uri, responder, written.content_hash)
    assert len(str(caught.value).splitlines()) == 3
    assert list((tmp_path / "responder" / "downloads").iterdir()) == []


def test_pickle_is_not_downloaded(tmp_path, url):
    written, responder = write(tmp_path / "trainer"), tmp_path / "responder" / "checkpoints"
    files, path = fsspec.core.url_to_fs(uri := upload_checkpoint(written, url))
    files.pipe_file(f"{path}/optimizer.pt", b"x")
    with pytest.raises(UsageError, match=r"optimizer\.pt, which is not downloaded"):
        fetch_checkpoint(uri, responder, written.content_hash)


def test_changed_download_is_rejected(tmp_path, url):
    written, responder = write(tmp_path / "trainer"), tmp_path / "responder" / "checkpoints"
    uri = upload_checkpoint(written, url)
    (fetch_checkpoint(uri, responder, written.content_hash).folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CharterError, match="damaged"):
        fetch_checkpoint(uri, responder, written.content_hash)


def test_missing_checkpoint_is_retried(tmp_path, url):
    uri, checkpoints = f"{url.rstrip('/')}/policy-000001", tmp_path / "checkpoints"
    assert not has_checkpoint(uri, checkpoints)
    with pytest.raises(CheckpointsUnreachable) as caught:
        fetch_checkpoint(uri, checkpoints, "0" * 64)
    assert len(str(caught.value).splitlines()) == 3


def test_only_the_last_used_downloads_are_kept(tmp_path, url):
    responder = tmp_path / "responder" / "checkpoints"
    for version in range(1, 9):
        written = write(tmp_path / "trainer", version)
        folder = fetch_checkpoint(upload_checkpoint(written, url), responder, written.content_hash).folder
        os.utime(folder, (version, version))
    assert sorted(path.name for path in folder.parent.iterdir()) == [f"policy-{version:06d}" for version in range(3, 9)]


@pytest.mark.parametrize(
    ("url", "words"), [("nosuchthing://x/y", "nosuchthing"), ("s3://bucket/folder", "pip install fsspec s3fs")]
)
def test_unusable_url_is_refused(tmp_path, url, words):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UsageError, match="cannot be used") as caught:
        has_checkpoint(url, tmp_path)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 3
