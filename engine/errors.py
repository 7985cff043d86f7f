"""The errors that Charter raises deliberately.

    CharterError                    exit code 1
    +-- UsageError                  exit code 2: the command or a setting is wrong
    +-- DependencyUnreachable       exit code 3: an external dependency is unavailable; a stage pauses and loses nothing
    |   +-- BusUnreachable
    |   +-- ModelUnreachable
    |   +-- SchemaRegistryUnreachable
    |   +-- StoreBusy
    |   +-- StoreFull
    |   +-- CheckpointsFull
    +-- CommitUncertain             close the writer, open a new one and read the committed offsets again
    +-- WriterFenced                another writer with the same transactional id has taken over
    +-- PartitionLost               the partition moved to another member before the commit
    +-- OffsetsLost                 the log no longer has the records at the stored offset
    +-- PermanentRecordError        this record can never be processed; it becomes a dead letter
    +-- TrainingFailed              training on this batch failed; nothing was saved
    +-- TooManyDeadLetters          consecutive records fail in the same way, so the cause is not in the records
    +-- DataFolderVersionMismatch   the data folder was written by another version of Charter

`str(error)` has three lines: what happened, why, and what to type.
"""

from __future__ import annotations


class CharterError(Exception):
    """An error with a message for the user: what happened, why, and what to type."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class UsageError(CharterError):
    """The command, a setting or an input is wrong."""

    exit_code = 2


class DependencyUnreachable(CharterError):
    """An external dependency is temporarily unavailable."""

    exit_code = 3


class BusUnreachable(DependencyUnreachable):
    """The log (Kafka or embedded) is unreachable."""


class ModelUnreachable(DependencyUnreachable):
    """A model cannot be loaded, or its server is unreachable."""


class SchemaRegistryUnreachable(DependencyUnreachable):
    """The schema registry is unreachable, or its response is invalid."""


class StoreBusy(DependencyUnreachable):
    """Another process holds the DuckDB file."""


class StoreFull(DependencyUnreachable):
    """The disk of the DuckDB file is full."""


class CheckpointsFull(DependencyUnreachable):
    """The disk has too little free space for another checkpoint."""


class CommitUncertain(CharterError):
    """The outcome of a transaction is unknown."""


class WriterFenced(CharterError):
    """Another writer with the same transactional id has taken over."""


class PartitionLost(CharterError):
    """A partition moved to another member before its results were committed."""


class OffsetsLost(CharterError):
    """The log no longer has the next records."""


class PermanentRecordError(CharterError):
    """This record can never be processed, so it is not retried."""


class TrainingFailed(CharterError):
    """Training on a batch failed or diverged. Nothing was saved, and the last good policy remains current.

    The training loop voids the batch, records an incident, and retries the phase when it has more rows or a new base model.
    """


class TooManyDeadLetters(CharterError):
    """Too many consecutive records failed in the same way. The stage stops before it writes more dead letters."""


class DataFolderVersionMismatch(CharterError):
    """The data folder was written by a version of Charter that this version cannot read."""
