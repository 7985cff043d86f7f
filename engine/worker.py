"""The worker loop: one stage reads its topics, works in batches, and commits what it made together with how far it came.

For each stage one thread runs `Worker.run`:

1. poll (at least once a second, whatever the model does) and decode the bytes ourselves;
2. put good records in the queue of the stage's lane; a record that cannot be decoded is finished at once, as a dead letter;
3. of each partition take the contiguous prefix of finished records;
4. one short transaction: their outputs, their dead letters, and the offsets after them (`Writer.commit`).

Model work never happens inside a transaction: it happens in a `Lane`, the threads of one model, which serves the stage that
is furthest down the stream first, so that chains in progress finish before new ones start. A stage never commits results of a
partition that it has lost, and after any doubt about a commit it takes a new writer and asks the log how far it really came.

A record whose processing fails alone, `attempts` times over, is a dead letter; so is one at which process after process dies
(`engine.crash_journal`). Trouble with a dependency (a server that is down, no memory) pauses the stage and is nobody's fault. Dead
letters of one kind in a row are no longer the records' fault: the stage stops, and does not commit them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from engine.bus.port import Bus, ConsumerRecord, Offsets, ProducerRecord, TopicPartition
from engine.crash_journal import MAX_CRASHES, CrashJournal, make_coordinates_key
from engine.dead_letters import make_dead_letter
from engine.errors import (
    CharterError,
    CommitUncertain,
    DependencyUnreachable,
    PartitionLost,
    PermanentRecordError,
    TooManyDeadLetters,
    UsageError,
)
from engine.logs import format_coordinates, get_coordinates
from engine.watchdog import CallTracker
from schemas.codec import RecordError, decode_record, encode_record
from schemas.records import DeadLetter, DeadLetterKind, Record
from schemas.topics import MAX_RECORD_BYTES, TOPICS

logger = logging.getLogger("charter.worker")

_IDLE_POLL_TIMEOUT_S = 0.5
_BUSY_POLL_TIMEOUT_S = 0.02
_MAX_COMMIT_RECORDS = 500
_MAX_COMMIT_BYTES = 16 * 1024 * 1024
BACKOFF_S = (0.5, 30.0)  # first and longest pause after trouble with a dependency
TARGET_STAGE_HEADER = (
    "only-stage"  # the header of a message that is meant for one stage alone (a dead letter that is tried again)
)


@dataclass(frozen=True)
class Stage:
    """What one stage is: its topics and a function from a batch of records to each one's outputs.

    `inputs` are served in their order. `rank` is the place in the stream: a lane serves higher ranks first. `batch` is the
    most records that `work` takes at once.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    priority: int
    max_batch_size: int
    process: Callable[[Sequence[Record]], Sequence[Sequence[Record]]]


@dataclass(frozen=True)
class WorkerLimits:
    """How much a worker holds, and when it gives up. Times are in seconds."""

    max_in_flight: int = 256  # records that are read but not yet committed
    max_in_flight_bytes: int = 64 * 1024 * 1024
    max_attempts: int = 3
    retry_timeout_s: float = 600.0  # from a record's first failure to its dead letter, whatever the attempts
    max_consecutive_dead_letters: int = 10  # 0: never stop for them


@dataclass(eq=False)
class InFlightRecord:
    """One message on its way through a stage; `outputs` is None until it is finished."""

    consumer_record: ConsumerRecord
    epoch: int
    record: Record | None = None
    outputs: list[ProducerRecord] | None = None
    attempts: int = 0
    is_isolated: bool = False  # its batch failed: try it by itself, to find whose fault it is
    is_dropped: bool = False  # its partition went to someone else
    first_failed_at: float = 0.0  # the first time, on the monotonic clock
    retry_at: float = 0.0

    @property
    def topic_partition(self) -> TopicPartition:
        return TopicPartition(self.consumer_record.topic, self.consumer_record.partition)


# What came in, what goes out because of it, and when the work on it began (nanoseconds since 1970) -> what goes out, traced.
TraceFunction = Callable[[ConsumerRecord, list[ProducerRecord], int], list[ProducerRecord]]


def skip_tracing(consumer_record: ConsumerRecord, outputs: list[ProducerRecord], started_ns: int) -> list[ProducerRecord]:
    return outputs


def to_producer_record(record: Record) -> ProducerRecord:
    """A record as a message: key, bytes, and the run in a header."""
    return ProducerRecord(record.topic, record.key, encode_record(record), (("run", record.run_id.encode()),))


def compute_backoff(failures: int) -> float:
    """Exponential with full jitter, in seconds."""
    first, longest = BACKOFF_S
    return random.uniform(0, min(longest, first * 2**failures))


@dataclass
class ModelExecutor:
    """The threads of one model. `changed` guards the queues of all its workers."""

    name: str
    num_threads: int = 1
    downstream_wait_s: float = 0.15
    workers: list[Worker] = field(default_factory=list)
    condition: threading.Condition = field(default_factory=threading.Condition)

    def run(self, stop: threading.Event) -> None:
        """One thread of the lane: serve the furthest-downstream ready batch until `stop`."""
        while not stop.is_set():
            with self.condition:
                chosen = self.select_batch()
                if chosen is None:
                    self.condition.wait(_BUSY_POLL_TIMEOUT_S)
                    continue
                worker, items = chosen
            worker.process_batch(items)
            self.wait_for_downstream(worker.stage, stop)

    def select_batch(self) -> tuple[Worker, list[InFlightRecord]] | None:
        for worker in sorted(self.workers, key=lambda worker: -worker.stage.priority):
            if items := worker.take_batch():
                return worker, items
        return None

    def wait_for_downstream(self, stage: Stage, stop: threading.Event) -> None:
        """Give the readers of what was just made a moment to see it, before an earlier stage takes the model for seconds."""
        readers = [w for w in self.workers if set(w.stage.inputs) & set(stage.outputs)]
        deadline = time.monotonic() + self.downstream_wait_s
        with self.condition:
            while readers and not any(reader.num_queued for reader in readers) and not stop.is_set():
                left = deadline - time.monotonic()
                if left <= 0 or not self.condition.wait(left):
                    return


class Worker:
    """One copy of a stage. `run` is its thread; the lane's threads call `take` (holding `lane.changed`) and `process`."""

    def __init__(
        self,
        bus: Bus,
        stage: Stage,
        executor: ModelExecutor,
        *,
        run_id: str,
        instance: str,
        limits: WorkerLimits | None = None,
        journal: CrashJournal | None = None,
        can_admit: Callable[[], bool] = lambda: True,
        trace: TraceFunction = skip_tracing,
    ) -> None:
        self.bus, self.stage, self.executor, self.run_id, self.trace = bus, stage, executor, run_id, trace
        self.group = f"{run_id}.{stage.name}"
        self.instance, self.limits, self.journal, self.can_admit = instance, limits or WorkerLimits(), journal, can_admit
        self.call_tracker = CallTracker(f"{stage.name} ({instance})")
        self.in_flight_records: dict[TopicPartition, deque[InFlightRecord]] = {}
        self.queues: dict[str, deque[InFlightRecord]] = {topic: deque() for topic in stage.inputs}
        self.retry_queue: list[InFlightRecord] = []  # those that wait until they are tried again
        self.poison_candidates = journal.crash_counts() if journal else {}
        self.consecutive_failures: list[
            InFlightRecord
        ] = []  # the newest dead letters of one class, with nothing good between them
        self.consecutive_failure_class = ""
        self.fatal_error: CharterError | None = None
        self.num_consecutive_pauses = 0
        self.paused_until = 0.0
        self.partitions_paused = False  # its partitions are
        self.admission_closed = False  # it may begin nothing new
        self.commit_uncertain = False
        self.num_committed = 0  # messages that it has passed
        self.num_written = 0  # messages that it has written
        self.num_dead_letters = self.num_pauses = self.num_batches = self.num_tokens = 0
        self.batch_seconds = 0.0
        self.positions: Offsets = {}  # where it had read to at its last poll
        self.consumer = bus.open_consumer(self.group, stage.inputs, member=instance)
        self.writer = bus.open_writer(f"{self.group}.{instance}")
        executor.workers.append(self)

    def run(self, stop: threading.Event) -> None:
        """Poll and commit until `stop`; what is finished by then is committed."""
        bus_failures = 0
        try:
            while not stop.is_set() and not self.fatal_error:
                try:
                    self.poll()
                    self.commit()
                    bus_failures = 0
                except (DependencyUnreachable, CommitUncertain) as error:  # of the log or the schema registry
                    self.commit_uncertain |= isinstance(error, CommitUncertain)
                    logger.warning("%s waits: %s", self.stage.name, error.what)
                    stop.wait(compute_backoff(bus_failures))
                    bus_failures += 1
            self.commit()
            if self.fatal_error:
                raise self.fatal_error
        finally:
            with self.call_tracker.track("closing"):
                self.consumer.close()
                self.writer.close()

    # 1 and 2: read

    @property
    def num_in_flight(self) -> int:
        return sum(len(items) for items in self.in_flight_records.values())

    @property
    def in_flight_bytes(self) -> int:
        return sum(len(item.consumer_record.value or b"") for items in self.in_flight_records.values() for item in items)

    @property
    def num_queued(self) -> int:
        return sum(len(queue) for queue in self.queues.values())

    def poll(self) -> None:
        """Read what has arrived and queue it; a full stage keeps polling but its partitions are paused."""
        self.apply_backpressure()
        room = max(1, self.limits.max_in_flight - self.num_in_flight)
        with self.call_tracker.track("poll"):
            messages = self.consumer.poll(_BUSY_POLL_TIMEOUT_S if self.num_in_flight else _IDLE_POLL_TIMEOUT_S, room)
        epochs = self.consumer.assignment()
        self.drop_lost_partitions(epochs)
        items = self.decode_records(messages, epochs)
        with self.executor.condition:
            for item in items:
                self.in_flight_records.setdefault(item.topic_partition, deque()).append(item)
                if item.outputs is None:
                    self.queues[item.consumer_record.topic].append(item)
            self.executor.condition.notify_all()
        if not messages:
            self.positions = self.consumer.positions()

    def decode_records(
        self, consumer_records: Sequence[ConsumerRecord], epochs: Mapping[TopicPartition, int]
    ) -> list[InFlightRecord]:
        """Decode messages; when that needs something that is away, they are read again later."""
        try:
            return [self.decode_record(message, epochs) for message in consumer_records]
        except DependencyUnreachable:
            for message in reversed(consumer_records):  # so that the first of each partition has the last word
                with suppress(PartitionLost):
                    self.consumer.seek(TopicPartition(message.topic, message.partition), message.offset)
            raise

    def is_caught_up(self, ends: Offsets) -> bool:
        """Whether it has finished everything below `ends` in the partitions that are its own."""
        return self.num_in_flight == 0 and all(at >= ends.get(place, 0) for place, at in self.positions.items())

    def apply_backpressure(self) -> None:
        """Pause all partitions, those that have just come too, while the stage is full or may take no more."""
        share = 0.5 if self.partitions_paused else 1.0  # go on when it is half empty
        limits = self.limits
        full = self.num_in_flight >= limits.max_in_flight * share or self.in_flight_bytes >= limits.max_in_flight_bytes * share
        self.admission_closed = not self.can_admit()
        if full or self.admission_closed:
            self.consumer.pause(list(self.consumer.assignment()))
            self.partitions_paused = True
        elif self.partitions_paused:
            self.consumer.resume(list(self.consumer.assignment()))
            self.partitions_paused = False

    def decode_record(self, consumer_record: ConsumerRecord, epochs: Mapping[TopicPartition, int]) -> InFlightRecord:
        """Decode a message. Another run's or stage's is finished with nothing; an undecodable one as a dead letter."""
        item = InFlightRecord(consumer_record, epochs.get(TopicPartition(consumer_record.topic, consumer_record.partition), -1))
        if dict(consumer_record.headers).get(TARGET_STAGE_HEADER, self.stage.name.encode()) != self.stage.name.encode():
            item.outputs = []
            return item
        try:
            item.record = decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class)
        except RecordError as error:
            self.send_to_dead_letter(item, DeadLetterKind.DECODE, error)
            return item
        if item.record.run_id != self.run_id:
            item.outputs = []
        elif self.poison_candidates:
            self.check_poison_candidate(item)
        return item

    def check_poison_candidate(self, item: InFlightRecord) -> None:
        """A record at which processes have died is tried alone, and at the last of these deaths given up."""
        item.attempts = self.poison_candidates.get(make_coordinates_key(item.consumer_record), 0)
        item.is_isolated = item.attempts > 0
        if item.attempts >= MAX_CRASHES:
            self.send_to_dead_letter(
                item, DeadLetterKind.CRASH, PoisonRecordError(f"{item.attempts} processes have died while working on it")
            )

    def drop_lost_partitions(self, epochs: Mapping[TopicPartition, int]) -> None:
        """Forget the records of partitions that are no longer ours, or ours anew."""
        with self.executor.condition:
            for place, items in self.in_flight_records.items():
                for item in items:
                    item.is_dropped = item.epoch != epochs.get(place)
            for place in list(self.in_flight_records):
                self.in_flight_records[place] = deque(item for item in self.in_flight_records[place] if not item.is_dropped)
            for topic, queue in self.queues.items():
                self.queues[topic] = deque(item for item in queue if not item.is_dropped)
            self.retry_queue = [item for item in self.retry_queue if not item.is_dropped]
            self.consecutive_failures = [item for item in self.consecutive_failures if not item.is_dropped]

    # The lane's side: work

    def take_batch(self) -> list[InFlightRecord]:
        """The next batch, of the first topic that has one; empty while the stage pauses. The lane's lock is held."""
        now = time.monotonic()
        if now < self.paused_until or self.fatal_error or self.admission_closed:
            return []
        self.requeue_retries(now)
        for topic in self.stage.inputs:
            queue = self.queues[topic]
            if queue and queue[0].is_isolated:
                return [queue.popleft()]
            items: list[InFlightRecord] = []
            while queue and not queue[0].is_isolated and len(items) < self.stage.max_batch_size:
                items.append(queue.popleft())
            if items:
                return items
        return []

    def requeue_retries(self, now: float) -> None:
        """Put what is due to be tried again at the head of its queue."""
        for item in self.retry_queue:
            if item.retry_at <= now:
                self.queues[item.consumer_record.topic].appendleft(item)
        self.retry_queue = [item for item in self.retry_queue if item.retry_at > now]

    def process_batch(self, items: list[InFlightRecord]) -> None:
        """Run the stage on a batch and finish its items, or sort out whose fault it was that it failed."""
        if self.journal is None:
            self.run_stage(items)
            return
        messages = [item.consumer_record for item in items]
        try:
            self.journal.mark_started(messages)
        except OSError as error:  # a full disk is no record's fault
            self.pause_stage(items, error)
            return
        try:
            self.run_stage(items)
        finally:
            self.journal.mark_finished(messages)

    def run_stage(self, items: list[InFlightRecord]) -> None:
        records = [item.record for item in items if item.record is not None]
        started = time.time_ns()
        try:
            made = self.stage.process(records)
            outputs = [[to_producer_record(record) for record in records_of_one] for records_of_one in made]
            if len(outputs) != len(items):
                raise AssertionError(f"{self.stage.name} returned {len(outputs)} results for {len(items)} records")
        except (DependencyUnreachable, MemoryError) as error:
            self.pause_stage(items, error)
        except UsageError:
            raise  # a setting is wrong, which every record would meet: the stage stops, and nothing of it is committed
        except Exception as error:  # the one place where anything may fail: it is the record's fault, or a bug it shows
            self.handle_failure(items, error)
        else:
            self.num_consecutive_pauses = 0
            with self.executor.condition:
                self.consecutive_failures = []
                self.num_batches += 1
                self.batch_seconds += (time.time_ns() - started) / 1e9
                self.num_tokens += sum(record.prompt_tokens + record.completion_tokens for of_one in made for record in of_one)
            for item, messages in zip(items, outputs, strict=True):
                self.finish_record(item, self.trace(item.consumer_record, messages, started))

    def finish_record(self, item: InFlightRecord, outputs: list[ProducerRecord]) -> None:
        """Set an item's outputs; one that is larger than its topic allows makes a dead letter instead."""
        for message in outputs:
            if len(message.value or b"") > MAX_RECORD_BYTES:
                size = len(message.value or b"")
                self.send_to_dead_letter(
                    item, DeadLetterKind.TOO_LARGE, ValueError(f"its {message.topic} record has {size} bytes")
                )
                return
        with self.executor.condition:
            item.outputs = outputs

    def pause_stage(self, items: list[InFlightRecord], error: Exception) -> None:
        """A dependency is away: put the batch back and wait, longer each time."""
        wait = compute_backoff(self.num_consecutive_pauses)
        self.num_consecutive_pauses += 1
        self.num_pauses += 1
        logger.warning("%s pauses %.1f s: %s: %s", self.stage.name, wait, type(error).__name__, error)
        self.requeue_batch(items)
        self.paused_until = time.monotonic() + wait

    def handle_failure(self, items: list[InFlightRecord], error: Exception) -> None:
        """A batch failed: try its records one by one; a record that fails alone often enough is a dead letter."""
        if len(items) > 1:
            logger.info("%s: a batch of %d failed (%s); trying one by one", self.stage.name, len(items), error)
            for item in items:
                item.is_isolated = True
            self.requeue_batch(items)
            return
        item, now = items[0], time.monotonic()
        item.attempts += 1
        item.first_failed_at = item.first_failed_at or now
        if isinstance(error, PermanentRecordError):
            self.send_to_dead_letter(item, DeadLetterKind.PERMANENT, error)
        elif item.attempts >= self.limits.max_attempts or now - item.first_failed_at > self.limits.retry_timeout_s:
            logger.error(
                "%s has tried a record %d times",
                self.stage.name,
                item.attempts,
                exc_info=error,
                extra=self.make_log_extra(item),
            )
            self.send_to_dead_letter(item, DeadLetterKind.EXHAUSTED, error)
        else:
            item.is_isolated, item.retry_at = True, now + compute_backoff(item.attempts)
            with self.executor.condition:
                if not item.is_dropped:
                    self.retry_queue.append(item)

    def make_log_extra(self, item: InFlightRecord) -> dict[str, object]:
        """A record's coordinates, for the log."""
        return {"run": self.run_id, "stage": self.stage.name} | get_coordinates(item.consumer_record)

    def requeue_batch(self, items: Iterable[InFlightRecord]) -> None:
        with self.executor.condition:
            for item in reversed(list(items)):
                if not item.is_dropped:
                    self.queues[item.consumer_record.topic].appendleft(item)

    def send_to_dead_letter(self, item: InFlightRecord, kind: DeadLetterKind, error: Exception) -> None:
        """Finish an item as a dead letter; with too many of its class in a row the stage is to stop."""
        letter = make_dead_letter(
            item.consumer_record, kind, error, stage=self.stage.name, run_id=self.run_id, attempts=max(1, item.attempts)
        )
        kind_of_error = f"{kind.value} {letter.error_class}"
        self.num_dead_letters += 1
        logger.warning(
            "%s gives up on %s (%s): %s",
            self.stage.name,
            format_coordinates(item.consumer_record),
            kind.value,
            "; ".join(str(error).splitlines()),
            extra=self.make_log_extra(item),
        )
        with self.executor.condition:
            item.outputs = [to_producer_record(letter)]
            self.consecutive_failures = [
                *(self.consecutive_failures if kind_of_error == self.consecutive_failure_class else []),
                item,
            ]
            self.consecutive_failure_class = kind_of_error
            if 0 < self.limits.max_consecutive_dead_letters <= len(self.consecutive_failures):
                self.fatal_error = _make_too_many_dead_letters_error(self.stage.name, letter, len(self.consecutive_failures))

    # 3 and 4: commit

    def get_finished_prefixes(self) -> dict[TopicPartition, list[InFlightRecord]]:
        """Of each partition the contiguous finished prefix, as much as one transaction takes.

        The newest dead letters in a row are held back while the stage still has work: it may show that they are no fault
        of these records.
        """
        records, size, prefixes = _MAX_COMMIT_RECORDS, _MAX_COMMIT_BYTES, {}
        with self.executor.condition:
            working = any(item.outputs is None for items in self.in_flight_records.values() for item in items)
            held = (
                set(self.consecutive_failures)
                if self.fatal_error or (working and self.limits.max_consecutive_dead_letters)
                else set()
            )
            for place, items in self.in_flight_records.items():
                prefix: list[InFlightRecord] = []
                for item in items:
                    if item.outputs is None or item in held or records <= 0 or size <= 0:
                        break
                    prefix.append(item)
                    records -= 1
                    size -= sum(len(message.value or b"") for message in item.outputs)
                if prefix:
                    prefixes[place] = prefix
        return prefixes

    def commit(self) -> None:
        """Write everything that is finished and in order, in as few transactions as its size needs."""
        if self.commit_uncertain:
            self.resolve_uncertain_commit()
        while prefixes := self.get_finished_prefixes():
            outputs = [message for items in prefixes.values() for item in items for message in item.outputs or []]
            offsets = {place: items[-1].consumer_record.offset + 1 for place, items in prefixes.items()}
            epochs = {place: items[-1].epoch for place, items in prefixes.items()}
            try:
                with self.call_tracker.track("commit"):
                    self.writer.commit(outputs, offsets, consumer=self.consumer, epochs=epochs)
            except CommitUncertain as error:
                logger.warning("%s asks the log how far it came: %s", self.stage.name, error)
                self.commit_uncertain = True
                self.resolve_uncertain_commit()
                return
            except PartitionLost:
                self.drop_lost_partitions(self.consumer.assignment())
                return
            if logger.isEnabledFor(logging.INFO):
                for item in (item for items in prefixes.values() for item in items):
                    logger.info(
                        "%s has finished %s",
                        self.stage.name,
                        format_coordinates(item.consumer_record),
                        extra=self.make_log_extra(item),
                    )
            self.clear_crash_count(item for items in prefixes.values() for item in items)
            self.drop_committed(offsets)
            self.num_committed += sum(len(items) for items in prefixes.values())
            self.num_written += len(outputs)

    def clear_crash_count(self, items: Iterable[InFlightRecord]) -> None:
        """What is committed kills nobody any more."""
        if not self.journal or not self.poison_candidates:
            return
        known = [item.consumer_record for item in items if make_coordinates_key(item.consumer_record) in self.poison_candidates]
        self.journal.clear_crash_count(known)
        for message in known:
            del self.poison_candidates[make_coordinates_key(message)]

    def drop_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Drop the records below these offsets: they are committed."""
        with self.executor.condition:
            for place, offset in offsets.items():
                items = self.in_flight_records.get(place, deque())
                while items and items[0].consumer_record.offset < offset:
                    items.popleft().is_dropped = True

    def resolve_uncertain_commit(self) -> None:
        """After a commit in doubt: a new writer settles the old transaction, then the log says what really landed.

        Results above the committed offsets are still good and are kept; nothing is inferred twice and nothing seeks.
        """
        with self.call_tracker.track("settling a commit in doubt"):
            with suppress(CommitUncertain):
                self.writer.close()
            self.writer = self.bus.open_writer(f"{self.group}.{self.instance}")
            self.drop_committed(self.consumer.committed())
        self.commit_uncertain = False


class PoisonRecordError(Exception):
    """Process after process died while working on one record."""


def _make_too_many_dead_letters_error(stage: str, letter: DeadLetter, count: int) -> TooManyDeadLetters:
    return TooManyDeadLetters(
        f"{stage} stops: {count} records in a row failed in the same way ({letter.error_class})",
        letter.error_message,
        "mend what they have in common and start again: they are not committed, and nothing is lost"
        " (worker.max_consecutive_dead_letters=0 never stops)",
    )
