"""Find the rows of the database that a phase has consumed.

Normally, a phase has consumed the rows up to its cursors (see `trainer.batches`). A cursor is a commit sequence number, and the
number is valid only while the database keeps its rows (`engine.commit_history`). If the database lost rows, or was rebuilt from
the log, its sink numbers the rows again. The rows of a batch with an invalid cursor are then found by the ids that its manifest
lists. No row is therefore trained twice, and no row is skipped.

A database that is being rebuilt lacks rows that decide what may be trained: held-out prompts, erasures, and the labels that
trained the reward model. The trainer therefore waits until the sink has read the log again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.commit_history import CommitHistory, read_commit_history, require_same_log
from engine.errors import StoreIncomplete
from engine.store import Store
from schemas.records import BatchManifest
from trainer.state import TrainingState

ALL_SOURCES = ""
QUERY_TIMEOUT_S = 60.0  # longer than the default of the store, because a batch may scan large tables


@dataclass(frozen=True)
class ConsumedRows:
    """The rows that a phase has consumed, as positions in one database.

    These are the rows of each source up to the source's cursor, and the rows of the batches `moved_batch_ids`, whose rows have
    new commit sequence numbers. The cursor of `ALL_SOURCES` holds for every source. It is -1 before the first batch.
    `session_id` is the newest session of the sink.
    """

    cursors: Mapping[str, int]
    moved_batch_ids: Sequence[str]
    session_id: str | None

    def get_cursor(self, source: str = ALL_SOURCES) -> int:
        """Return the commit up to which the phase has consumed the rows of a source."""
        return max(self.cursors.get(source, -1), self.cursors.get(ALL_SOURCES, -1))


def find_consumed_rows(store: Store, phase: str, state: TrainingState) -> ConsumedRows:
    """Return the rows that a phase has consumed. Raise the errors of `read_complete_history`."""
    history = read_complete_history(store, state)
    return compute_consumed_rows(history, [manifest for manifest in state.trained_batches if manifest.phase == phase])


def compute_consumed_rows(history: CommitHistory, manifests: Sequence[BatchManifest]) -> ConsumedRows:
    """Return the rows of these batches, which led to updates of one phase."""
    cursors: dict[str, int] = {}
    moved_batch_ids = []
    for manifest in manifests:
        if not _is_valid(manifest, history):
            moved_batch_ids.append(manifest.record_id)
            continue
        for source, commit_seq in (manifest.cursors or {ALL_SOURCES: manifest.commit_seq_to}).items():
            cursors[source] = max(cursors.get(source, -1), commit_seq)
    return ConsumedRows(cursors, moved_batch_ids, history.session_id)


def read_complete_history(store: Store, state: TrainingState) -> CommitHistory:
    """Return the history of the database.

    Raise StoreMismatch if the database belongs to another log. Raise StoreIncomplete if the sink has not read the whole log once,
    or if the rows of a batch were numbered again and the sink has not read the whole log since then.
    """
    history = read_commit_history(store)
    if state.cluster_id is not None:
        require_same_log(history.cluster_ids, state.cluster_id, store.path)
    moved = find_moved_batches(history, state)
    complete_seq = -1 if history.complete_seq is None else history.complete_seq
    sql = "SELECT count(*) FROM batches WHERE record_id IN (SELECT unnest(?::UUID[])) AND commit_seq < ?"
    found = store.query(sql, [[manifest.record_id for manifest in moved], complete_seq]).rows[0][0] if moved else 0
    if history.complete_seq is None or found < len(moved):
        why = "the sink has not read the whole log yet"
        if moved:
            why = f"the database lost rows, and the sink reads them again: {found} of {len(moved)} earlier batches are restored"
        raise StoreIncomplete(f"{store.path} does not have all records of the log yet", why, "type: charter run --stage sink")
    return history


def find_moved_batches(history: CommitHistory, state: TrainingState) -> list[BatchManifest]:
    """Return the batches whose rows have other commit sequence numbers than when the batch was sampled."""
    return [manifest for manifest in state.manifests if not _is_valid(manifest, history)]


def count_further_rows(rows: Sequence[Any], voided: Sequence[BatchManifest], history: CommitHistory) -> int:
    """Return the total weight of the rows (`RowRef`) that were not available to the newest of the voided batches.

    If the rows of a voided batch were numbered again, only the rows that the manifest lists are known to have been available.
    """
    last_commit = max((manifest.commit_seq_to for manifest in voided if _is_valid(manifest, history)), default=-1)
    moved_ids = {row_id for manifest in voided if not _is_valid(manifest, history) for row_id in manifest.record_ids}
    return sum(row.weight for row in rows if row.commit_seq > last_commit and row.row_id not in moved_ids)


def _is_valid(manifest: BatchManifest, history: CommitHistory) -> bool:
    return history.is_valid(manifest.sink_session, manifest.commit_seq_to)
