"""Measure the consumer lag of the stages and the sink in the background, and find out which workers run.

The event log can be slow or unreachable, so pages do not read it. While pages are open, a background thread measures the lag
every two seconds. A page shows the last result.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charter.activity import list_held_stages, list_workers
from charter.connect import open_bus_from_settings
from charter.dashboard.query_cache import QueryCache
from charter.dashboard.rendering import error_to_dict
from charter.lag import SINK_OFFSETS_SQL, compute_lag_rows, read_positions, select_sink_offsets
from charter.stages import get_stage_inputs
from engine.bus import KAFKA_SCHEME
from engine.bus.embedded import LOG_FILENAME
from engine.bus.port import Bus, Offsets
from engine.errors import BusUnreachable, CharterError
from engine.pacing import PacedAdmission
from engine.settings import Settings
from schemas.records import Allowance, Pause, Response, RunManifest
from schemas.topics import TOPICS

_POLL_INTERVAL_S = 2.0
_IDLE_TIMEOUT_S = 15.0  # the measurements stop this long after the last request
_FIRST_RESULT_TIMEOUT_S = 0.25  # the first page waits at most this long for a result


@dataclass
class LagMonitor:
    """Measures the consumer lag and the running workers of one run, which is the run of the last request."""

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
        """Return the last result for this run as {rows, workers, held, error}.

        `rows`, `workers` and `held` are None until the first measurement is complete, and while the log is unreachable.
        """
        with self.lock:
            self.run_id, self.last_requested_at = run_id, time.monotonic()
            if self.thread is None:
                self.thread = threading.Thread(target=self.poll_until_stopped, name="lag-monitor", daemon=True)
                self.thread.start()
        if run_id not in self.results:
            self.result_event.clear()
            self.wake_event.set()
            self.result_event.wait(_FIRST_RESULT_TIMEOUT_S)
        return self.results.get(run_id, {"rows": None, "workers": None, "held": None, "error": None})

    def poll_until_stopped(self) -> None:
        bus: Bus | None = None
        admission: PacedAdmission | None = None
        while not self.stop_requested:
            rows = workers = held = error_lines = None
            if time.monotonic() - self.last_requested_at < _IDLE_TIMEOUT_S:
                run_id = self.run_id
                try:
                    bus = bus or self.open_bus()
                    rows = _load_lag_rows(bus, self.settings, self.query_cache, run_id)
                    workers = list_workers(bus, self.settings, run_id) if _has_topics(bus) else []
                    admission = admission or _open_admission(bus)
                    held = list_held_stages(admission) if admission else []
                except CharterError as error:
                    error_lines = error_to_dict(error)
                self.results = {run_id: {"rows": rows, "workers": workers, "held": held, "error": error_lines}}
                self.result_event.set()
            else:
                self.results = {}  # an old result would show workers that may have ended
            if bus and rows is None:  # the log is unreachable, or no page is open
                if admission:
                    admission.close()
                bus.close()
                bus = admission = None
            self.wake_event.wait(_POLL_INTERVAL_S)
            self.wake_event.clear()
        if admission:
            admission.close()
        if bus:
            bus.close()

    def open_bus(self) -> Bus:
        """Open the event log. Raise BusUnreachable if there is no embedded log, because the dashboard must not create a log."""

        address = self.settings.bus_address
        if not address.startswith(KAFKA_SCHEME) and not (Path(address) / LOG_FILENAME).exists():
            raise BusUnreachable(
                f"there is no event log in {address}",
                "the first producer or stage creates the log",
                "type: charter produce FILE, then charter run",
            )
        return open_bus_from_settings(self.settings)

    def close(self) -> None:
        self.stop_requested = True
        self.wake_event.set()
        if self.thread:
            self.thread.join(timeout=_POLL_INTERVAL_S)


def _has_topics(bus: Bus) -> bool:
    """Return whether the log has the topic of the run manifests. The dashboard must not create it."""
    return bool(bus.topic_ids([RunManifest.topic]))


def _open_admission(bus: Bus) -> PacedAdmission | None:
    """Return a reader of the allowances, or None if the log does not have its topics yet."""
    topics = (Allowance.topic, Pause.topic, Response.topic)
    return PacedAdmission(bus, 1) if len(bus.topic_ids(topics)) == len(topics) else None


def _load_lag_rows(bus: Bus, settings: Settings, query_cache: QueryCache, run_id: str) -> list[dict[str, Any]]:
    """Return one row per reader and topic, with offsets, lag in records, and age of the oldest unread record in seconds."""

    existing = bus.topic_ids(list(TOPICS))
    rows: list[tuple[Any, ...]] = []
    for stage, names in get_stage_inputs(settings).items():
        topics = [name for name in names if name in existing]
        rows += compute_lag_rows(bus, stage, topics, read_positions(bus, run_id, stage, topics), run_id) if topics else []
    sink_offsets = _load_sink_offsets(query_cache, bus)
    if sink_offsets is not None:
        rows += compute_lag_rows(bus, "sink", [name for name in TOPICS if name in existing], sink_offsets)
    names = ("reader", "topic", "committed", "end", "behind", "seconds")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _load_sink_offsets(query_cache: QueryCache, bus: Bus) -> Offsets | None:
    """Return the next offsets of this log that the sink will read. Return None if the database cannot be read."""
    key, parameters = ("sink", bus.cluster_id), [bus.cluster_id]
    data = query_cache.get_or_run(key, lambda query: {"rows": query(SINK_OFFSETS_SQL, parameters).rows}).data
    return None if data is None else select_sink_offsets(data["rows"], bus)
