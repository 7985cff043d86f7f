"""A lake of Apache Iceberg tables, written with PyIceberg (extra `lake`).

Each table of the database is an Iceberg table, partitioned by run and day. One Iceberg transaction adds the rows and sets the
position of the lake as the table property `charter.state`, so both are there or neither.

If the outcome of a commit is unknown, for example because the connection was lost, the table is loaded again. The property
`charter.commit-id` shows whether the commit is there. PyIceberg's own retries are off, because a retry on top of the commit of
another export would add rows twice. A commit requires that the snapshot of the table is the one whose state was read, so of two
exports at the same time one fails.

The column statistics of text columns are off, because they would contain text that an erasure cannot reach in other snapshots.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from charter.lake.claims import LakeAddress, LakeClaim
from charter.lake.positions import TableState, parse_state
from charter.lake.rows import get_lake_schema, select_erased
from charter.lake.storage import LakeStorage
from engine.errors import LakeBusy, LakeUnreachable, UsageError
from schemas.topics import TOPICS, TopicSpec

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table, Transaction

_CATALOG_FILE = "catalog.db"
_STATE = "charter.state"
_COMMIT_ID = "charter.commit-id"
_CLUSTER_IDS = "charter.cluster-ids"
_IS_COMPLETE = "charter.is-complete"
_TABLE_PROPERTIES = {
    "commit.retry.num-retries": "0",
    "write.metadata.metrics.default": "counts",
    "write.metadata.metrics.column.created_at": "full",
    "write.metadata.metrics.column._offset": "full",
    "write.parquet.compression-codec": "zstd",
}


def _open_catalog(storage: LakeStorage, address: LakeAddress, *, create: bool) -> Catalog:
    """Open the catalog that PyIceberg's configuration names, or the SQLite catalog in a local folder.

    If `create` is false and the folder has no catalog, raise UsageError.
    """
    from pyiceberg.catalog import load_catalog

    if address.catalog:
        return load_catalog(address.catalog)
    if not storage.is_local:
        raise UsageError(
            f"{address.url} needs a catalog",
            "an Iceberg catalog on an object store is a service or a database; only a local folder has its own catalog",
            "name a catalog of PyIceberg's configuration: --catalog NAME    (docs/export.md)",
        )
    if not create and not Path(storage.base, _CATALOG_FILE).exists():
        raise UsageError(f"there is no lake at {address.url}", f"it has no {_CATALOG_FILE}", f"type: {address.make_command()}")
    if create:
        storage.write("_charter/README", b"catalog.db is the SQLite catalog of the Iceberg tables in this folder.\n")
    return load_catalog("charter", type="sql", uri=f"sqlite:///{storage.base}/{_CATALOG_FILE}", warehouse=storage.location)


class IcebergLake:
    """Reads and writes a lake of Iceberg tables."""

    def __init__(self, storage: LakeStorage, address: LakeAddress, claim: LakeClaim | None = None) -> None:
        """Load the tables. Without a claim, the lake can only be read."""
        self.storage, self.address, self.claim = storage, address, claim
        self.catalog = self.call("open the catalog", lambda: _open_catalog(storage, address, create=claim is not None))
        self.tables: dict[str, Table] = {}
        self.is_complete = False
        self.call("read the catalog", self.load_tables)
        if claim and claim.was_interrupted:
            for name in self.tables:
                self.delete_unreferenced(name)

    def load_tables(self) -> None:
        namespace = (self.address.namespace,)
        if self.catalog.namespace_exists(namespace):
            self.is_complete = self.catalog.load_namespace_properties(namespace).get(_IS_COMPLETE) == "true"
            known = {spec.table for spec in TOPICS.values()}
            names = [name for *_, name in self.catalog.list_tables(namespace) if name in known]
            self.tables = {name: self.catalog.load_table((*namespace, name)) for name in names}
        for name, table in self.tables.items():
            if table.location() != self.get_location(name):
                raise UsageError(
                    f"the Iceberg table {self.address.namespace}.{name} is not in {self.address.url}",
                    f"the catalog has it at {table.location()}",
                    "give the URL with which the tables were made, or another namespace: --namespace NAME",
                )

    def get_location(self, name: str) -> str:
        """Return the URL of the folder of a table."""
        return f"{self.storage.location}/{name}"

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Call the catalog. Raise LakeUnreachable if it fails."""
        try:
            return function()
        except _list_catalog_errors() as error:
            raise self.make_unreachable_error(what, error) from error

    def make_unreachable_error(self, what: str, error: BaseException) -> LakeUnreachable:
        return LakeUnreachable(
            f"cannot {what} of the Iceberg lake {self.address.url}",
            f"{type(error).__name__}: {error}",
            "check the catalog, the network and the credentials, then type the same command again",
        )

    @property
    def exists(self) -> bool:
        return bool(self.tables)

    def mark_complete(self, is_complete: bool) -> None:
        """Note in the namespace whether the last export is complete."""
        if self.is_complete != is_complete:
            updates = {_IS_COMPLETE: str(is_complete).lower()}
            self.call(
                "update the namespace",
                lambda: self.catalog.update_namespace_properties((self.address.namespace,), updates=updates),
            )
            self.is_complete = is_complete

    @property
    def cluster_ids(self) -> frozenset[str]:
        ids = [json.loads(table.properties.get(_CLUSTER_IDS, "[]")) for table in self.tables.values()]
        return frozenset(cluster_id for table_ids in ids for cluster_id in table_ids)

    def read_state(self, spec: TopicSpec) -> TableState:
        table = self.tables.get(spec.table)
        return parse_state(json.loads(table.properties[_STATE])) if table and _STATE in table.properties else TableState()

    def append(self, spec: TopicSpec, rows: pa.Table, state: TableState, cluster_ids: frozenset[str]) -> int:
        """Add rows and set the state of the table, in one transaction. Return the number of files written."""
        self.prepare_table(spec)
        self.mark_complete(False)
        self.commit(spec.table, lambda transaction: transaction.append(rows), state, cluster_ids)
        snapshot = self.tables[spec.table].current_snapshot()
        return int(snapshot.summary["added-data-files"]) if snapshot and snapshot.summary else 0

    def finish(self, states: dict[str, TableState], cluster_ids: frozenset[str]) -> None:
        """Set the states of tables without new rows, and note that the export is complete."""
        for spec in TOPICS.values():
            state = states.get(spec.table)
            if state and state.positions and state != self.read_state(spec):
                self.prepare_table(spec)
                self.commit(spec.table, None, state, cluster_ids)
        if self.tables:
            self.mark_complete(True)

    def prepare_table(self, spec: TopicSpec) -> Table:
        """Return the table, with the columns of the current record class. Create it if it does not exist."""
        if spec.table not in self.tables:
            self.tables[spec.table] = self.call("create a table", lambda: self.create_table(spec))
        table = self.tables[spec.table]
        self.call("update a table", lambda: _update_schema(table, get_lake_schema(spec.record_class)))
        return table

    def create_table(self, spec: TopicSpec) -> Table:
        from pyiceberg.transforms import DayTransform, IdentityTransform

        self.catalog.create_namespace_if_not_exists((self.address.namespace,))
        transaction = self.catalog.create_table_transaction(
            (self.address.namespace, spec.table),
            get_lake_schema(spec.record_class),
            location=self.get_location(spec.table),
            properties=_TABLE_PROPERTIES,
        )
        with transaction, transaction.update_spec() as partitions:
            partitions.add_field("run_id", IdentityTransform(), "run")
            partitions.add_field("created_at", DayTransform(), "day")
        return self.catalog.load_table((self.address.namespace, spec.table))

    def commit(
        self,
        name: str,
        change: Callable[[Transaction], object] | None,
        state: TableState,
        cluster_ids: frozenset[str],
    ) -> None:
        """Commit a change of the rows together with the state. If the outcome is unknown, load the table and look."""
        from pyiceberg.exceptions import CommitFailedException

        assert self.claim is not None
        self.claim.require_valid()
        table, commit_id = self.tables[name], uuid.uuid4().hex
        known = json.loads(table.properties.get(_CLUSTER_IDS, "[]"))
        properties = {
            _STATE: json.dumps(state.to_json()),
            _COMMIT_ID: commit_id,
            _CLUSTER_IDS: json.dumps(sorted({*known, *cluster_ids})),
        }
        try:
            transaction = table.transaction()
            if change:
                change(transaction)
            transaction.set_properties(properties)
            transaction.commit_transaction()
        except CommitFailedException as error:
            raise LakeBusy(
                f"another program has committed to the Iceberg table {self.address.namespace}.{name}",
                f"{error}; nothing was added",
                "type the same command again; it continues after the rows that the lake has",
            ) from error
        except _list_catalog_errors() as error:
            self.tables[name] = self.call(
                "find out whether the last commit is there, because a table",
                lambda: self.catalog.load_table((self.address.namespace, name)),
            )
            if self.tables[name].properties.get(_COMMIT_ID) != commit_id:
                raise self.make_unreachable_error("commit to a table", error) from error

    def erase(self, spec: TopicSpec, prompt_ids: Sequence[str]) -> int:
        """Delete the rows of the prompts, all earlier snapshots, and their files. Return the number of deleted rows."""
        from pyiceberg.expressions import In

        if spec.table not in self.tables:
            return 0
        erased = [rows.filter(select_erased(spec, rows, prompt_ids)) for rows in self.iter_data(spec)]
        erased = [rows for rows in erased if len(rows)]
        if erased:
            state = self.read_state(spec)
            for rows in erased:
                state = state.remove_rows(rows)
            record_ids = sorted({record_id for rows in erased for record_id in rows["record_id"].to_pylist()})

            def delete(transaction: Transaction) -> None:
                transaction.delete(In("record_id", record_ids))

            self.commit(spec.table, delete, state, frozenset())
        # Also without rows: an erasure that was interrupted can have left the files.
        self.call("expire the snapshots", lambda: self.expire_snapshots(spec.table))
        self.delete_unreferenced(spec.table)
        return sum(map(len, erased))

    def expire_snapshots(self, name: str) -> None:
        table = self.tables[name]
        current = table.metadata.current_snapshot_id
        if older := [snapshot.snapshot_id for snapshot in table.metadata.snapshots if snapshot.snapshot_id != current]:
            table.maintenance.expire_snapshots().by_ids(older).commit()

    def delete_unreferenced(self, name: str) -> None:
        """Delete the data files and manifests that no snapshot names. The metadata files contain no rows and stay."""
        table = self.tables[name]
        referenced = set[str]()
        for snapshot in table.metadata.snapshots:
            referenced.add(snapshot.manifest_list)
            for manifest in snapshot.manifests(table.io):
                referenced.add(manifest.manifest_path)
                referenced |= {entry.data_file.file_path for entry in manifest.fetch_manifest_entry(table.io)}
        location = self.storage.location
        for path in self.storage.list_names(name):
            if f"{location}/{path}" not in referenced and not path.endswith(".metadata.json"):
                self.storage.delete(path)

    def iter_data(self, spec: TopicSpec) -> Iterator[pa.Table]:
        """Yield the rows of each file of the current snapshot, with the columns of the file."""
        if spec.table not in self.tables:
            return
        table = self.tables[spec.table]
        for task in self.call("read the files", lambda: list(table.scan().plan_files())):
            yield self.call("read a file", partial(_read_file, table, task.file.file_path))


def _read_file(table: Table, path: str) -> pa.Table:
    with table.io.new_input(path).open() as file:
        return parquet.read_table(pa.BufferReader(file.read()))


def _update_schema(table: Table, schema: pa.Schema) -> None:
    """Add the columns of new fields of the record class."""
    with table.update_schema() as update:
        update.union_by_name(schema)


def _list_catalog_errors() -> tuple[type[Exception], ...]:
    """Return the errors after which the outcome of a call to a catalog is unknown."""
    from pyiceberg.exceptions import CommitStateUnknownException, RESTError
    from sqlalchemy.exc import SQLAlchemyError

    return (CommitStateUnknownException, RESTError, SQLAlchemyError, OSError)
