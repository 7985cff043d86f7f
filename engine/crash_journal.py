"""The crash journal: the records that a process was processing, to find a record that crashes processes.

Before a batch goes to the model, its coordinates are written to a small file; the file is cleared when the batch is finished.
A process that crashes in between leaves them in the file. Its restarted process counts a crash for each of these records and
processes them one at a time. A record that has crashed MAX_CRASHES processes (for example because the model runs out of memory)
becomes a dead letter of kind CRASH. Without the journal such a record would crash every process that reads it.

The file is not fsynced: it must survive a crash of the process, not of the machine. All instances of a stage on a host share
the crash counts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from engine.bus.port import ConsumerRecord

MAX_CRASHES = 3


class CrashJournal:
    """The journal of one instance of a stage. `folder` belongs to the stage, `instance` is the name of the instance."""

    def __init__(self, folder: Path, instance: str) -> None:
        self.crash_counts_folder = folder / "suspects"
        self.crash_counts_folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / f"{instance}.working", os.O_RDWR | os.O_CREAT, 0o644)
        self.in_progress: set[str] = set()
        self.lock = threading.Lock()
        self.increment_crash_counts(os.read(self.descriptor, 1 << 20).decode().split())
        self.clear()

    def increment_crash_counts(self, names: Iterable[str]) -> None:
        """Count a crash for each of these records."""
        for name in names:
            path = self.crash_counts_folder / name
            path.write_text(str(self.get_crash_count(name) + 1))

    def get_crash_count(self, name: str) -> int:
        try:
            return int((self.crash_counts_folder / name).read_text() or 0)
        except FileNotFoundError:
            return 0

    def crash_counts(self) -> dict[str, int]:
        """Return record -> number of processes that crashed while processing it, without zeros."""
        return {path.name: self.get_crash_count(path.name) for path in self.crash_counts_folder.iterdir()}

    def mark_started(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Add records whose processing starts."""
        with self.lock:
            self.in_progress |= {make_coordinates_key(record) for record in consumer_records}
            self.write_in_progress()

    def mark_finished(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Remove records whose processing has ended."""
        with self.lock:
            self.in_progress -= {make_coordinates_key(record) for record in consumer_records}
            self.write_in_progress()

    def clear(self) -> None:
        """Remove all records: the process ends for another reason."""
        with self.lock:
            self.in_progress = set()
            self.write_in_progress()

    def write_in_progress(self) -> None:
        text = " ".join(sorted(self.in_progress)).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))

    def clear_crash_count(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Delete the crash counts of records that are committed."""
        for record in consumer_records:
            (self.crash_counts_folder / make_coordinates_key(record)).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.descriptor)


def make_coordinates_key(consumer_record: ConsumerRecord) -> str:
    """Return the coordinates of a record in a form that is valid as a file name."""
    return f"{consumer_record.topic}-{consumer_record.partition}-{consumer_record.offset}"
