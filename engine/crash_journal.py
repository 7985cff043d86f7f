"""Which records a process was working on, so that its successor knows what may have killed it.

Before a batch goes to the model its coordinates are written to a small file, which is emptied when the batch is finished.
A process that dies in between leaves them there. Its successor counts a death for each of these records and works them one
at a time, so that a record that kills the process (it makes the model run out of memory, say) is found: at its third death it
is a dead letter of kind CRASH. Without this such a record would kill every process that ever reads it.

The file is not synced: it has to outlive the process, not the machine. Deaths are shared by all copies of a stage on a host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from engine.bus.port import ConsumerRecord

MAX_CRASHES = 3


class CrashJournal:
    """The journal of one copy of a stage. `folder` is the stage's, `slot` the copy's name."""

    def __init__(self, folder: Path, instance: str) -> None:
        self.crash_counts_folder = folder / "suspects"
        self.crash_counts_folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / f"{instance}.working", os.O_RDWR | os.O_CREAT, 0o644)
        self.in_progress: set[str] = set()
        self.lock = threading.Lock()
        self.increment_crash_counts(os.read(self.descriptor, 1 << 20).decode().split())
        self.clear()

    def increment_crash_counts(self, names: Iterable[str]) -> None:
        """Count a death for each of these records."""
        for name in names:
            path = self.crash_counts_folder / name
            path.write_text(str(self.get_crash_count(name) + 1))

    def get_crash_count(self, name: str) -> int:
        try:
            return int((self.crash_counts_folder / name).read_text() or 0)
        except FileNotFoundError:
            return 0

    def crash_counts(self) -> dict[str, int]:
        """Record -> how many processes have died at it, for those at which one has."""
        return {path.name: self.get_crash_count(path.name) for path in self.crash_counts_folder.iterdir()}

    def mark_started(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """These records go to the model now."""
        with self.lock:
            self.in_progress |= {make_coordinates_key(message) for message in consumer_records}
            self.write_in_progress()

    def mark_finished(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """They have come back."""
        with self.lock:
            self.in_progress -= {make_coordinates_key(message) for message in consumer_records}
            self.write_in_progress()

    def clear(self) -> None:
        """The process ends for another reason than these records."""
        with self.lock:
            self.in_progress = set()
            self.write_in_progress()

    def write_in_progress(self) -> None:
        text = " ".join(sorted(self.in_progress)).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))

    def clear_crash_count(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """These records are finished: no process will die at them any more."""
        for message in consumer_records:
            (self.crash_counts_folder / make_coordinates_key(message)).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.descriptor)


def make_coordinates_key(consumer_record: ConsumerRecord) -> str:
    return f"{consumer_record.topic}-{consumer_record.partition}-{consumer_record.offset}"
