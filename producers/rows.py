"""Read numbered rows from JSON lines, JSON arrays and CSV (also gzipped), Parquet, Arrow, data sets saved by `datasets`, and
standard input.

The format is detected from the first bytes, not from the file name. Only CSV is detected from the name (.csv, .tsv). A row is
the bytes of a line, or a dictionary of the columns in `producers.parse.ROW_COLUMNS` and of the columns that the caller names.
Every other column has the value UNREAD. A row that cannot be read is returned as a RowError. Rows are streamed, so a file is
never read into memory as a whole. A line longer than MAX_LINE_BYTES is skipped without being stored.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from engine.errors import UsageError
from engine.progress import WorkProgress
from producers.parse import JSON_DECODER, NO_COLUMNS, ROW_COLUMNS, TEXT_COLUMNS, UNREAD, RowError, is_prompt_part

MAX_LINE_BYTES = 16 * 1024 * 1024
_BATCH_SIZE = 500
_GZIP_MAGIC, _PARQUET_MAGIC, _ARROW_FILE_MAGIC, _ARROW_STREAM_MAGIC = b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_UTF16_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_UNSUPPORTED_MAGIC = {
    b"PK\x03\x04": ("a ZIP archive or an Excel file", "unpack it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "type: zstd -d FILE"),
    b"BZh": ("compressed with bzip2", "type: bunzip2 FILE"),
    b"\xfd7zXZ": ("compressed with xz", "type: unxz FILE"),
    b"SQLite": ("an SQLite database", "write its rows as JSON lines"),
    b"\x89HDF": ("an HDF5 file", "write its rows as JSON lines"),
}
_CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", *_CSV_DELIMITERS, *(f"{name}.gz" for name in _CSV_DELIMITERS))
_ARRAY_CHUNK_CHARS = 64 * 1024
RawRow = bytes | dict[str, Any] | RowError
_NEXT_ARRAY_STATES = {
    ("start", "["): "element", ("element", "]"): "end", ("separator", ","): "element", ("separator", "]"): "end",
}  # fmt: skip
_ReportShare = Callable[[float], None]


class MissingColumn(UsageError):
    """A file with a header does not have a column that the caller names."""


class LineReader(Protocol):
    """A source of lines: a file, a gzip stream or standard input."""

    def readline(self, size: int = ..., /) -> bytes: ...


def read_rows(
    path: str,
    first_row: int = 1,
    last_row: int | None = None,
    *,
    columns: Mapping[str, str] = NO_COLUMNS,
    progress: WorkProgress | None = None,
) -> Iterator[tuple[int, RawRow]]:
    """Yield the number and the content of each row of a file, a folder or standard input ("-").

    Numbers start at 1. Blank lines are counted, but they are not returned. The header of a CSV file is not a row. `columns` maps
    names of Charter's columns to names in the file. Update `progress` with the number of rows and the share of the bytes. Raise
    UsageError if a file with a header does not have the columns.
    """
    progress = progress or WorkProgress()
    for number, row in enumerate(_read_all_rows(path, columns, progress), 1):
        if last_row is not None and number > last_row:
            return
        if number >= first_row and row != b"":
            progress.num_done += 1
            yield number, row


def _read_all_rows(path: str, columns: Mapping[str, str], progress: WorkProgress) -> Iterator[RawRow]:
    if path == "-":
        yield from _read_lines(sys.stdin.buffer)
        return
    files = _list_data_files(Path(path))
    sizes = [file.stat().st_size for file in files]
    for index, file in enumerate(files):
        done, size, total = sum(sizes[:index]), sizes[index], max(sum(sizes), 1)

        def report_share(share: float, done: int = done, size: int = size, total: int = total) -> None:
            progress.share = (done + share * size) / total

        with file.open("rb") as stream:
            yield from _read_file_rows(file, stream, columns, report_share)


def _read_file_rows(path: Path, stream: IO[bytes], columns: Mapping[str, str], report_share: _ReportShare) -> Iterator[RawRow]:
    """Yield the rows of one file in the format that its first bytes show."""
    start = stream.read(6)
    stream.seek(0)
    if start.startswith(_PARQUET_MAGIC):
        yield from _read_parquet_rows(path, stream, columns, report_share)
    elif start.startswith((_ARROW_FILE_MAGIC, _ARROW_STREAM_MAGIC)):
        yield from _read_arrow_rows(path, stream, start, columns, report_share)
    else:
        size = max(path.stat().st_size, 1)
        unpacked = gzip.GzipFile(fileobj=stream) if start.startswith(_GZIP_MAGIC) else stream
        for row in _read_text_rows(path, unpacked, columns):
            report_share(stream.tell() / size)
            yield row


def _read_text_rows(path: Path, stream: Any, columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Yield the rows of CSV, of a JSON array or of JSON lines. `stream` has the uncompressed bytes."""
    if delimiter := _CSV_DELIMITERS.get(Path(path.name.lower().removesuffix(".gz")).suffix):
        yield from _read_csv_rows(path, stream, delimiter, columns)
        return
    try:
        start = stream.peek(8)[:64]
    except (EOFError, zlib.error, gzip.BadGzipFile):
        start = b""  # _read_lines reports the damage
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_json_array(stream)
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


def _read_csv_rows(path: Path, stream: IO[bytes], delimiter: str, columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Yield the rows of CSV (RFC 4180) with a header. An empty field is null, because CSV has no other null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(filter(None, reader), None)
        if names is None:
            return
        _check_columns(path, names, columns)
        for values in reader:
            if not values:
                yield b""
            elif len(values) != len(names):
                yield RowError(f"{len(values)} fields, but the header has {len(names)}")
            elif any("\udc80" <= character <= "\udcff" for value in values for character in value):
                yield RowError("not UTF-8")
            else:
                yield {name: value or None for name, value in zip(names, values, strict=True)}
    except csv.Error as error:
        yield RowError(f"the CSV data cannot be read from here on (near line {reader.line_num}): {error}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError(f"the compressed data is damaged from here on: {error}")


def _read_json_array(stream: IO[bytes]) -> Iterator[RawRow]:
    """Yield the elements of a JSON array without reading the whole array into memory."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    buffer, state = "", "start"  # then "element" and "separator" in turn, and "end"
    try:
        while chunk := text.read(_ARRAY_CHUNK_CHARS):
            buffer = (buffer + chunk).lstrip()
            while buffer:
                if state == "element" and buffer[0] != "]":
                    try:
                        value, end = _decode_element(buffer)
                    except json.JSONDecodeError:
                        break  # the element ends in a later chunk
                    yield value if isinstance(value, dict | RowError) else json.dumps(value).encode()
                    state = "separator"
                elif (state, buffer[0]) in _NEXT_ARRAY_STATES:
                    state, end = _NEXT_ARRAY_STATES[state, buffer[0]], 1
                else:
                    yield RowError(f"not JSON from here on: {buffer[:20]!r} after an element")
                    return
                buffer = buffer[end:].lstrip()
            if len(buffer) > MAX_LINE_BYTES:
                break
        if state != "end":
            yield RowError(f"not JSON from here on, or an element longer than {MAX_LINE_BYTES} characters")
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield RowError(f"the JSON array cannot be read from here on: {error}")


def _decode_element(text: str) -> tuple[Any, int]:
    """Return the value that begins a text, or a RowError if it cannot be a row, and the end of the value."""
    try:
        return JSON_DECODER.raw_decode(text)
    except RowError as error:
        return error, json.JSONDecoder().raw_decode(text)[1]


def _read_parquet_rows(
    path: Path, stream: IO[bytes], columns: Mapping[str, str], report_share: _ReportShare
) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        names = _check_columns(path, file.schema_arrow.names, columns)
        unread = [name for name in file.schema_arrow.names if name not in names]
        num_rows = max(file.metadata.num_rows, 1)
        batches = file.iter_batches(_BATCH_SIZE, columns=names)
        for index, row in enumerate(_read_batch_rows(batches, names, unread)):
            report_share(index / num_rows)
            yield row
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        MemoryError,
    ) as error:  # a damaged length field may request any amount of memory
        yield _make_unreadable_row("Parquet", error)


def _read_arrow_rows(
    path: Path, stream: IO[bytes], start: bytes, columns: Mapping[str, str], report_share: _ReportShare
) -> Iterator[RawRow]:
    import pyarrow as pa

    try:
        if start.startswith(_ARROW_FILE_MAGIC):
            file = pa.ipc.open_file(stream)
            count = max(file.num_record_batches, 1)
            batches: Iterator[tuple[float, Any]] = ((n / count, file.get_batch(n)) for n in range(file.num_record_batches))
        else:
            file, size = pa.ipc.open_stream(stream), max(path.stat().st_size, 1)
            batches = ((stream.tell() / size, batch) for batch in file)
        names = _check_columns(path, file.schema.names, columns)
        unread = [name for name in file.schema.names if name not in names]
        for share, batch in batches:
            report_share(share)
            yield from _read_batch_rows([batch], names, unread)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        MemoryError,
    ) as error:  # a damaged length field may request any amount of memory
        yield _make_unreadable_row("Arrow", error)


def _read_batch_rows(batches: Any, names: Sequence[str], unread: Sequence[str]) -> Iterator[RawRow]:
    """Yield the rows of Arrow record batches. If Python cannot represent a value (such as invalid UTF-8), yield a RowError."""
    import pyarrow as pa

    unread_fields = dict.fromkeys(unread, UNREAD)
    for batch in batches:
        batch.validate(full=True)  # the offsets of a damaged file may point outside their buffers
        columns = [batch.column(name) for name in names]
        for index in range(batch.num_rows):
            try:
                yield {name: column[index].as_py() for name, column in zip(names, columns, strict=True)} | unread_fields
            except (pa.ArrowException, ValueError, OverflowError) as error:
                yield RowError(f"a value cannot be read: {error}")


def _check_columns(path: Path, names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Return the names of the columns to read. Raise UsageError if none has text, or if one that `columns` names is missing."""
    header = ", ".join(names)
    wanted = [source for source in columns.values() if source]
    if missing := [name for name in wanted if name not in names]:
        raise MissingColumn(
            f"{path} has no column {missing[0]!r}", f"its columns are: {header}", "give --column with one of them"
        )
    known = [
        name for name in names if name in wanted or ((name in ROW_COLUMNS or is_prompt_part(name)) and name not in columns)
    ]
    if len(set(known)) != len(known):
        raise UsageError(f"{path} has two columns of one name", f"its columns are: {header}", "rename one of the columns")
    if len(names) == 1 and ";" in header:
        raise UsageError(
            f"the fields of {path} are separated by semicolons",
            f"its header is: {header}",
            "separate the fields by commas (RFC 4180)",
        )
    if not any(name in wanted or name in TEXT_COLUMNS for name in known):
        raise UsageError(
            f"{path} has no column with a prompt or a response",
            f"its columns are: {header}",
            "name the column of the prompt: --column prompt=NAME",
        )
    return known


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
            start = stream.read(6)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}",
            error.strerror or str(error),
            "give a file of JSON, CSV, Parquet or Arrow, the folder of a saved data set, or - for standard input",
        ) from error
    for magic, (what, fix) in _UNSUPPORTED_MAGIC.items():
        if start.startswith(magic):
            formats = "JSON lines, JSON arrays, CSV (also with gzip), Parquet and Arrow"
            raise UsageError(f"{path} is {what}", f"Charter reads {formats}", fix.replace("FILE", str(path)))
    if encoding := _UTF16_MARKS.get(start[:2]):
        raise UsageError(
            f"{path} is {encoding}, not UTF-8",
            "text must be UTF-8",
            f"type: iconv -f {encoding} -t UTF-8 {path} > utf8-{path.name}",
        )
    return digest
