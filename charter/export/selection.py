"""Define which records an export selects, and collect statistics about the files that it writes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# A label with a margin below this value is nearly a tie. Its hard version (KTO, or chosen and rejected) is almost arbitrary.
UNCERTAIN_MARGIN = 0.1
_MARGIN_TOLERANCE = 1e-9  # 0.6 - 0.5 is smaller than 0.1


@dataclass(frozen=True)
class ExportSelection:
    """Selects records up to a commit sequence number.

    `run_id` limits the selection to one run. `sources` limits the selection to some prompt sources.
    If an earlier run made a record with the same id, the record belongs to both runs.
    `min_margin` is the smallest margin of an exported label. The margin is |p - 0.5|, where p is the probability that one of the
    responses is better. With `excludes_flips`, labels that flip with the order of the responses are not exported.
    """

    run_id: str | None = None
    sources: tuple[str, ...] = ()
    min_margin: float = 0.0
    excludes_flips: bool = False
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
    """Collects statistics about the rows of one file.

    `margins` has the margin of each exported label. `num_both_orders` labels were judged in both orders, and in `num_flips` of
    these the judge preferred the same position in both orders. `num_below_margin` labels and `num_flips_left_out` labels were left
    out.
    """

    num_rows: int = 0
    content_hash: str = ""  # the SHA-256 of the file; empty if there is no file
    margins: array[float] = field(default_factory=lambda: array("d"))
    num_below_margin: int = 0
    num_both_orders: int = 0
    num_flips: int = 0
    num_flips_left_out: int = 0
    rows_by_source: dict[tuple[str, str], int] = field(
        default_factory=dict
    )  # maps (source, label_source) to the number of rows
    policy_versions: set[int | None] = field(default_factory=set)
    constitutions: set[tuple[str, str]] = field(default_factory=set)  # (name and version, hash)
    run_ids: set[str] = field(default_factory=set)
    first_created_at: datetime | None = None
    last_created_at: datetime | None = None

    @property
    def num_uncertain(self) -> int:
        """The number of exported labels that are nearly ties."""
        return sum(margin < UNCERTAIN_MARGIN - _MARGIN_TOLERANCE for margin in self.margins)

    def count_margins(self, largest: float) -> int:
        """Return the number of exported labels whose margin is at most `largest`."""
        return sum(margin <= largest + _MARGIN_TOLERANCE for margin in self.margins)

    def add_label(self, row: dict[str, Any], selection: ExportSelection) -> bool:
        """Count a label. Return whether the selection exports it. A tie is not counted."""
        min_margin, margin = selection.min_margin, abs(row["p_a"] - 0.5)
        if margin and selection.excludes_flips and row["position_flip"]:
            self.num_flips_left_out += 1
            return False
        if 0.0 < margin < min_margin - _MARGIN_TOLERANCE:
            self.num_below_margin += 1
            return False
        if margin:
            self.margins.append(margin)
            self.num_both_orders += row["p_forward"] is not None and row["p_backward"] is not None
            self.num_flips += bool(row["position_flip"])
        return True

    def add_row(self, row: dict[str, Any]) -> None:
        self.num_rows += 1
        source = (row["source"], row["label_source"])
        self.rows_by_source[source] = self.rows_by_source.get(source, 0) + 1
        self.policy_versions.add(row["policy_version"])
        self.constitutions |= {(row["constitution"], row["constitution_hash"])} if row["constitution"] else set()
        self.run_ids.add(row["run_id"])
        self.first_created_at = min(self.first_created_at or row["created_at"], row["created_at"])
        self.last_created_at = max(self.last_created_at or row["created_at"], row["created_at"])
