"""Load the pair that a person labels next, and publish the label. `charter label` uses the same functions (charter/labels.py).

A label is in the database only after the sink has read it. The ids of labeled pairs are therefore kept until then, so that a pair
is not shown twice.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from charter.connect import connect_bus
from charter.labels import (
    PairFilter,
    find_pair,
    get_displayed_responses,
    load_open_pairs,
    load_progress,
    make_human_label,
    parse_key,
    parse_labeler,
    publish_label,
    read_pending_pair_ids,
)
from engine.errors import UsageError
from engine.settings import Settings
from engine.store import QueryFunction, Store
from schemas.records import Preference

_MAX_SKIP = 1_000_000


@dataclass
class PendingLabels:
    """The ids of the pairs whose human labels are on the log, but not in the database yet. It is thread-safe."""

    settings: Settings
    store: Store
    _pair_ids: set[str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> set[str]:
        """Return the ids. The first call reads them from the log."""
        with self._lock:
            if self._pair_ids is None:
                self.store.query("SELECT 1")  # without a database, raise the error before the log is created
                bus = connect_bus(self.settings)
                try:
                    self._pair_ids = read_pending_pair_ids(self.store, bus)
                finally:
                    bus.close()
            return set(self._pair_ids)

    def publish(self, record: Preference) -> None:
        """Publish a label, and remember its pair."""
        bus = connect_bus(self.settings)
        try:
            publish_label(bus, record)
        finally:
            bus.close()
        with self._lock:
            self._pair_ids = (self._pair_ids or set()) | set(record.parent_ids)


def parse_skip(text: str) -> int:
    """Return the number of pairs that a person skips. Raise UsageError if the text is not a number."""
    if text.isdecimal() and int(text) <= _MAX_SKIP:
        return int(text)
    raise UsageError(f"skip={text[:40]} is not a number of pairs", "it must be a whole number", "open the first pair: /labels")


def load_labeling(query: QueryFunction, run: str, skip: int, identifier: str, pending: set[str]) -> dict[str, Any]:
    """Return a pair, with its responses in the displayed order, and the progress.

    The pair is the one with the id `identifier`, or the next pair without a label. `pair` is None if no pair is left.
    """
    pairs = PairFilter(run=run or None)
    rows = [find_pair(query, identifier)] if identifier else load_open_pairs(query, pairs, 1, skip=skip, pending=pending)
    progress = load_progress(query, pairs, pending)
    return {
        "pair": _select_shown_columns(rows[0]) if rows else None,
        "num_labeled": progress.num_labeled,
        "num_pairs": progress.num_pairs,
        "num_incomparable": progress.num_incomparable,
        "num_pending": _count_pending(query, pending),
        "skip": skip,
    }


def _select_shown_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a person may see. The label of the judge, and which response is A, would influence the person."""
    shown = {name: row[name] for name in ("record_id", "prompt_id", "messages", "principle_id", "questions", "source")}
    return shown | {"responses": list(get_displayed_responses(row))}


def _count_pending(query: QueryFunction, pending: set[str]) -> int:
    sql = """SELECT count(*) FROM preferences WHERE label_source = 'HUMAN' AND parent_ids[1] IN (SELECT unnest($pending::UUID[]))"""
    ((num_archived,),) = query(sql, {"pending": sorted(pending)}).rows
    return max(0, len(pending) - int(num_archived))


def make_label(query: QueryFunction, form: Mapping[str, str]) -> Preference:
    """Return the record of a label from the form of the page. Raise UsageError if the form is not a label."""
    labeler = parse_labeler(form.get("labeler", ""))
    row = find_pair(query, form.get("id", ""))
    return make_human_label(row, parse_key(form.get("key", ""), str(row["record_id"])), labeler)
