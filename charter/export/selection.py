"""Define which records an export selects, and collect statistics about the files that it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class ExportSelection:
    """Selects records up to a commit sequence number.

    `run_id` limits the selection to one run. `sources` limits the selection to some prompt sources.
    If an earlier run made a record with the same id, the record belongs to both runs.
    """

    run_id: str | None = None
    sources: tuple[str, ...] = ()
    max_commit_seq: int = -1

    @property
    def where_clause(self) -> str:
        parts = ["commit_seq <= $upto"]
        parts += ["record_id IN (SELECT record_id FROM run_records WHERE run_id = $run)"] if self.run_id else []
        parts += ["list_contains($sources::VARCHAR[], source)"] if self.sources else []
        return " AND ".join(parts)

    @property
    def parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {"upto": self.max_commit_seq}
        if self.run_id:
            parameters["run"] = self.run_id
        if self.sources:
            parameters["sources"] = list(self.sources)
        return parameters


@dataclass
class SplitStats:
    """Collects statistics about the rows of one file."""

    num_rows: int = 0
    rows_by_source: dict[tuple[str, str], int] = field(
        default_factory=dict
    )  # maps (source, label_source) to the number of rows
    policy_versions: set[int | None] = field(default_factory=set)
    constitutions: set[tuple[str, str]] = field(default_factory=set)  # (name and version, hash)
    run_ids: set[str] = field(default_factory=set)
    first_created_at: datetime | None = None
    last_created_at: datetime | None = None

    def add_row(self, row: dict[str, Any]) -> None:
        self.num_rows += 1
        source = (row["source"], row["label_source"])
        self.rows_by_source[source] = self.rows_by_source.get(source, 0) + 1
        self.policy_versions.add(row["policy_version"])
        self.constitutions |= {(row["constitution"], row["constitution_hash"])} if row["constitution"] else set()
        self.run_ids.add(row["run_id"])
        self.first_created_at = min(self.first_created_at or row["created_at"], row["created_at"])
        self.last_created_at = max(self.last_created_at or row["created_at"], row["created_at"])
