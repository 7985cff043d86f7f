"""The lake: equal to the database for every reader, under kills, with another sink, after a rebuild, and after an erasure."""

import json
import os
import shutil
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import duckdb
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as parquet
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem
from pyiceberg.catalog import load_catalog
from pyiceberg.catalog.sql import SqlCatalog

from charter.cli import describe_error
from charter.connect import connect_bus, open_store
from charter.lake import export, parquet_lake, rows
from charter.lake.claims import LakeAddress, claim_lake, list_lakes
from charter.lake.iceberg_lake import IcebergLake
from charter.lake.storage import LakeStorage
from consumers.sink import Sink
from engine.backups import create_backup
from engine.errors import (
    CharterError,
    DataFolderVersionMismatch,
    LakeBusy,
    LakeUnreachable,
    QueryTimeout,
    StoreMismatch,
    UsageError,
)
from engine.progress import WorkProgress
from engine.repair import repair_database
from schemas.topics import TOPICS
from tests.support.lake import Killed, LakeSource, index_rows, kill_at, list_data_files, read_newest_manifest
from tests.support.records import make_grades, make_judged_preference, make_prompt, make_response

FIRST_DAY = datetime(2026, 11, 23, 23, 59, tzinfo=UTC)
SECRET = "Ottoline keeps 47 peacocks."
TABLES = ("prompts", "responses", "preferences", "grades", "dead_letters")


def make_records(number, run_id="live"):
    """Return a prompt, a response, its grade and a preference, with maps, lists, bytes, and text beyond ASCII."""
    text, day = f"Schöne Frage {number}? 日本", FIRST_DAY + timedelta(days=number % 2)
    shared = {"run_id": run_id, "created_at": day}
    response = make_response(text, **shared)
    preference = make_judged_preference(str(number), text, "a", "b", 0.9, 0.7).model_copy(update=shared)
    return [make_prompt(text, **shared), response, *make_grades(response), preference]


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory):
    """Return a data folder with rows of four runs and two days, repeated records and a dead letter of the sink."""
    source = LakeSource(tmp_path_factory.mktemp("filled") / "data")
    source.add(*make_records(1), *make_records(2, "2026"), *make_records(3, "a/b c=d"), raw=[b"nonsense"])
    source.add(*make_records(1, "again"))  # the same record ids in another run
    return source.folder


@pytest.fixture
def source(filled_folder, tmp_path):
    shutil.copytree(filled_folder, tmp_path / "data")
    return LakeSource(tmp_path / "data")


def read_manifest_rows(url, table):
    """Return the rows of the files that the manifest names. A table that was not exported has no rows."""
    files = read_newest_manifest(url)["tables"].get(table, {"files": []})["files"]
    return index_rows(
        row for file in files for row in parquet.read_table(Path(url) / file["path"], partitioning=None).to_pylist()
    )


def require_equal(source, url, **more):
    result = source.verify(url, **more)
    assert (result.problems, result.num_newer) == ([], 0)
    if not more:
        assert {table: read_manifest_rows(url, table) for table in TABLES} == {
            table: source.read_rows(table) for table in TABLES
        }


def get_paths(url, table):
    return [str(Path(url) / file["path"]) for file in read_newest_manifest(url)["tables"][table]["files"]]


def test_every_reader_reads_the_rows_of_the_database(source, tmp_path):
    report = source.export(tmp_path / "lake")
    assert report.num_rows == {"prompts": 4, "responses": 4, "preferences": 4, "grades": 4, "dead_letters": 1}
    require_equal(source, tmp_path / "lake")
    for table in TABLES:
        expected, paths = source.read_rows(table), get_paths(tmp_path / "lake", table)
        cursor = duckdb.execute("SELECT * FROM read_parquet($paths)", {"paths": paths})
        names = [column[0] for column in cursor.description]
        assert index_rows(dict(zip(names, row, strict=True)) for row in cursor.fetchall()) == expected
        assert index_rows(pyarrow.dataset.dataset(paths).to_table().to_pylist()) == expected
        assert index_rows(polars.read_parquet(paths).to_dicts()) == expected
    folders = {str(Path(name).parent) for name in list_data_files(tmp_path / "lake") if name.startswith("prompts/")}
    assert folders == {
        "prompts/run=live/day=2026-11-24",
        "prompts/run=2026/day=2026-11-23",
        "prompts/run=a%2Fb%20c%3Dd/day=2026-11-24",
        "prompts/run=again/day=2026-11-24",
    }
    glob = f"SELECT run, day, count(*) FROM read_parquet('{tmp_path}/lake/prompts/**/*.parquet') GROUP BY ALL"
    assert len(duckdb.sql(glob).fetchall()) == 4


def test_iceberg_tables_have_the_rows_of_the_database(source, tmp_path):
    for _ in range(2):
        source.export(tmp_path / "lake", is_iceberg=True)
        require_equal(source, tmp_path / "lake", is_iceberg=True)
        source.add(*make_records(4, "later"))
    source.export(tmp_path / "lake", is_iceberg=True)
    assert sum(source.export(tmp_path / "lake", is_iceberg=True).num_rows.values()) == 0
    catalog = load_catalog("charter", type="sql", uri=f"sqlite:///{tmp_path}/lake/catalog.db")
    for table in TABLES:
        loaded = catalog.load_table(("charter", table))
        assert index_rows(loaded.scan().to_arrow().to_pylist()) == source.read_rows(table)
        assert [field.name for field in loaded.spec().fields] == ["run", "day"]
    prompts = catalog.load_table(("charter", "prompts"))
    assert index_rows(polars.scan_iceberg(prompts).collect().to_dicts()) == source.read_rows("prompts")
    assert len(prompts.scan("run_id = '2026'").to_arrow()) == 1
    positions = json.loads(prompts.properties["charter.state"])["positions"]
    assert sum(position["num_rows"] for position in positions) == len(source.read_rows("prompts"))
    assert all(position["topic_id"] for position in positions)


def test_export_that_is_killed_anywhere_continues(source, tmp_path, monkeypatch):
    """Kill the export at each write and deletion, and after it every reader of the manifest sees whole commits."""
    url, tables = tmp_path / "lake", ("prompts",)
    source.export(url)
    source.add(make_records(3)[0])
    shutil.copytree(url, tmp_path / "first")
    before, expected = (
        {table: read(table) for table in tables} for read in (lambda t: read_manifest_rows(url, t), source.read_rows)
    )
    killed_at, states = [], []
    for number in range(1, 1000):
        shutil.rmtree(url)
        shutil.copytree(tmp_path / "first", url)
        with kill_at(monkeypatch, number) as operations:
            try:
                source.export(url)
                break
            except Killed:
                killed_at.append(operations[number - 1])
        for table in tables:
            assert read_manifest_rows(url, table) in (before[table], expected[table])
        states.append([read_manifest_rows(url, table) == expected[table] for table in tables])
        states[-1].append(read_newest_manifest(url)["is_complete"])
        source.export(url)
        assert {table: read_manifest_rows(url, table) for table in tables} == expected
        assert list_data_files(url) == {f["path"] for t in read_newest_manifest(url)["tables"].values() for f in t["files"]}
    kinds = {(method, name.partition("/")[0] if "parquet" in name else name.partition("-")[0]) for method, name in killed_at}
    assert {(method, table) for method in ("write", "delete") for table in tables} < kinds
    assert {("write", "_charter/manifest"), ("delete", "_charter/manifest")} < kinds
    new_states = [state for number, state in enumerate(states) if state not in states[:number]]
    assert new_states == [
        [False, True],
        [True, False],
        [True, True],
    ]  # whether the row is there, and whether the export is complete
    require_equal(source, url)


def test_many_exports_make_few_files(source, tmp_path):
    for number in range(4):
        source.add(make_prompt(f"prompt {number}", created_at=FIRST_DAY))
        source.export(tmp_path / "lake")
    files = [file for file in list_data_files(tmp_path / "lake") if file.startswith("prompts/run=r/")]
    assert len(files) == 1
    require_equal(source, tmp_path / "lake")


def test_large_export_commits_in_parts_and_reads_in_pages(source, tmp_path, monkeypatch):
    """A limit of the time halves the page. The sink writes between two pages."""
    monkeypatch.setattr(export, "COMMIT_BYTES", 1)
    monkeypatch.setattr(rows, "_SELECTED_ROWS", 3)
    monkeypatch.setattr(rows, "_PAGE_BYTES", 1)
    original, sizes, added = rows._read_page, [], []

    def read_page(store, spec, snapshot, ranges, first, last):
        if spec.name == "prompts":
            sizes.append(last - first)
            if not added:
                added.append(source.add(*make_records(4)))
            if last > first:
                raise QueryTimeout("the query took longer than 2 s and was interrupted")
        return original(store, spec, snapshot, ranges, first, last)

    monkeypatch.setattr(rows, "_read_page", read_page)
    report = source.export(tmp_path / "lake")
    assert report.num_rows["prompts"] == 4 and sizes[-1] == 0 < sizes[0]
    assert source.verify(tmp_path / "lake").num_newer == 4
    assert read_newest_manifest(tmp_path / "lake")["number"] > len(TABLES)
    source.export(tmp_path / "lake")
    require_equal(source, tmp_path / "lake")


@pytest.mark.parametrize("is_iceberg", [False, True])
def test_export_continues_after_the_database_was_rebuilt(source, tmp_path, is_iceberg):
    """A rebuilt database has another commit sequence. Nothing is exported twice."""
    kind = {"is_iceberg": True} if is_iceberg else {}
    source.export(tmp_path / "lake", **kind)
    (source.folder / "charter.duckdb").unlink()
    bus, settings = connect_bus(source.settings()), source.settings()
    sink = Sink(bus, open_store(settings), max_rows=3, max_wait_s=0.0)
    sink.step()  # the sink has read a part of the log again
    sink.close()
    bus.close()
    report = source.export(tmp_path / "lake", **kind)
    assert sum(report.num_rows.values()) == 0 and any("prompts" in line for line in report.behind)
    assert source.verify(tmp_path / "lake", **kind).problems  # the database does not have all rows
    source.add(*make_records(6))
    assert source.export(tmp_path / "lake", **kind).num_rows == {"prompts": 1, "responses": 1, "grades": 1, "preferences": 1}
    assert source.verify(tmp_path / "lake", **kind).problems == []


def test_topic_that_was_created_again_has_other_positions(source, tmp_path):
    """After the log was lost, the database keeps its rows, and the records of the new log get the same offsets."""
    source.export(tmp_path / "lake")
    for path in source.folder.glob("log.sqlite*"):
        path.unlink()
    bus = connect_bus(source.settings())
    repair_database(open_store(source.settings()), bus, keep_rows=True)
    bus.close()
    source.add(*make_records(7))
    assert source.export(tmp_path / "lake").num_rows == {"prompts": 1, "responses": 1, "grades": 1, "preferences": 1}
    require_equal(source, tmp_path / "lake")
    topic_ids = {position["topic_id"] for position in read_newest_manifest(tmp_path / "lake")["tables"]["prompts"]["positions"]}
    assert len(topic_ids) == 2


def test_log_that_was_replaced_by_an_older_copy_is_refused(source, tmp_path):
    source.add(make_prompt("old"))
    shutil.copytree(source.folder, tmp_path / "copy")
    prompt_id = source.add(lost := make_prompt("lost")) or lost.prompt_id
    source.export(tmp_path / "lake")
    shutil.rmtree(source.folder)
    shutil.copytree(tmp_path / "copy", source.folder)
    source.add(lost.model_copy(update={"record_id": make_prompt("other").record_id, "prompt_id": prompt_id}))
    with pytest.raises(StoreMismatch, match="two different records of the table prompts"):
        source.export(tmp_path / "lake")


def test_rows_that_the_sink_has_read_again_are_exported_once(source, tmp_path):
    """The sink reads the log again into the same database, so the database has each position twice."""
    source.export(tmp_path / "before")
    with open_store(source.settings()).open_write_session() as connection:
        connection.execute("UPDATE raw.sink_offsets SET next_offset = 0")
    source.add(*make_records(8))
    assert len(open_store(source.settings()).query("FROM raw.prompts").rows) == 9
    for name in ("before", "new"):
        source.export(tmp_path / name)
        assert source.verify(tmp_path / name).problems == []
        assert len(read_manifest_rows(tmp_path / name, "prompts")) == 5
    with open_store(source.settings()).open_write_session() as connection:
        connection.execute("UPDATE raw.prompts SET content_mismatch = true WHERE is_duplicate")
    source.add(make_prompt("another"))
    with pytest.raises(StoreMismatch, match="two different records"):
        source.export(tmp_path / "third")


# Concurrent exports


def test_two_exports_to_one_lake_are_refused(source, tmp_path):
    url = str(tmp_path / "lake")
    storage, address = LakeStorage(url), LakeAddress(url)
    source.export(url)
    manifest = read_newest_manifest(url)
    with claim_lake(storage, source.folder, address), pytest.raises(LakeBusy, match="writes to"):
        source.export(url)
    with claim_lake(storage, tmp_path / "other", address) as other:
        source.add(make_prompt("new"))
        with pytest.raises(LakeBusy, match=r"process .* data folder .*other"):
            source.export(url)
        assert read_newest_manifest(url) == manifest and storage.list_names("_charter/claims") == [other.name]
        source.export(url, take_over=True)
        with pytest.raises(LakeBusy, match="may no longer write"):
            other.require_valid()
    require_equal(source, url)


def test_two_manifests_with_one_number_are_refused(source, tmp_path):
    source.export(tmp_path / "lake")
    (path,) = (tmp_path / "lake" / "_charter").glob("manifest-*")
    shutil.copy(path, path.with_name(f"{path.name.rpartition('-')[0]}-zz.json"))
    with pytest.raises(CharterError, match="two newest manifests"):
        source.export(tmp_path / "lake")


def test_lake_of_another_log_is_refused(source, tmp_path):
    source.export(tmp_path / "lake")
    other = LakeSource(tmp_path / "other")
    other.add(make_prompt("x"))
    for call in (other.export, other.verify):
        with pytest.raises(StoreMismatch, match="the records of another log"):
            call(tmp_path / "lake")
    assert list_lakes(other.folder) == []


def test_a_url_has_one_lake(source, tmp_path):
    with pytest.raises(UsageError, match="there is no lake"):
        source.verify(tmp_path / "lake", is_iceberg=True)
    assert not (tmp_path / "lake").exists()  # a verification writes nothing
    source.export(tmp_path / "lake")
    with pytest.raises(UsageError, match="already has another lake of") as error:
        source.export(tmp_path / "lake", is_iceberg=True)
    assert error.value.fix.endswith(f"charter export lake '{tmp_path / 'lake'}' --forget")
    source.call("export", "lake", tmp_path / "lake", "--forget")
    assert list_lakes(source.folder) == []


# Iceberg commits


def test_unknown_iceberg_commit_is_looked_up(source, tmp_path, monkeypatch):
    """The connection is lost after a commit, before a commit, and the process is killed before a commit."""
    original = SqlCatalog.commit_table

    def fail(error, *, after):
        def commit_table(catalog, table, requirements, updates):
            has_rows = any(update.action == "add-snapshot" for update in updates)
            response = original(catalog, table, requirements, updates) if after or not has_rows else None
            if has_rows:
                raise error
            return response

        monkeypatch.setattr(SqlCatalog, "commit_table", commit_table)

    url = tmp_path / "lake"
    fail(OSError("connection lost"), after=True)
    assert source.export(url, is_iceberg=True).num_rows["prompts"] == 4
    monkeypatch.setattr(SqlCatalog, "commit_table", original)
    require_equal(source, url, is_iceberg=True)
    source.add(*make_records(4))
    fail(OSError("connection lost"), after=False)
    with pytest.raises(LakeUnreachable, match="cannot commit"):
        source.export(url, is_iceberg=True)
    fail(Killed(), after=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LakeStorage, "delete", lambda *_: (_ for _ in ()).throw(Killed()))
        source.export(url, is_iceberg=True)
    monkeypatch.setattr(SqlCatalog, "commit_table", original)
    assert any("did not finish" in problem for problem in source.verify(url, is_iceberg=True).problems)
    num_files = len(list_data_files(url))
    source.export(url, is_iceberg=True)
    require_equal(source, url, is_iceberg=True)
    assert num_files == len(list_data_files(url)) - 4 + 2  # the files of the two commits that failed are deleted


def test_iceberg_commit_of_another_program_is_no_lost_update(source, tmp_path, monkeypatch):
    source.export(tmp_path / "lake", is_iceberg=True)
    source.add(*make_records(4))
    original, called = IcebergLake.commit, []

    def commit(lake, name, *arguments):
        if not called:
            called.append(name)
            load_catalog("charter", type="sql", uri=f"sqlite:///{tmp_path}/lake/catalog.db").load_table(
                ("charter", name)
            ).delete("run_id = '2026'")
        original(lake, name, *arguments)

    monkeypatch.setattr(IcebergLake, "commit", commit)
    with pytest.raises(LakeBusy, match="another program has committed"):
        source.export(tmp_path / "lake", is_iceberg=True)
    source.export(tmp_path / "lake", is_iceberg=True)
    problems = source.verify(tmp_path / "lake", is_iceberg=True).problems
    assert problems and all(problem.startswith("prompts") for problem in problems)


# Verification


def test_verify_reports_each_difference(source, tmp_path):
    url = tmp_path / "lake"
    with pytest.raises(UsageError, match="there is no lake"):
        source.verify(url)
    source.export(url)
    shutil.copytree(url, tmp_path / "good")

    def verify_after(change):
        shutil.rmtree(url)
        shutil.copytree(tmp_path / "good", url)
        (manifest,) = (url / "_charter").glob("manifest-*")
        values = json.loads(manifest.read_text())
        change(values)
        manifest.write_text(json.dumps(values))
        return "\n".join(source.verify(url).problems)

    def get_path(values):
        return url / values["tables"]["prompts"]["files"][0]["path"]

    assert verify_after(lambda values: None) == ""
    assert "was changed after the export" in verify_after(lambda values: rewrite(get_path(values)))
    assert "is missing" in verify_after(lambda values: get_path(values).unlink())
    assert "the files have 1 row, but the lake records 2 rows" in verify_after(
        lambda values: values["tables"]["prompts"]["files"].pop()
    )
    assert "did not finish" in verify_after(lambda values: values.update(is_complete=False))
    with pytest.raises(DataFolderVersionMismatch):
        verify_after(lambda values: values.update(format=99))
    verify_after(lambda values: None)
    with open_store(source.settings()).open_write_session() as connection:
        connection.execute("UPDATE raw.responses SET latency_ms = 7 WHERE run_id = 'live'")
        connection.execute("DELETE FROM raw.grades WHERE run_id = 'live'")
    problems = source.verify(url).problems
    assert any("responses" in problem and "other content" in problem for problem in problems)
    assert any("grades" in problem and "the database 1 row" in problem for problem in problems) and len(problems) == 2
    assert "differs from" in source.call("export", "lake", url, "--verify", code=1)


def rewrite(path):
    """Write a file with the same rows and another content."""
    table = pa.table({"record_id": ["x"]})
    parquet.write_table(table, path)


# Schema evolution


@pytest.mark.parametrize("is_iceberg", [False, True])
def test_files_of_an_older_version_are_read_with_defaults(source, tmp_path, monkeypatch, is_iceberg):
    """The older version had no `epoch` and no `reasoning` in a completion. Both have defaults that are not null."""
    kind = {"is_iceberg": True} if is_iceberg else {}
    current = rows.get_lake_schema

    def get_older_schema(record_class):
        fields = []
        for column in current(record_class):
            field = column
            if field.name == "completions":
                parts = [part for part in field.type.value_type if part.name != "reasoning"]
                field = pa.field("completions", pa.list_(pa.struct(parts)))
            fields += [] if field.name == "epoch" else [field]
        return pa.schema(fields)

    for module in ("rows", "parquet_lake", "iceberg_lake"):
        monkeypatch.setattr(f"charter.lake.{module}.get_lake_schema", get_older_schema)
    monkeypatch.setattr(rows, "_read_page", older_read_page(rows._read_page, current, get_older_schema))
    source.export(tmp_path / "lake", **kind)
    monkeypatch.undo()
    assert source.verify(tmp_path / "lake", **kind).problems == []
    source.add(*make_records(4))
    source.export(tmp_path / "lake", **kind)
    assert source.verify(tmp_path / "lake", **kind).problems == []
    if is_iceberg:
        table = load_catalog("charter", type="sql", uri=f"sqlite:///{tmp_path}/lake/catalog.db").load_table(
            ("charter", "responses")
        )
        assert {None, 0} == set(table.scan().to_arrow()["epoch"].to_pylist())


def older_read_page(read_page, current, get_older_schema):
    def read(store, spec, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "get_lake_schema", current)
            table = read_page(store, spec, *arguments)
        schema = get_older_schema(spec.record_class)
        return pa.Table.from_pylist(table.to_pylist(maps_as_pydicts="strict"), schema=schema)

    return read


# Erasure


def read_all_text(url):
    """Return the text of every file of a lake: the rows of Parquet files, and the bytes of all files."""
    texts = []
    for path in Path(url).rglob("*"):
        if path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
            texts += [str(parquet.read_table(path, partitioning=None).to_pylist())] if path.suffix == ".parquet" else []
    return "\n".join(texts)


@pytest.mark.parametrize("is_iceberg", [False, True])
def test_erase_rewrites_the_lake(source, tmp_path, is_iceberg):
    kind = ["--iceberg"] if is_iceberg else []
    secret = make_prompt(SECRET, run_id="live")
    source.add(secret, make_response(SECRET, run_id="live"), raw=[b"broken " + secret.prompt_id.encode()])
    source.call("export", "lake", tmp_path / "lake", *kind)
    assert SECRET in read_all_text(tmp_path / "lake")
    other_rows = source.read_rows("preferences")
    shutil.copytree(tmp_path / "lake", tmp_path / "moved")
    assert "erased 1 prompt" in source.call("erase", secret.prompt_id, "--yes")
    text = read_all_text(tmp_path / "lake")
    assert SECRET not in text and "peacocks" not in text and f"broken {secret.prompt_id}" not in text
    assert f"equals {source.folder}" in source.call("export", "lake", tmp_path / "lake", *kind, "--verify").replace(
        "/charter.duckdb", ""
    )
    assert source.read_rows("preferences") == other_rows
    # An erasure that did not reach the lake is done by the next export.
    shutil.rmtree(tmp_path / "lake")
    (tmp_path / "moved").rename(tmp_path / "lake")
    assert "erased: " in source.call("export", "lake", tmp_path / "lake", *kind)
    assert SECRET not in read_all_text(tmp_path / "lake")
    require_equal(source, tmp_path / "lake", **({"is_iceberg": True} if is_iceberg else {}))


def test_erase_never_skips_a_lake_in_silence(source, tmp_path):
    secret = make_prompt(SECRET)
    source.add(secret)
    for name in ("first", "second"):
        source.call("export", "lake", tmp_path / name)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(UsageError, match="has not reached 1 lake\n") as error:
        source.call("erase", secret.prompt_id, "--yes")
    assert "--forget" in error.value.fix
    assert SECRET not in read_all_text(tmp_path / "second")
    address = LakeAddress(str(tmp_path / "second"))
    with claim_lake(LakeStorage(address.url), tmp_path / "other", address), pytest.raises(CharterError, match="2 lakes"):
        source.call("erase", secret.prompt_id, "--yes")
    assert "removed from" in source.call("export", "lake", tmp_path / "first", "--forget")
    assert "not in" in source.call("export", "lake", tmp_path / "first", "--forget")
    assert "erased 1 prompt" in source.call("erase", secret.prompt_id, "--yes")
    create_backup(source.folder, tmp_path / "backup", source.folder, WorkProgress())
    assert list_lakes(tmp_path / "backup") == [address]  # an erasure on a restored folder reaches the lake


def test_erasure_during_an_export_reaches_the_lake(source, tmp_path, monkeypatch):
    """The erasure deletes rows of the database after the export has read them."""
    secret = make_prompt(SECRET)
    source.add(secret)
    original = rows._read_page

    def read_page(store, spec, *arguments):
        page = original(store, spec, *arguments)
        if spec.name == "prompts":
            monkeypatch.setattr(rows, "_read_page", original)
            with pytest.raises(LakeBusy, match="has not reached 1 lake"):
                source.call("erase", secret.prompt_id, "--yes")
        return page

    monkeypatch.setattr(rows, "_read_page", read_page)
    assert source.export(tmp_path / "lake").num_erased_rows == 1
    assert SECRET not in read_all_text(tmp_path / "lake")
    require_equal(source, tmp_path / "lake")


# Object stores


@pytest.fixture
def s3(monkeypatch):
    """Return the URL of a bucket on a local server of the S3 protocol."""
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    monkeypatch.setenv("CHARTER_TEST_S3", address)
    S3FileSystem(endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True).create_dir("bucket")
    yield f"s3://bucket/lakes/a?endpoint_override={address}&scheme=http&region=us-east-1"
    server.stop()


def test_lake_on_an_object_store(s3, source, monkeypatch):
    source.export(s3)
    source.add(*make_records(4))
    with kill_at(monkeypatch, 3), pytest.raises(Killed):
        source.export(s3)
    source.export(s3)
    assert source.verify(s3).problems == []
    storage = LakeStorage(s3)
    files = [file["path"] for file in read_newest_manifest(s3)["tables"]["prompts"]["files"]]
    tables = [parquet.read_table(pa.BufferReader(storage.read(path))) for path in files]
    assert index_rows(pa.concat_tables(tables).to_pylist()) == source.read_rows("prompts")
    assert storage.list_names("_charter/claims") == []
    source.call("erase", make_records(4)[0].prompt_id, "--yes")
    assert "equals" in source.call("export", "lake", s3, "--verify")
    assert len(source.read_rows("prompts")) == 4


def test_iceberg_on_an_object_store_with_a_configured_catalog(s3, source, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="needs a catalog"):
        source.export(s3, is_iceberg=True)
    config = {
        "type": "sql",
        "uri": f"sqlite:///{tmp_path}/catalog.db",
        "s3.endpoint": f"http://{os.environ['CHARTER_TEST_S3']}",
    }
    config |= {"s3.region": "us-east-1", "s3.access-key-id": "k", "s3.secret-access-key": "s"}
    (tmp_path / ".pyiceberg.yaml").write_text(json.dumps({"catalog": {"company": config}}))
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG.config", {"catalog": {"company": config}})
    kind = ["--catalog", "company", "--namespace", "charter_live"]
    source.call("export", "lake", s3, *kind)
    for command in ([], ["--verify"]):
        other = s3.replace("lakes/a", "lakes/b")
        source.fails(UsageError, "live.+ is not in s3://bucket/lakes/b", "export", "lake", other, *kind, *command)
    source.call("erase", make_records(1)[0].prompt_id, "--yes")  # it reaches the only lake that is in the list
    assert "equals" in source.call("export", "lake", s3, *kind, "--verify")
    table = load_catalog("company").load_table(("charter_live", "prompts"))
    assert table.location() == "s3://bucket/lakes/a/prompts"
    assert index_rows(table.scan().to_arrow().to_pylist()) == source.read_rows("prompts")


def test_wrong_urls_and_unreachable_stores(source, monkeypatch):
    with pytest.raises(UsageError, match="is not the URL of a lake"):
        source.export("ftp://x/y")
    options = {"endpoint_override": "127.0.0.1:1", "scheme": "http", "region": "us-east-1", "anonymous": True}
    filesystem = S3FileSystem(**options, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1))
    monkeypatch.setattr("charter.lake.storage.FileSystem", SimpleNamespace(from_uri=lambda _: (filesystem, "bucket/x")))
    with pytest.raises(LakeUnreachable, match="cannot write"):
        source.export("s3://bucket/x")


def test_missing_package_names_the_extra():
    what, _, fix = describe_error(ModuleNotFoundError("x", name="pyiceberg.catalog"))
    assert "pyiceberg.catalog" in what and "[lake]" in fix


def test_manifest_lists_columns_ranges_and_hashes(source, tmp_path):
    source.call("export", "lake", tmp_path / "lake")
    manifest = read_newest_manifest(tmp_path / "lake")
    assert manifest["is_complete"] and manifest["format"] == parquet_lake._MANIFEST_VERSION
    prompts = manifest["tables"]["prompts"]
    assert prompts["columns"]["_topic_id"] == "string" and prompts["num_rows"] == 4
    bus = connect_bus(source.settings())
    topic_ids = bus.topic_ids(list(TOPICS))
    assert {(position["topic_id"], position["next_offset"]) for position in prompts["positions"]} <= {
        (topic_ids["prompts"], end) for end in bus.end_offsets(["prompts"]).values()
    }
    bus.close()


# Kafka


@pytest.mark.kafka
def test_lakes_of_a_kafka_log(tmp_path, kafka_address, monkeypatch):
    """Each transaction on Kafka ends with a marker, so offsets have gaps. The ranges of a lake contain the markers."""
    source = LakeSource(tmp_path / "data", kafka_address, f"l{uuid.uuid4().hex[:8]}.")
    source.flags["bus.partitions"] = "2"
    texts = [f"How do I repair shelf {number}?" for number in range(4)]
    for some in (texts[:1], texts[1:]):
        source.publish(*some)
    source.add(raw=[b"nonsense"])
    with kill_at(monkeypatch, 6), pytest.raises(Killed):
        source.export(tmp_path / "lake")
    assert not read_newest_manifest(tmp_path / "lake")["is_complete"]
    for url, flags in ((tmp_path / "lake", []), (tmp_path / "iceberg", ["--iceberg"])):
        source.call("export", "lake", url, *flags)
        assert "equals" in source.call("export", "lake", url, *flags, "--verify")
    manifest = read_newest_manifest(tmp_path / "lake")
    assert manifest["is_complete"] and read_manifest_rows(tmp_path / "lake", "prompts") == source.read_rows("prompts")
    catalog = load_catalog("charter", type="sql", uri=f"sqlite:///{tmp_path}/iceberg/catalog.db")
    state = json.loads(catalog.load_table(("charter", "prompts")).properties["charter.state"])
    bus = connect_bus(source.settings())
    (topic_id,) = bus.topic_ids(["prompts"]).values()
    ends = {part: end for part, end in bus.end_offsets(["prompts"]).items() if end}
    bus.close()
    for positions in (manifest["tables"]["prompts"]["positions"], state["positions"]):
        assert {position["topic_id"] for position in positions} == {topic_id}
        assert {(part["topic"], part["partition"]): part["next_offset"] for part in positions} == ends
        assert sum(position["num_rows"] for position in positions) == len(texts) < sum(ends.values()) - 1
