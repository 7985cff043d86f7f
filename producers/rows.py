"""Read numbered rows from JSON lines (also gzipped), Parquet, Arrow, data sets saved by `datasets`, and standard input.

The format is detected from the first bytes, not from the file name. A row is the bytes of a line, or a dictionary of the
columns in `producers.parse.ROW_COLUMNS`. A row that cannot be read is returned as a RowError. Rows are streamed, so a file is
never read into memory as a whole. A line longer than MAX_LINE_BYTES is skipped without being stored.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from engine.errors import UsageError
from producers.parse import ROW_COLUMNS, RowError

MAX_LINE_BYTES = 16 * 1024 * 1024
_BATCH_SIZE = 500
_GZIP_MAGIC, _PARQUET_MAGIC, _ARROW_FILE_MAGIC, _ARROW_STREAM_MAGIC = b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_UTF16_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz")
RawRow = bytes | dict[str, Any] | RowError


class LineReader(Protocol):
    """A source of lines: a file, a gzip stream or standard input."""

    def readline(self, size: int = ..., /) -> bytes: ...


def read_rows(path: str, first_row: int = 1, last_row: int | None = None) -> Iterator[tuple[int, RawRow]]:
    """Yield the number and the content of each row of a file, a folder or standard input ("-").

    Numbers start at 1. Blank lines are counted, but they are not returned.
    """
    for number, row in enumerate(_read_all_rows(path), 1):
        if last_row is not None and number > last_row:
            return
        if number >= first_row and row != b"":
            yield number, row


def _read_all_rows(path: str) -> Iterator[RawRow]:
    if path == "-":
        yield from _read_lines(sys.stdin.buffer)
        return
    for file in _list_data_files(Path(path)):
        with file.open("rb") as stream:
            start = stream.read(6)
            stream.seek(0)
            if start.startswith(_GZIP_MAGIC):
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    yield from _read_lines(unpacked)
            elif start.startswith(_PARQUET_MAGIC):
                yield from _read_parquet_rows(stream)
            elif start.startswith((_ARROW_FILE_MAGIC, _ARROW_STREAM_MAGIC)):
                yield from _read_arrow_rows(stream, start)
            else:
                yield from _read_lines(stream)


def _read_lines(stream: LineReader) -> Iterator[RawRow]:
    """Yield lines without line ends and byte order mark. If a gzip stream is damaged, the last row is a RowError."""
    mark = codecs.BOM_UTF8
    try:
        while line := stream.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield RowError(f"longer than {MAX_LINE_BYTES} bytes")
            else:
                yield line.removeprefix(mark).strip()
            mark = b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError(f"the compressed data is damaged from here on: {error}")


def _read_parquet_rows(stream: IO[bytes]) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        yield from _read_batch_rows(file.iter_batches(_BATCH_SIZE, columns=_filter_known_columns(file.schema_arrow.names)))
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        MemoryError,
    ) as error:  # a damaged length field may request any amount of memory
        yield _make_unreadable_row("Parquet", error)


def _read_arrow_rows(stream: IO[bytes], start: bytes) -> Iterator[RawRow]:
    import pyarrow as pa

    try:
        if start.startswith(_ARROW_FILE_MAGIC):
            file = pa.ipc.open_file(stream)
            yield from _read_batch_rows(file.get_batch(number) for number in range(file.num_record_batches))
        else:
            yield from _read_batch_rows(pa.ipc.open_stream(stream))
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        MemoryError,
    ) as error:  # a damaged length field may request any amount of memory
        yield _make_unreadable_row("Arrow", error)


def _read_batch_rows(batches: Any) -> Iterator[RawRow]:
    """Yield the rows of Arrow record batches. If Python cannot represent a value (such as invalid UTF-8), yield a RowError."""
    import pyarrow as pa

    for batch in batches:
        batch.validate(full=True)  # the offsets of a damaged file may point outside their buffers
        names = _filter_known_columns(batch.schema.names)
        columns = [batch.column(name) for name in names]
        for index in range(batch.num_rows):
            try:
                yield {name: column[index].as_py() for name, column in zip(names, columns, strict=True)}
            except (pa.ArrowException, ValueError, OverflowError) as error:
                yield RowError(f"a value cannot be read: {error}")


def _filter_known_columns(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name in ROW_COLUMNS]


def _make_unreadable_row(kind: str, error: Exception) -> RowError:
    return RowError(f"the {kind} data cannot be read from here on: {str(error).splitlines()[0][:200] if str(error) else kind}")


def _list_data_files(path: Path) -> list[Path]:
    """Return the data files of a path, in order. Raise UsageError if a folder has no data or several splits."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        raise _make_several_splits_error(
            path, [f"{path / name}" for name in _read_json_object(path / "dataset_dict.json").get("splits", [])]
        )
    if (path / "state.json").exists():
        state = _read_json_object(path / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise UsageError(
                f"{path} is a selection of rows",
                "the order of its rows is stored in a separate index file",
                "save it again after flatten_indices()",
            )
        return [path / Path(file["filename"]).name for file in state.get("_data_files", [])]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(_DATA_SUFFIXES))
    if not files:
        raise UsageError(f"there is no data in {path}", f"no file in it ends in {', '.join(_DATA_SUFFIXES)}", "give a file")
    splits = {file.name.split("-")[0] for file in files if "-of-" in file.name}
    if len(splits) > 1:
        raise _make_several_splits_error(path, [f"{files[0].parent / name}-*" for name in sorted(splits)])
    return files


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", str(error), "save the data set again") from error
    return value if isinstance(value, dict) else {}


def _make_several_splits_error(path: Path, names: Sequence[str]) -> UsageError:
    return UsageError(
        f"{path} contains several splits: {', '.join(Path(name).name.removesuffix('-*') for name in names)}",
        "only one split can be published at a time",
        f"type: charter produce {names[0] if names else path}",
    )


def compute_content_hash(path: str) -> str:
    """Return the SHA-256 of a file or folder. Raise UsageError if the content cannot be read or has a wrong encoding."""
    digests = [_compute_file_hash(file) for file in _list_data_files(Path(path))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _compute_file_hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}",
            error.strerror or str(error),
            "give a file of JSON lines, Parquet or Arrow, the folder of a saved data set, or - for standard input",
        ) from error
    if start.startswith(b"["):
        raise UsageError(
            f"{path} is one JSON array, not JSON lines",
            "each line must be one row: a string or an object",
            f"type: jq -c '.[]' {path} > rows.jsonl",
        )
    if start in _UTF16_MARKS:
        encoding = _UTF16_MARKS[start]
        raise UsageError(
            f"{path} is {encoding}, not UTF-8",
            "JSON lines must be UTF-8",
            f"type: iconv -f {encoding} -t UTF-8 {path} > prompts.jsonl",
        )
    return digest
