"""A lake of Parquet files with a manifest.

    prompts/run=live/day=2026-11-24/0f3c....parquet     the rows of a table of one run and one day
    _charter/manifest-000000000012-WRITER.json          the files and positions of all tables
    _charter/claims/                                    the process that writes now

The manifest with the highest number names all files of the lake. It is written after its files, with one write, so a reader of the
files that it names never sees a part of a commit. Then the files and manifests that it replaces are deleted. A killed export can
leave files that no manifest names; the next export deletes them.

A new file absorbs the small files of its run and day, if they have at most as many rows as it has so far. So the number of small
files grows with the logarithm of the number of exports, and each row is rewritten about as often.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

import charter
from charter.lake.claims import LakeClaim
from charter.lake.evolution import to_current_schema
from charter.lake.positions import TableState, parse_state
from charter.lake.rows import get_lake_schema, select_erased
from charter.lake.storage import LakeStorage
from engine.errors import CharterError, DataFolderVersionMismatch
from schemas.topics import TOPICS, TopicSpec

_MANIFEST_VERSION = 1
_MANIFEST_PREFIX = "_charter/manifest-"
_SMALL_FILE_BYTES = 32 * 1024 * 1024
_MAX_FILE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class LakeFile:
    """A Parquet file. `path` is relative to the URL of the lake."""

    path: str
    run_id: str
    day: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass
class Manifest:
    """The content of a lake. `is_complete` is false while an export writes, and after an export was killed."""

    number: int = 0
    is_complete: bool = True
    cluster_ids: frozenset[str] = frozenset()
    states: dict[str, TableState] = field(default_factory=dict)
    files: dict[str, list[LakeFile]] = field(default_factory=dict)


class ParquetLake:
    """Reads and writes a lake of Parquet files."""

    def __init__(self, storage: LakeStorage, claim: LakeClaim | None = None) -> None:
        """Read the newest manifest. Without a claim, the lake can only be read."""
        self.storage, self.claim = storage, claim
        self.manifest = _read_manifest(storage)
        if claim and claim.was_interrupted:
            self.delete_unnamed_files()

    @property
    def exists(self) -> bool:
        return self.manifest.number > 0

    @property
    def is_complete(self) -> bool:
        return self.manifest.is_complete

    @property
    def cluster_ids(self) -> frozenset[str]:
        return self.manifest.cluster_ids

    def read_state(self, spec: TopicSpec) -> TableState:
        return self.manifest.states.get(spec.table, TableState())

    def append(self, spec: TopicSpec, rows: pa.Table, state: TableState, cluster_ids: frozenset[str]) -> int:
        """Add rows and set the state of the table, in one commit. Return the number of files written."""
        files = list(self.manifest.files.get(spec.table, ()))
        replaced: list[LakeFile] = []
        added: list[LakeFile] = []
        for (run_id, day), group in _group_rows(rows).items():
            absorbed = _select_absorbed([file for file in files if (file.run_id, file.day) == (run_id, day)], len(group))
            older = [to_current_schema(spec, self.read_rows(file)) for file in absorbed]
            replaced += absorbed
            added.append(self.write_file(spec, run_id, day, pa.concat_tables([*older, group])))
        self.manifest.files[spec.table] = [file for file in files if file not in replaced] + added
        self.manifest.states[spec.table] = state
        self.manifest.cluster_ids |= cluster_ids
        self.commit(replaced, is_complete=False)
        return len(added)

    def finish(self, states: dict[str, TableState], cluster_ids: frozenset[str]) -> None:
        """Set the states of tables without new rows, and note that the export is complete."""
        states = {table: state for table, state in states.items() if state.positions}
        is_unchanged = all(self.manifest.states.get(table) == state for table, state in states.items())
        if self.exists and self.is_complete and is_unchanged and cluster_ids <= self.cluster_ids:
            return
        self.manifest.states |= states
        self.manifest.cluster_ids |= cluster_ids
        self.commit([], is_complete=True)

    def erase(self, spec: TopicSpec, prompt_ids: Sequence[str]) -> int:
        """Rewrite the files that have rows of the prompts, and delete the old files. Return the number of deleted rows."""
        columns = [name for name in ("prompt_id", "value", "source_key") if name in get_lake_schema(spec.record_class).names]
        files, replaced, num_erased, state = [], [], 0, self.read_state(spec)
        for file in self.manifest.files.get(spec.table, ()):
            if not any(select_erased(spec, self.read_rows(file, columns), prompt_ids).to_pylist()):
                files.append(file)
                continue
            rows = self.read_rows(file)
            is_erased = select_erased(spec, rows, prompt_ids)
            erased = rows.filter(is_erased)
            state = state.remove_rows(erased)
            num_erased += len(erased)
            replaced.append(file)
            if len(erased) < len(rows):
                kept = rows.filter(compute.invert(is_erased))
                files.append(self.write_file(spec, file.run_id, file.day, kept))
        if replaced:
            self.manifest.files[spec.table] = files
            self.manifest.states[spec.table] = state
            self.commit(replaced, is_complete=self.is_complete)
        return num_erased

    def iter_data(self, spec: TopicSpec) -> Iterator[pa.Table]:
        """Yield the rows of each file. Raise CharterError if a file is not as the manifest says."""
        for file in self.manifest.files.get(spec.table, ()):
            content = self.storage.read(file.path)
            rows = parquet.read_table(pa.BufferReader(content))
            if hashlib.sha256(content).hexdigest() != file.sha256 or len(rows) != file.num_rows:
                raise CharterError(
                    f"{file.path} in {self.storage.url} was changed after the export",
                    f"its SHA-256 or its number of rows ({len(rows)}) differs from the manifest",
                    "restore the file from a copy, or export to another URL",
                )
            yield rows

    def read_rows(self, file: LakeFile, columns: Sequence[str] | None = None) -> pa.Table:
        return parquet.read_table(pa.BufferReader(self.storage.read(file.path)), columns=columns)

    def write_file(self, spec: TopicSpec, run_id: str, day: str, rows: pa.Table) -> LakeFile:
        sink = pa.BufferOutputStream()
        parquet.write_table(rows, sink, compression="zstd")
        content = sink.getvalue()
        path = f"{spec.table}/run={quote(run_id, safe='')}/day={day}/{uuid.uuid4().hex}.parquet"
        self.storage.write(path, content)
        return LakeFile(path, run_id, day, len(rows), content.size, hashlib.sha256(content).hexdigest())

    def commit(self, replaced: Sequence[LakeFile], *, is_complete: bool) -> None:
        """Write the next manifest, then delete the files and manifests that it replaces."""
        assert self.claim is not None
        self.claim.require_valid()
        self.manifest.number += 1
        self.manifest.is_complete = is_complete
        name = f"{_MANIFEST_PREFIX}{self.manifest.number:012d}-{self.claim.writer[:8]}.json"
        self.storage.write(name, json.dumps(_format_manifest(self.manifest), indent=1).encode())
        for older in [file.path for file in replaced] + [path for path in _list_manifests(self.storage) if path < name]:
            self.storage.delete(older)

    def delete_unnamed_files(self) -> None:
        """Delete the files of a killed export, which no manifest names, and older manifests."""
        named = {file.path for files in self.manifest.files.values() for file in files}
        for spec in TOPICS.values():
            for name in self.storage.list_names(spec.table):
                if name not in named:
                    self.storage.delete(name)
        incomplete = [name for name in self.storage.list_names("_charter") if name.endswith(".part")]
        for name in [*_list_manifests(self.storage)[:-1], *incomplete]:
            self.storage.delete(name)


def _group_rows(rows: pa.Table) -> dict[tuple[str, str], pa.Table]:
    """Return the rows of each run and day (UTC)."""
    indices: dict[tuple[str, str], list[int]] = {}
    days = rows["created_at"].cast(pa.date32()).to_pylist()
    for index, (run_id, day) in enumerate(zip(rows["run_id"].to_pylist(), days, strict=True)):
        assert isinstance(day, date)
        indices.setdefault((run_id, day.isoformat()), []).append(index)
    return {key: rows.take(pa.array(group)) for key, group in indices.items()}


def _select_absorbed(files: Sequence[LakeFile], num_rows: int) -> list[LakeFile]:
    """Return the small files that a new file of `num_rows` rows absorbs."""
    absorbed: list[LakeFile] = []
    num_bytes = 0
    for file in sorted(files, key=lambda file: file.num_rows):
        num_bytes += file.num_bytes
        if file.num_bytes > _SMALL_FILE_BYTES or file.num_rows > num_rows or num_bytes > _MAX_FILE_BYTES:
            break
        absorbed.append(file)
        num_rows += file.num_rows
    return absorbed


def _list_manifests(storage: LakeStorage) -> list[str]:
    return [name for name in storage.list_names("_charter") if name.startswith(_MANIFEST_PREFIX) and name.endswith(".json")]


def _read_manifest(storage: LakeStorage) -> Manifest:
    """Read the newest manifest. If there is no manifest, return an empty one. Raise CharterError if two exports wrote the same number."""
    names = _list_manifests(storage)
    if not names:
        return Manifest()
    newest = [name for name in names if name.split("-")[1] == names[-1].split("-")[1]]
    if len(newest) > 1:
        raise CharterError(
            f"{storage.url} has two newest manifests: {', '.join(newest)}",
            "two exports wrote to the lake at the same time, the second one after --take-over",
            "delete the manifest of the export that was taken over, then type the same command again",
        )
    values = json.loads(storage.read(newest[0]).to_pybytes())
    if values["format"] != _MANIFEST_VERSION:
        raise DataFolderVersionMismatch(
            f"{storage.url} was written by another version of Charter (format {values['format']}, expected {_MANIFEST_VERSION})",
            "this version cannot read its manifest",
            "use that version, or another URL",
        )
    tables = values["tables"]
    return Manifest(
        values["number"],
        values["is_complete"],
        frozenset(values["cluster_ids"]),
        {table: parse_state(content) for table, content in tables.items()},
        {table: [LakeFile(**file) for file in content["files"]] for table, content in tables.items()},
    )


def _format_manifest(manifest: Manifest) -> dict[str, Any]:
    specs = {spec.table: spec for spec in TOPICS.values()}
    tables = {
        table: {
            "columns": {column.name: str(column.type) for column in get_lake_schema(specs[table].record_class)},
            "num_rows": sum(file.num_rows for file in manifest.files.get(table, ())),
            "files": [asdict(file) for file in manifest.files.get(table, ())],
            **state.to_json(),
        }
        for table, state in manifest.states.items()
    }
    return {
        "format": _MANIFEST_VERSION,
        "number": manifest.number,
        "is_complete": manifest.is_complete,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "charter_version": charter.__version__,
        "cluster_ids": sorted(manifest.cluster_ids),
        "tables": tables,
    }
