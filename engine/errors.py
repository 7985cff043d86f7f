"""Define the errors that Charter raises deliberately.

    CharterError                    exit code 1
    +-- UsageError                  exit code 2: the command, a setting or an input is wrong
    |   +-- LoginRejected           Kafka rejects the user, the token or the certificate
    |   +-- QueryTimeout            a query took longer than its time limit
    +-- DependencyUnreachable       exit code 3: an external dependency is unavailable; a stage pauses and loses no records
    |   +-- BusUnreachable
    |   +-- OffsetsUnstable
    |   +-- ModelUnreachable
    |   +-- SchemaRegistryUnreachable
    |   +-- StoreBusy
    |   +-- StoreFull
    |   +-- StoreIncomplete
    |   +-- CheckpointsFull
    |   +-- CheckpointsUnreachable
    |   +-- LakeUnreachable
    |   +-- LakeBusy
    +-- CommitUncertain             the outcome of a transaction is unknown
    +-- WriterFenced                another writer with the same transactional id was opened
    +-- PartitionLost               the partition was assigned to another member before the commit
    +-- OffsetsLost                 the log no longer contains the records at the stored offset
    +-- TopicChanged                exit code 3: a topic was deleted or created again while the process used it
    +-- StoreDamaged                the DuckDB file is damaged
    |   +-- WalDamaged              only its write-ahead log is damaged
    +-- StoreMismatch               the database and the log do not belong together
    +-- PermanentRecordError        this record can never be processed; it becomes a dead letter
    +-- RequestFailed               a model server fails for this record, but not for others; the record is tried again
    +-- TrainingFailed              training on this batch failed; nothing was saved
    +-- ProcessLost                 another process that trains the same model ended too early
    +-- TooManyDeadLetters          too many consecutive records failed in the same way
    +-- TooFewPrompts               the generator's model writes no new prompts any more
    +-- DataFolderVersionMismatch   the data folder was written by another version of Charter

`str(error)` has three lines: what happened, why, and what to type.
"""

from __future__ import annotations

import errno


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


class LoginRejected(UsageError):
    """Kafka rejects the user, the token or the certificate, so a retry does not help."""


class QueryTimeout(UsageError):
    """A query took longer than its time limit and was interrupted."""


class DependencyUnreachable(CharterError):
    """An external dependency is temporarily unavailable."""

    exit_code = 3


class BusUnreachable(DependencyUnreachable):
    """The log (Kafka or embedded) is unreachable."""


class OffsetsUnstable(DependencyUnreachable):
    """Kafka does not return committed offsets, because a transaction with offsets of the same partition has not ended."""


class ModelUnreachable(DependencyUnreachable):
    """A model cannot be loaded, or its server is unreachable."""


class SchemaRegistryUnreachable(DependencyUnreachable):
    """The schema registry is unreachable, or its response is invalid."""


class StoreBusy(DependencyUnreachable):
    """Another process holds the DuckDB file."""


class StoreFull(DependencyUnreachable):
    """The disk of the DuckDB file is full."""


class StoreIncomplete(DependencyUnreachable):
    """The sink has not yet written all records of the log to the database."""


class CheckpointsUnreachable(DependencyUnreachable):
    """The URL of the checkpoints cannot be used, or a checkpoint there is incomplete."""


class CheckpointsFull(DependencyUnreachable):
    """The disk has too little free space for another checkpoint."""


class LakeUnreachable(DependencyUnreachable):
    """A lake (`charter export lake`) cannot be read or written."""


class LakeBusy(DependencyUnreachable):
    """Another export writes to the lake, or a killed export of another data folder has left its claim there."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error of the operating system means that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class CommitUncertain(CharterError):
    """The outcome of a transaction is unknown. Close the writer, open a new writer and read the committed offsets again."""


class WriterFenced(CharterError):
    """Another writer with the same transactional id was opened, so this writer can no longer commit."""


class PartitionLost(CharterError):
    """A partition was assigned to another member before the results of its records were committed."""


class OffsetsLost(CharterError):
    """The log no longer contains the records at the next offset to read."""


class TopicChanged(CharterError):
    """A topic was deleted or created again while this process used it. The process must start again."""

    exit_code = 3


class StoreDamaged(CharterError):
    """The DuckDB file is damaged or missing. The sink can restore its rows from the log."""


class WalDamaged(StoreDamaged):
    """The write-ahead log of the DuckDB file is damaged, or it belongs to another file."""


class StoreMismatch(CharterError):
    """The database and the log do not belong together."""


class PermanentRecordError(CharterError):
    """This record can never be processed, so it is not retried."""


class RequestFailed(CharterError):
    """A model server does not answer a request of this record, but it answers other requests.

    The record is tried again, up to `worker.max_attempts` times in all. Then the record becomes a dead letter.
    """


class TrainingFailed(CharterError):
    """Training on a batch failed or diverged. Nothing was saved, and the last good policy remains current.

    The training loop voids the batch and writes an incident. The loop retries the phase when new rows or a new base model
    exist.
    """


class ProcessLost(CharterError):
    """Another process that trains the same model has ended. The batch stays unfinished, and a later start resumes it."""


class TooManyDeadLetters(CharterError):
    """Too many consecutive records failed in the same way. The stage stops and does not write further dead letters."""


class TooFewPrompts(CharterError):
    """The model of a generator has written no acceptable prompt for many requests. The generator stops."""


class DataFolderVersionMismatch(CharterError):
    """The data folder was written by another version of Charter, and this version cannot read it."""
