"""A data folder whose records are published and stored without models, and what its lakes must have."""

import json
from contextlib import contextmanager
from decimal import Decimal

from charter.connect import connect_bus, open_store
from charter.lake.claims import LakeAddress
from charter.lake.export import export_lake, verify_lake
from charter.lake.storage import LakeStorage
from consumers.sink import Sink
from engine.bus.port import ProducerRecord
from engine.progress import WorkProgress
from engine.worker import to_producer_record
from tests.support.deployment import Deployment
from tests.support.records import copy_empty_database


class Killed(BaseException):
    """The end of a process. Nothing that runs after it can reach the lake."""


class LakeSource(Deployment):
    """A data folder with an embedded log and a database, and exports to lakes."""

    def add(self, *records, raw=()):
        """Publish records and raw values on the topic `prompts`, and store them."""
        settings = self.settings()
        copy_empty_database(settings.folder / "charter.duckdb")
        bus = connect_bus(settings)
        bus.publish([*map(to_producer_record, records), *(ProducerRecord("prompts", b"key", value) for value in raw)])
        sink = Sink(bus, open_store(settings), max_wait_s=0.0)
        while sink.step() or (not sink.has_reached_ends() and sink.unreached_ends):
            pass
        sink.close()
        bus.close()

    def export(self, url, take_over=False, **more):
        return export_lake(
            open_store(self.settings()), self.folder, LakeAddress(str(url), **more), WorkProgress(), take_over=take_over
        )

    def verify(self, url, **more):
        return verify_lake(open_store(self.settings()), LakeAddress(str(url), **more), WorkProgress())

    def read_rows(self, table):
        """Return the rows of a table in the database, by partition and offset, without what the lake does not have."""
        rows = open_store(self.settings()).query_dicts(f"SELECT * EXCLUDE (commit_seq) FROM raw.{table}")
        return index_rows(rows)


def index_rows(rows):
    """Return rows by their positions, as plain values. Every position must be there once."""
    ignored = {"_topic_id", "run", "day"}  # some readers add the names of the folders as columns
    plain = [{name: _to_plain(value) for name, value in row.items() if name not in ignored} for row in rows]
    indexed = {(row["_partition"], row["_offset"], row["record_id"]): row for row in plain}
    assert len(indexed) == len(plain)
    return indexed


def _to_plain(value):
    """Return a value as the same Python value for every reader. A map is a dict, a list of pairs or a list of structs."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        value = dict(value)
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()} or []
    if isinstance(value, list):
        is_map = value and all(isinstance(item, dict) and set(item) == {"key", "value"} for item in value)
        return {item["key"]: item["value"] for item in value} if is_map else [_to_plain(item) for item in value]
    if isinstance(value, Decimal):
        return int(value)
    return value if value is None or isinstance(value, bool | int | float | bytes) else str(value)


def read_newest_manifest(url):
    storage = LakeStorage(str(url))
    names = [name for name in storage.list_names("_charter") if "manifest" in name]
    return json.loads(storage.read(names[-1]).to_pybytes()) if names else {"tables": {}}


@contextmanager
def kill_at(monkeypatch, number):
    """Kill the export at its operation `number` that changes the lake (a write or a deletion). Yield the list of operations."""
    operations = []
    with monkeypatch.context() as patch:
        for method in ("write", "delete"):
            original = getattr(LakeStorage, method)

            def run(self, name, *content, method=method, original=original):
                operations.append((method, name))
                if len(operations) >= number:
                    raise Killed
                original(self, name, *content)

            patch.setattr(LakeStorage, method, run)
        yield operations


def list_data_files(url):
    storage = LakeStorage(str(url))
    return {name for name in storage.list_names("") if name.endswith(".parquet")}
