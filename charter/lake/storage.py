"""Read and write the files of a lake: in a local folder, in an S3 bucket (`s3://`) or in a Google Cloud bucket (`gs://`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from engine.checkpoints import fsync_path
from engine.errors import CharterError, LakeUnreachable, UsageError


class LakeStorage:
    """The files below a URL. The names of files are relative to the URL. Every method can raise LakeUnreachable.

    A file appears with its whole content or not at all: an object store has no incomplete objects, and a local file is renamed
    when it is complete.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_local = "://" not in url or url.startswith("file://")
        try:
            if "://" in url:
                self.filesystem, self.base = FileSystem.from_uri(url)
                self.location = url.partition("?")[0].rstrip("/")
            else:
                self.filesystem, self.base = LocalFileSystem(), str(Path(url).resolve())
                self.location = f"file://{quote(self.base)}"
        except (pa.ArrowException, ValueError) as error:
            raise UsageError(
                f"{url} is not the URL of a lake", str(error), "give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
            ) from error
        self.base = self.base.rstrip("/")

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file. On a local disk, the content is on the disk when this returns."""
        path = f"{self.base}/{name}"
        with self._report_errors("write", name):
            if not self.is_local:
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(content)
                return
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"_{target.name}.part")
            temporary.write_bytes(content)
            fsync_path(temporary)
            temporary.rename(target)
            fsync_path(target.parent)

    def read(self, name: str) -> pa.Buffer:
        with self._report_errors("read", name), self.filesystem.open_input_file(f"{self.base}/{name}") as file:
            return file.read_buffer()

    def list_names(self, folder: str) -> list[str]:
        """Return the sorted names of all files below a folder of the lake."""
        selector = FileSelector(f"{self.base}/{folder}".rstrip("/"), recursive=True, allow_not_found=True)
        with self._report_errors("list", folder):
            infos = self.filesystem.get_file_info(selector)
        return sorted(info.path.removeprefix(f"{self.base}/") for info in infos if info.type == FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file. Do nothing if it does not exist."""
        path = f"{self.base}/{name}"
        with self._report_errors("delete", name):
            if self.filesystem.get_file_info(path).type == FileType.File:
                self.filesystem.delete_file(path)

    @contextmanager
    def _report_errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CharterError(
                f"{name} is missing in the lake {self.url}",
                "the file was deleted after the export, or another export has replaced it meanwhile",
                "type the same command again; if the file is still missing, restore it from a copy, or export to another URL",
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise LakeUnreachable(
                f"cannot {verb} {name or 'the files'} in the lake {self.url}",
                str(error),
                "check the URL, the network and the credentials, then type the same command again",
            ) from error
