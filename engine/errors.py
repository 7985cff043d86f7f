"""Every error that Charter raises on purpose.

    CharterError                    exit code 1
    +-- UsageError                  exit code 2: the command or a setting is wrong
    +-- DependencyUnreachable       exit code 3: something outside is away; a stage pauses, nothing is lost
    |   +-- BusUnreachable
    |   +-- ModelUnreachable
    |   +-- RegistryUnreachable
    |   +-- StoreBusy
    |   +-- StoreFull
    |   +-- CheckpointsFull
    +-- CommitInDoubt               the writer must be thrown away and the committed offsets read again
    +-- Fenced                      another writer with this transactional id has taken over
    +-- PartitionLost               the partition moved to another member before the commit
    +-- OffsetsLost                 the log no longer has the records at the stored offset
    +-- PermanentRecordError        this one record can never succeed: a dead letter
    +-- TrainingFailed                 a batch that no policy or reward model can be learned from; nothing was saved
    +-- DeadLettersInARow           so many records fail alike that it is not their fault
    +-- DataFolderVersion           the data folder was written by another version

`str(error)` is three lines: what happened, why, and what to type.
"""

from __future__ import annotations


class CharterError(Exception):
    """An error with a message for a person: what happened, why, and what to type."""

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
    """Something that Charter needs is away for now."""

    exit_code = 3


class BusUnreachable(DependencyUnreachable):
    """The log (Kafka or the embedded one) does not answer."""


class ModelUnreachable(DependencyUnreachable):
    """A model cannot be loaded, or its server does not answer."""


class SchemaRegistryUnreachable(DependencyUnreachable):
    """The schema registry does not answer, or not as one."""


class StoreBusy(DependencyUnreachable):
    """The DuckDB file is held by another process."""


class StoreFull(DependencyUnreachable):
    """The disk of the DuckDB file is full."""


class CheckpointsFull(DependencyUnreachable):
    """There is no room on the disk for another checkpoint."""


class CommitUncertain(CharterError):
    """It is not known whether a transaction was written."""


class WriterFenced(CharterError):
    """Another writer with the same transactional id has taken over."""


class PartitionLost(CharterError):
    """A partition moved to another member before its results were committed."""


class OffsetsLost(CharterError):
    """The log no longer holds the records that come next."""


class PermanentRecordError(CharterError):
    """This record can never be processed, however often it is tried."""


class TrainingFailed(CharterError):
    """A learner cannot train on this batch, or its numbers ran away: nothing was saved, the last good policy stays.

    The loop gives the batch up with an incident, and tries the phase again when there are more rows or another model to start
    from.
    """


class TooManyDeadLetters(CharterError):
    """Many records in a row failed in the same way: the stage stops before it gives up on more."""


class DataFolderVersionMismatch(CharterError):
    """A data folder was written by a version of Charter that this one cannot read."""
