"""The crash journal contains the records that a process is processing. It helps to find a record that crashes processes.

Before a batch goes to the model, its coordinates are written to a small file. The file is cleared when the batch is finished.
If the process ends before the batch is finished, the coordinates remain in the file. The restarted process pauses, and then
processes each of these records alone.

A process can also end for other reasons: the machine is preempted, or a user kills the process. So not every end is counted:

* The end of a process is counted against a record only if the file names this record and no other record.
* The end is not counted if the process received a stop signal before.
* The end is not counted if another process holds the lock of the file, because then the owner of the file is alive.

A record becomes a dead letter of kind CRASH if processes ended MAX_CRASHES times with evidence against the record, or MAX_ENDS
times without evidence. There are two kinds of evidence. The interpreter wrote a fault report to a file before the process
died (`FaultLog`), or the kernel killed a process of the same cgroup to free memory.

The files are not fsynced, because they must survive only the end of the process, not a crash of the machine. All instances of a
stage on a host share the counts. The coordinates contain the id of the topic, because a topic that was deleted and created
again has other records.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.bus.port import ConsumerRecord, Offsets, TopicPartition
from engine.text import format_count

logger = logging.getLogger("charter.crash_journal")

MAX_CRASHES = 3
MAX_ENDS = 6
_CGROUP_FOLDER = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CrashCount:
    """The number of processes that ended while they processed one record alone, and the number of these ends with evidence."""

    ends: int = 0
    crashes: int = 0

    @property
    def is_conclusive(self) -> bool:
        return self.crashes >= MAX_CRASHES or self.ends >= MAX_ENDS

    def describe(self) -> str:
        if self.crashes:
            return f"{format_count(self.ends, 'processes')} ended while processing it, {self.crashes} of them with a fault or without memory"
        return f"{format_count(self.ends, 'processes')} ended while processing it, without a stop signal and without a recorded fault"


class FaultLog:
    """The file into which the interpreter writes a fatal error (segmentation fault, abort) before the process dies.

    `had_fault` reports whether the previous process with this file died of a fatal error.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        self.had_fault = bool(text)
        if text:
            logger.warning("the last process of this instance died of a fault: %s", text.splitlines()[0])
        self.was_enabled = faulthandler.is_enabled()
        self.file = path.open("wb", buffering=0)
        faulthandler.enable(self.file)

    def close(self) -> None:
        """Write faults to standard error again, if they were written there before."""
        faulthandler.disable()
        if self.was_enabled:
            with suppress(OSError, ValueError):  # standard error may be closed
                faulthandler.enable(sys.__stderr__ or sys.stderr)
        self.file.close()


def read_oom_kills() -> int:
    """Return the number of processes of this cgroup that the kernel has killed to free memory, or 0 if it is unknown."""
    with suppress(OSError, ValueError, LookupError):
        relative = Path("/proc/self/cgroup").read_text(encoding="ascii").split("::", 1)[1].strip().lstrip("/")
        for folder in (_CGROUP_FOLDER / relative, _CGROUP_FOLDER):
            events = folder / "memory.events"
            if events.exists():
                lines = dict(line.split() for line in events.read_text(encoding="ascii").splitlines())
                return int(lines["oom_kill"])
    return 0


class CrashJournal:
    """The journal of one instance of a stage. `folder` is the folder of the stage, and `instance` is the name of the instance.

    `topic_ids` maps the input topics to their ids. `had_fault` means that the previous process of this instance died of a fault
    (see `FaultLog`).
    """

    def __init__(self, folder: Path, instance: str, *, topic_ids: Mapping[str, str], had_fault: bool = False) -> None:
        self.counts_folder = folder / "crash-counts"
        self.counts_folder.mkdir(parents=True, exist_ok=True)
        self.topic_keys = {topic: f"{topic}-{topic_id}" for topic, topic_id in topic_ids.items()}
        self.descriptor = os.open(folder / f"{instance}.working", os.O_RDWR | os.O_CREAT, 0o644)
        self.in_progress: set[str] = set()
        self.is_stopping = False
        self.lock = threading.Lock()
        self.is_owner = False
        with suppress(BlockingIOError):
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_owner = True
        if self.is_owner:
            self.count_last_end(had_fault)
            self.oom_kills = read_oom_kills()
            self.clear()
        else:
            logger.warning("another process holds the crash journal of %s: the ends of this process are not counted", instance)

    def count_last_end(self, had_fault: bool) -> None:
        """Count the end of the previous process, if it was processing records when it ended."""
        text = os.pread(self.descriptor, 1 << 24, 0)
        if not text:
            return
        try:
            entry = json.loads(text)
        except ValueError:
            # The process ended while it wrote the file, so it was not processing the records.
            logger.warning("the crash journal of the last process is incomplete, and its end is not counted")
            return
        names = entry["records"]
        counts = len(names) == 1 and not entry["is_stopping"]
        is_crash = had_fault or read_oom_kills() > entry["oom_kills"]
        for name in names:
            count = self.get_crash_count(name)
            self.write_crash_count(name, CrashCount(count.ends + counts, count.crashes + (counts and is_crash)))
        reason = "after a stop signal" if entry["is_stopping"] else f"with {format_count(len(names), 'records')} in progress"
        verdict = "is counted against its record" if counts else "is not counted against a record"
        logger.warning("the last process ended %s: this end %s, and each record is processed alone", reason, verdict)

    def get_crash_count(self, name: str) -> CrashCount:
        """Return the count of the record whose coordinates have this key."""
        try:
            return CrashCount(*json.loads((self.counts_folder / name).read_text(encoding="ascii")))
        except FileNotFoundError:
            return CrashCount()

    def write_crash_count(self, name: str, count: CrashCount) -> None:
        temporary = self.counts_folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps([count.ends, count.crashes]), encoding="ascii")
        temporary.rename(self.counts_folder / name)

    def crash_counts(self) -> dict[str, CrashCount]:
        """Return the counts of the records that must be processed alone. The keys are the coordinates of the records."""
        names = [path.name for path in self.counts_folder.iterdir() if not path.name.startswith(".")]
        return {name: self.get_crash_count(name) for name in names}

    def mark_started(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Add records whose processing starts."""
        with self.lock:
            self.in_progress |= {self.make_key(record) for record in consumer_records}
            self.write_in_progress()

    def mark_finished(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Remove records whose processing has ended."""
        with self.lock:
            self.in_progress -= {self.make_key(record) for record in consumer_records}
            self.write_in_progress()

    def note_stop(self) -> None:
        """Record that the process was asked to stop, so a record is not the cause of its end."""
        with self.lock:
            self.is_stopping = True
            self.write_in_progress()

    def clear(self) -> None:
        """Remove all records, because the process ends for another reason."""
        with self.lock:
            self.in_progress = set()
            self.write_in_progress()

    def write_in_progress(self) -> None:
        if not self.is_owner:
            return
        entry = {"records": sorted(self.in_progress), "is_stopping": self.is_stopping, "oom_kills": self.oom_kills}
        text = json.dumps(entry).encode() if self.in_progress else b""
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))

    def clear_crash_count(self, consumer_records: Iterable[ConsumerRecord]) -> None:
        """Delete the counts of records that are committed."""
        for record in consumer_records:
            (self.counts_folder / self.make_key(record)).unlink(missing_ok=True)

    def clear_committed(self, committed_offsets: Offsets) -> None:
        """Delete the counts of records below the committed offsets, because another instance has finished these records."""
        for name in self.crash_counts():
            topic_and_id, partition, offset = name.rsplit("-", 2)
            topic = next((topic for topic, key in self.topic_keys.items() if key == topic_and_id), None)
            committed = committed_offsets.get(TopicPartition(topic, int(partition)), 0) if topic else 0
            if topic is None or int(offset) < committed:  # if `topic` is None, it was deleted or is no longer an input
                (self.counts_folder / name).unlink(missing_ok=True)

    def make_key(self, consumer_record: ConsumerRecord) -> str:
        """Return the coordinates of a record in a form that is valid as a file name."""
        return f"{self.topic_keys[consumer_record.topic]}-{consumer_record.partition}-{consumer_record.offset}"

    def close(self) -> None:
        with self.lock:
            self.is_owner = False  # a stop signal can arrive after the journal is closed
            os.close(self.descriptor)
