"""How far the stages and the sink are behind on the log, looked up beside the requests.

The log can be slow to answer, or away, and no page waits for it: a thread of its own looks every two seconds while somebody
watches, and a page shows what was found last.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CharterError

if TYPE_CHECKING:
    from charter.dashboard.query_cache import QueryCache
    from engine.bus.port import Bus, Offsets
    from engine.settings import Settings

_POLL_INTERVAL_S = 2.0
_IDLE_TIMEOUT_S = 15.0  # after the last page that asked
_FIRST_RESULT_TIMEOUT_S = 0.25


@dataclass
class LagMonitor:
    """Looks at the log of `settings` for one run at a time, the one that was asked for last."""

    settings: Settings
    query_cache: QueryCache
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    run_id: str = ""
    last_requested_at: float = 0.0
    wake_event: threading.Event = field(default_factory=threading.Event)
    result_event: threading.Event = field(default_factory=threading.Event)
    stop_requested: bool = False
    thread: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get_lags(self, run_id: str) -> dict[str, Any]:
        """{rows, trouble}: what was found last for this run. The first answer may still be on its way: rows is None then."""
        with self.lock:
            self.run_id, self.last_requested_at = run_id, time.monotonic()
            if self.thread is None:
                self.thread = threading.Thread(target=self.poll_until_stopped, name="log-watch", daemon=True)
                self.thread.start()
        if run_id not in self.results:
            self.result_event.clear()
            self.wake_event.set()
            self.result_event.wait(_FIRST_RESULT_TIMEOUT_S)
        return self.results.get(run_id, {"rows": None, "trouble": None})

    def poll_until_stopped(self) -> None:
        bus: Bus | None = None
        while not self.stop_requested:
            rows = trouble = None
            if time.monotonic() - self.last_requested_at < _IDLE_TIMEOUT_S:
                run_id = self.run_id
                try:
                    bus = bus or self.open_bus()
                    rows = _load_lag_rows(bus, self.settings, self.query_cache, run_id)
                except CharterError as error:
                    trouble = [error.what, error.why, error.fix]
                self.results = {run_id: {"rows": rows, "trouble": trouble}}
                self.result_event.set()
            if bus and rows is None:  # it is away, or nobody watches
                bus.close()
                bus = None
            self.wake_event.wait(_POLL_INTERVAL_S)
            self.wake_event.clear()
        if bus:
            bus.close()

    def open_bus(self) -> Bus:
        """The log as it is. A look never makes one."""
        from charter.connect import open_bus_from_settings
        from engine.bus import KAFKA_SCHEME
        from engine.bus.embedded import LOG_FILENAME
        from engine.errors import BusUnreachable

        address = self.settings.bus_address
        if not address.startswith(KAFKA_SCHEME) and not (Path(address) / LOG_FILENAME).exists():
            raise BusUnreachable(
                f"there is no log in {address} yet",
                "produce and the stages make it",
                "type: charter produce FILE, then charter run",
            )
        return open_bus_from_settings(self.settings)

    def close(self) -> None:
        self.stop_requested = True
        self.wake_event.set()
        if self.thread:
            self.thread.join(timeout=_POLL_INTERVAL_S)


def _load_lag_rows(bus: Bus, settings: Settings, query_cache: QueryCache, run_id: str) -> list[dict[str, Any]]:
    """For each reader and topic: messages behind, and the age of the oldest of them in seconds."""
    from charter.lag import compute_lag_rows, get_stage_inputs
    from schemas.topics import TOPICS

    there = bus.topic_ids(list(TOPICS))
    rows: list[tuple[Any, ...]] = []
    for stage, names in get_stage_inputs(settings.judge.pairing).items():
        known = [name for name in names if name in there]
        rows += compute_lag_rows(bus, stage, known, bus.committed(f"{run_id}.{stage}", known)) if known else []
    stands = _load_sink_offsets(query_cache, bus.cluster_id)
    if stands is not None:
        rows += compute_lag_rows(bus, "sink", [name for name in TOPICS if name in there], stands)
    names = ("reader", "topic", "committed", "end", "behind", "seconds")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _load_sink_offsets(query_cache: QueryCache, cluster_id: str) -> Offsets | None:
    """How far the sink of this database has come with this log; None when the database cannot tell."""
    from engine.bus.port import TopicPartition

    sql = "SELECT topic, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
    data = query_cache.get_or_run(("sink", cluster_id), lambda ask: {"rows": ask(sql, [cluster_id]).rows}).data
    return None if data is None else {TopicPartition(topic, place): offset for topic, place, offset in data["rows"]}
