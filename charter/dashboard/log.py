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
    from charter.dashboard.desk import Desk
    from engine.bus.port import Bus, Offsets
    from engine.settings import Settings

LOOK_EVERY_S = 2.0
WATCHED_FOR_S = 15.0  # after the last page that asked
FIRST_WAIT_S = 0.25


@dataclass
class LogWatch:
    """Looks at the log of `settings` for one run at a time, the one that was asked for last."""

    settings: Settings
    desk: Desk
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: str = ""
    asked: float = 0.0
    wake: threading.Event = field(default_factory=threading.Event)
    news: threading.Event = field(default_factory=threading.Event)
    stopping: bool = False
    thread: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lags(self, run_id: str) -> dict[str, Any]:
        """{rows, trouble}: what was found last for this run. The first answer may still be on its way: rows is None then."""
        with self.lock:
            self.run, self.asked = run_id, time.monotonic()
            if self.thread is None:
                self.thread = threading.Thread(target=self.watch, name="log-watch", daemon=True)
                self.thread.start()
        if run_id not in self.found:
            self.news.clear()
            self.wake.set()
            self.news.wait(FIRST_WAIT_S)
        return self.found.get(run_id, {"rows": None, "trouble": None})

    def watch(self) -> None:
        bus: Bus | None = None
        while not self.stopping:
            rows = trouble = None
            if time.monotonic() - self.asked < WATCHED_FOR_S:
                run_id = self.run
                try:
                    bus = bus or self.open()
                    rows = rows_of(bus, self.settings, self.desk, run_id)
                except CharterError as error:
                    trouble = [error.what, error.why, error.fix]
                self.found = {run_id: {"rows": rows, "trouble": trouble}}
                self.news.set()
            if bus and rows is None:  # it is away, or nobody watches
                bus.close()
                bus = None
            self.wake.wait(LOOK_EVERY_S)
            self.wake.clear()
        if bus:
            bus.close()

    def open(self) -> Bus:
        """The log as it is. A look never makes one."""
        from charter.pipeline import open_settings
        from engine.bus import KAFKA
        from engine.bus.embedded import FILE
        from engine.errors import BusUnreachable

        address = self.settings.bus_address
        if not address.startswith(KAFKA) and not (Path(address) / FILE).exists():
            raise BusUnreachable(
                f"there is no log in {address} yet",
                "produce and the stages make it",
                "type: charter produce FILE, then charter run",
            )
        return open_settings(self.settings)

    def close(self) -> None:
        self.stopping = True
        self.wake.set()
        if self.thread:
            self.thread.join(timeout=LOOK_EVERY_S)


def rows_of(bus: Bus, settings: Settings, desk: Desk, run_id: str) -> list[dict[str, Any]]:
    """For each reader and topic: messages behind, and the age of the oldest of them in seconds."""
    from charter.pipeline import readers_of
    from charter.topics import lag_rows
    from schemas.topics import TOPICS

    there = bus.topic_ids(list(TOPICS))
    rows: list[tuple[Any, ...]] = []
    for stage, names in readers_of(settings.judge.pairing).items():
        known = [name for name in names if name in there]
        rows += lag_rows(bus, stage, known, bus.committed(f"{run_id}.{stage}", known)) if known else []
    stands = sink_stands(desk, bus.cluster_id)
    if stands is not None:
        rows += lag_rows(bus, "sink", [name for name in TOPICS if name in there], stands)
    names = ("reader", "topic", "committed", "end", "behind", "seconds")
    return [dict(zip(names, row, strict=True)) for row in rows]


def sink_stands(desk: Desk, cluster_id: str) -> Offsets | None:
    """How far the sink of this database has come with this log; None when the database cannot tell."""
    from engine.bus.port import TopicPartition

    sql = "SELECT topic, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
    data = desk.look(("sink", cluster_id), lambda ask: {"rows": ask(sql, [cluster_id]).rows}).data
    return None if data is None else {TopicPartition(topic, place): offset for topic, place, offset in data["rows"]}
