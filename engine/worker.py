"""Run the worker loop. A stage reads its topics, processes batches, and commits its outputs together with its offsets.

One thread per stage runs `Worker.run`:

1. poll at least once a second, even while the model is busy, and decode the records;
2. queue valid records for the stage's `ModelExecutor`, and make a dead letter of each record that cannot be decoded;
3. find, in each partition, the finished records before the first unfinished record;
4. write the outputs of these records, their dead letters and the next offsets in one short transaction (`Writer.commit`).

A transaction mostly waits for the log. So a second thread writes it, while the first thread polls. A stage has one transaction at a
time. If two were open, the second one could commit offsets above those of a first one that fails.

Model calls never run inside a transaction. They run in the threads of a `ModelExecutor`. Each model has one executor. The
executor serves the stage that is furthest downstream first, so that chains in progress finish before new chains start. A stage
never commits results of a partition that it has lost. After an uncertain commit the stage opens a new writer and reads the
committed offsets from the log.

A record becomes a dead letter if it fails `max_attempts` times when it is processed alone. A record that crashes several
processes also becomes a dead letter (`engine.crash_journal`). If a dependency fails (an unreachable server, no memory), the
stage pauses, and the attempt is not counted. Many consecutive dead letters of one error class indicate a common cause. The
stage then stops and does not commit these dead letters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from engine.backoff import compute_backoff
from engine.bus.port import Bus, ConsumerRecord, Offsets, ProducerRecord, TopicPartition, Writer
from engine.crash_journal import CrashCount, CrashJournal
from engine.dead_letters import make_dead_letter
from engine.erasures import ErasedPrompts
from engine.errors import (
    CharterError,
    CommitUncertain,
    DependencyUnreachable,
    OffsetsLost,
    PartitionLost,
    PermanentRecordError,
    TooManyDeadLetters,
    UsageError,
)
from engine.logs import format_coordinates, get_coordinates
from engine.pacing import PacedAdmission
from engine.positions import TARGET_STAGE_HEADER, PartitionStart, PositionFinder, make_source_header
from engine.run_starts import StartPositions, ensure_run_start
from engine.topic_guard import TopicGuard
from engine.watchdog import CallTracker
from schemas.codec import RecordError, decode_record, encode_record
from schemas.records import DeadLetter, DeadLetterKind, Record
from schemas.topics import MAX_RECORD_BYTES, TOPICS

logger = logging.getLogger("charter.worker")

_IDLE_POLL_TIMEOUT_S = 0.5
_BUSY_POLL_TIMEOUT_S = 0.005
_BUSY_WAIT_S = 0.02
_PAUSE_REPORT_INTERVAL_S = 30.0
_MAX_COMMIT_RECORDS = 500
_MAX_COMMIT_BYTES = 16 * 1024 * 1024
_RESUME_SHARE = 0.75


@dataclass(frozen=True)
class Stage:
    """A stage: its topics, and a function that maps a batch of records to the outputs of each record.

    Topics are served in the order of `inputs`. An executor serves stages with a higher `priority` first. A stage that is
    further downstream has a higher priority. `process` gets at most `max_batch_size` records. For each record it returns the
    outputs or an error. An error of one record does not affect the outputs of the others. A DependencyUnreachable pauses the stage
    and the record is processed again. Any other error counts as an attempt of the record. If `process` raises an error instead,
    the error applies to the whole batch. With `first_per_key`, a record is skipped if the run has an earlier record with the same
    prompt id as its key.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    priority: int
    max_batch_size: int
    process: Callable[[Sequence[Record]], Sequence[Sequence[Record] | CharterError]]
    first_per_key: bool = False


@dataclass(frozen=True)
class WorkerLimits:
    """Limits on the records that a worker holds and on its retries. Times are in seconds.

    `max_in_flight` and `max_in_flight_bytes` are the limits of the records that are read and not committed. `max_uncommitted` is the
    limit of those that are also in a batch or finished. A crash repeats their model calls. Finished records wait for a transaction,
    or for an unfinished record before them.
    """

    max_in_flight: int = 1024
    max_in_flight_bytes: int = 64 * 1024 * 1024
    max_uncommitted: int = 768
    max_attempts: int = 3
    retry_timeout_s: float = 600.0  # a record that still fails after this time becomes a dead letter
    max_consecutive_dead_letters: int = 10  # 0 means no limit


@dataclass(eq=False, slots=True)
class InFlightRecord:
    """A record that a stage has read but not yet committed. `outputs` is None until the record is finished."""

    consumer_record: ConsumerRecord
    epoch: int
    read_at: float = 0.0  # on the monotonic clock
    record: Record | None = None
    outputs: list[ProducerRecord] | None = None
    attempts: int = 0
    other_run_id: str = ""  # the run of a record that this worker does not process
    is_erased: bool = False  # the prompt of the record was erased
    crash_count: CrashCount | None = None  # set if processes ended while they processed this record
    is_isolated: bool = False  # process this record alone, because its batch failed and the failing record must be found
    is_dropped: bool = False  # the partition was lost, or the record is committed
    first_failed_at: float = 0.0  # on the monotonic clock; 0 means that the record has not failed
    retry_at: float = 0.0

    @property
    def topic_partition(self) -> TopicPartition:
        return self.consumer_record.topic_partition

    @property
    def num_bytes(self) -> int:
        return len(self.consumer_record.value or b"")


@dataclass(frozen=True)
class OpenTransaction:
    """A transaction that a second thread writes. `result` is None, or has the error of `Writer.commit` or of the topic guard."""

    items: Sequence[InFlightRecord]
    outputs: Sequence[ProducerRecord]
    offsets: Offsets
    epochs: Offsets
    result: Future[None] = field(default_factory=Future)


# Arguments: the input record, its outputs, and the start of processing in nanoseconds since 1970. Result: the outputs with
# trace headers.
TraceFunction = Callable[[ConsumerRecord, list[ProducerRecord], int], list[ProducerRecord]]


def skip_tracing(consumer_record: ConsumerRecord, outputs: list[ProducerRecord], started_ns: int) -> list[ProducerRecord]:
    """Return the outputs unchanged. The worker uses this trace function when tracing is off."""
    return outputs


def to_producer_record(record: Record) -> ProducerRecord:
    """Return a record as the producer sends it: the key, the encoded value, and the run id in a header."""
    return ProducerRecord(record.topic, record.key, encode_record(record), (("run", record.run_id.encode()),))


@dataclass
class ModelExecutor:
    """The threads of one model. `condition` guards the queues of all its workers."""

    name: str
    num_threads: int = 1
    downstream_wait_s: float = 0.15
    workers: list[Worker] = field(default_factory=list)
    condition: threading.Condition = field(default_factory=threading.Condition)

    def run(self, stop: threading.Event) -> None:
        """Process batches in one thread until `stop`. The batch that is furthest downstream is processed first."""
        while not stop.is_set():
            with self.condition:
                selected = self.select_batch()
                if selected is None:
                    self.condition.wait(_BUSY_WAIT_S)
                    continue
                worker, items = selected
            worker.process_batch(items)
            self.wait_for_downstream(worker.stage, stop)

    def select_batch(self) -> tuple[Worker, list[InFlightRecord]] | None:
        for worker in sorted(self.workers, key=lambda worker: -worker.stage.priority):
            if items := worker.take_batch():
                return worker, items
        return None

    def wait_for_downstream(self, stage: Stage, stop: threading.Event) -> None:
        """Wait for a short time until a downstream stage has read the new outputs.

        Without the wait, a stage that comes before this stage would often occupy the model first, for several seconds.
        """
        readers = [w for w in self.workers if set(w.stage.inputs) & set(stage.outputs)]
        deadline = time.monotonic() + self.downstream_wait_s
        with self.condition:
            while readers and not any(reader.num_queued for reader in readers) and not stop.is_set():
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or not self.condition.wait(remaining_s):
                    return


class PauseReport:
    """Logs the pauses of a stage: a new reason at once, the same reason at intervals, and the end of several pauses."""

    def __init__(self, stage: str) -> None:
        self.stage, self.reason = stage, ""
        self.started = self.logged_at = 0.0
        self.num_pauses = 0  # since the last success

    def add(self, reason: str, pause_s: float) -> None:
        now = time.monotonic()
        if not self.num_pauses:
            self.started = now
        self.num_pauses += 1
        if reason != self.reason:
            logger.warning("%s pauses %.1f s: %s", self.stage, pause_s, reason)
        elif now - self.logged_at >= _PAUSE_REPORT_INTERVAL_S:
            logger.warning("%s still pauses after %.0f s, for the same reason", self.stage, now - self.started)
        else:
            return
        self.reason, self.logged_at = reason, now

    def end(self) -> None:
        """Log the end of the pauses. One pause needs no line, because its line has its length."""
        if self.num_pauses > 1:
            logger.warning("%s continues after a pause of %.0f s", self.stage, time.monotonic() - self.started)
        self.num_pauses = 0


class Worker:
    """One instance of a stage.

    A separate thread runs `run`. The threads of the executor call `take_batch` and `process_batch`; they hold
    `executor.condition` when they call `take_batch`.
    """

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
        run_start: StartPositions | None = None,
        pacing: PacedAdmission | None = None,
    ) -> None:
        self.bus, self.stage, self.executor, self.run_id, self.trace = bus, stage, executor, run_id, trace
        self.group, self.stage_header = f"{run_id}.{stage.name}", stage.name.encode()
        self.instance, self.limits, self.journal, self.can_admit = instance, limits or WorkerLimits(), journal, can_admit
        self.pacing = pacing
        if pacing:
            pacing.max_pending = stage.max_batch_size * executor.num_threads
        # One tracker for each thread: the one that polls, and the one that writes a transaction.
        self.call_tracker, self.commit_tracker = (CallTracker(f"{stage.name} ({instance})") for _ in range(2))
        self.in_flight_records: defaultdict[TopicPartition, deque[InFlightRecord]] = defaultdict(deque)
        self.in_flight_bytes = 0
        self.epochs: Offsets = {}  # the assignment at the last poll
        self.transaction: OpenTransaction | None = None
        self.progress = threading.Event()  # set when a batch or a transaction has ended
        self.queues: dict[str, deque[InFlightRecord]] = {topic: deque() for topic in stage.inputs}
        self.retry_queue: list[InFlightRecord] = []  # records that wait for their next attempt
        self.awaited_retry: InFlightRecord | None = None  # the last one for which the whole stage waited
        self.num_waits_for_retry = 0
        if journal:
            journal.clear_committed(bus.committed(self.group, stage.inputs))
        self.poison_candidates = journal.crash_counts() if journal else {}
        self.num_processing = 0  # records that the executor has taken
        self.is_processing_candidate = False
        # The most recent dead letters, if they have the same error class and no batch succeeded between them.
        self.consecutive_failures: list[InFlightRecord] = []
        self.consecutive_failure_class = ""
        self.fatal_error: CharterError | None = None
        self.num_consecutive_pauses = 0
        self.paused_until = 0.0
        self.pause_report = PauseReport(stage.name)
        self.partitions_paused = False
        self.admission_closed = False  # true while the budget allows no new work
        self.commit_uncertain = False
        self.erased_prompts = ErasedPrompts(bus)
        self.num_erased = 0  # committed records of erased prompts, which this worker did not process
        self.num_of_other_runs: Counter[str] = Counter()  # committed records of other runs, which this worker did not process
        self.num_duplicates = 0  # records that were skipped because of `first_per_key`
        self.num_committed = 0  # input records
        self.num_written = 0  # output records
        self.num_transactions = 0  # with records
        self.num_dead_letters = self.num_pauses = self.num_batches = self.num_tokens = 0
        self.batch_seconds = 0.0
        self.idle_positions: Offsets = {}  # the positions at the last poll, if no record was in flight
        self.idle_committed: Offsets = {}  # the positions of the last commit without records in flight
        self.positions: Offsets = {}  # the next offsets to read, at the time of the last poll
        self.run_start = run_start or ensure_run_start(bus, run_id)
        self.consumer = bus.open_consumer(self.group, stage.inputs, member=instance, hold_new=True)
        topic_ids = self.consumer.topic_ids
        self.topic_guard = TopicGuard(bus, topic_ids)
        self.position_finder = PositionFinder(
            bus, self.run_start, stage.name, topic_ids, stage.outputs, needs_keys=stage.first_per_key
        )
        # The epochs of the partitions whose start is being looked up, and the result.
        self.pending_starts: tuple[Offsets, Future[dict[TopicPartition, PartitionStart]]] | None = None
        self.seen_keys: dict[TopicPartition, set[bytes]] = {}
        self.writer = self.open_writer()
        executor.workers.append(self)

    def open_writer(self) -> Writer:
        topics = [*self.stage.outputs, DeadLetter.topic]
        return self.bus.open_writer(f"{self.group}.{self.instance}", topics=topics, group=self.group)

    def run(self, stop: threading.Event) -> None:
        """Poll and commit until `stop`. Then commit the finished records."""
        bus_failures = 0
        try:
            while not stop.is_set() and not self.fatal_error:
                try:
                    self.topic_guard.verify_at_interval()
                    self.poll()
                    self.commit()
                    self.commit_idle_positions()
                    bus_failures = 0
                except (DependencyUnreachable, CommitUncertain) as error:  # from the log or the schema registry
                    self.commit_uncertain |= isinstance(error, CommitUncertain)
                    logger.warning("%s waits: %s", self.stage.name, error.what)
                    stop.wait(compute_backoff(bus_failures))
                    bus_failures += 1
            self.commit()
            while self.transaction:
                self.wait_for_transaction()
                self.commit()
            if self.fatal_error:
                raise self.fatal_error
        finally:
            self.position_finder.cancelled.set()
            self.wait_for_transaction()
            if self.pacing:
                self.pacing.close()
            with self.call_tracker.track("closing"):
                self.consumer.close()
                self.writer.close()

    # 1 and 2: read

    @property
    def num_in_flight(self) -> int:
        return sum(len(items) for items in self.in_flight_records.values())

    @property
    def num_queued(self) -> int:
        return sum(len(queue) for queue in self.queues.values())

    def poll(self) -> None:
        """Read new records and queue them.

        If the stage is full, its partitions are paused. The worker continues to poll, because a member that does not poll is
        removed from the group.
        """
        max_records = self.apply_backpressure()
        # While records are in flight, a long poll would delay their commit.
        timeout_s = _BUSY_POLL_TIMEOUT_S if self.num_in_flight else _IDLE_POLL_TIMEOUT_S
        if self.num_in_flight and self.partitions_paused:
            self.progress.wait(_BUSY_WAIT_S)
            timeout_s = 0.0
        self.progress.clear()
        with self.call_tracker.track("poll"):
            try:
                consumer_records = self.consumer.poll(timeout_s, max_records)
            except OffsetsLost:
                self.topic_guard.verify()  # offsets of a deleted topic do not exist in the new topic
                raise
            read_at = time.monotonic()
            self.start_held_partitions()
        epochs = self.consumer.assignment()
        if epochs != self.epochs:
            self.drop_lost_partitions(epochs)
            self.epochs = epochs
        items = [item for item in self.decode_records(consumer_records, epochs, read_at) if item.epoch >= 0]
        if self.stage.first_per_key:
            self.skip_duplicates(items)
        with self.executor.condition:
            for item in items:
                self.in_flight_records[item.topic_partition].append(item)
                self.in_flight_bytes += item.num_bytes
                if item.outputs is None and item.retry_at:
                    self.retry_queue.append(item)
                elif item.outputs is None:
                    self.queues[item.consumer_record.topic].append(item)
            self.executor.condition.notify_all()
        if not consumer_records:
            self.positions = self.consumer.positions()
        # If no record is in flight, all records below the current positions are finished. A held partition has no position yet.
        held = self.consumer.held()
        is_idle = not consumer_records and not self.num_in_flight and not self.transaction
        self.idle_positions = {tp: offset for tp, offset in self.positions.items() if tp not in held} if is_idle else {}

    def start_held_partitions(self) -> None:
        """Look up the start of newly assigned partitions in the background, and start the partitions that have a result."""
        if self.pending_starts is None:
            held = self.consumer.held()
            if not held:
                return
            committed = self.consumer.committed()
            self.pending_starts = held, self.position_finder.find_in_background({tp: committed.get(tp) for tp in held})
        epochs, future = self.pending_starts
        if not future.done():
            return
        self.pending_starts = None
        held = self.consumer.held()
        for tp, start in future.result().items():
            if held.get(tp) == epochs[tp]:
                self.seen_keys[tp] = start.seen_keys
                self.consumer.start(tp, start.offset)

    def skip_duplicates(self, items: Sequence[InFlightRecord]) -> None:
        """Finish each record whose key an earlier record of the run has. Retried dead letters are never skipped.

        This function is called after the whole batch is decoded, so it never sees a record twice.
        """
        for item in items:
            consumer_record, record = item.consumer_record, item.record
            is_retry = any(name == TARGET_STAGE_HEADER for name, _ in consumer_record.headers)
            if record is None or is_retry or record.run_id != self.run_id or consumer_record.key != record.key:
                continue
            seen = self.seen_keys[item.topic_partition]
            if record.key not in seen or item.outputs is not None:
                seen.add(record.key)
                continue
            item.outputs, item.retry_at = [], 0.0
            if not self.num_duplicates:
                logger.warning(
                    "%s skips %s and further records like it: prompt %s is already on the topic, and the first record counts",
                    self.stage.name,
                    format_coordinates(consumer_record),
                    record.prompt_id,
                    extra=self.make_log_extra(item),
                )
            self.num_duplicates += 1

    def decode_records(
        self, consumer_records: Sequence[ConsumerRecord], epochs: Mapping[TopicPartition, int], read_at: float
    ) -> list[InFlightRecord]:
        """Decode records. If decoding needs an unreachable dependency, seek back, so that the records are read again later."""
        try:
            self.erased_prompts.refresh()
            return [self.decode_record(consumer_record, epochs, read_at) for consumer_record in consumer_records]
        except DependencyUnreachable:
            for consumer_record in reversed(consumer_records):  # the last seek of each partition is to its first record
                with suppress(PartitionLost):
                    self.consumer.seek(consumer_record.topic_partition, consumer_record.offset)
            raise

    def apply_backpressure(self) -> int:
        """Pause all assigned partitions while the stage is full or the budget allows no new work.

        Return the number of records that the stage can read, at least 1.
        """
        share = _RESUME_SHARE if self.partitions_paused else 1.0  # a lower limit for resuming avoids frequent switching
        limits, num_in_flight = self.limits, self.num_in_flight
        is_full = num_in_flight >= limits.max_in_flight * share or self.in_flight_bytes >= limits.max_in_flight_bytes * share
        self.admission_closed = not self.can_admit()
        if self.pacing:
            self.refresh_pacing(self.pacing)
        if is_full or self.admission_closed:
            self.consumer.pause(list(self.consumer.assignment()))
            self.partitions_paused = True
        elif self.partitions_paused:
            self.consumer.resume(list(self.consumer.assignment()))
            self.partitions_paused = False
        return max(1, limits.max_in_flight - num_in_flight)

    def refresh_pacing(self, pacing: PacedAdmission) -> None:
        """Read the allowance of the training loop, and the responses since then. Held records stay in their queue."""
        with self.call_tracker.track("pacing"):
            pacing.refresh()
        with self.executor.condition:
            waiting = {id(item) for queue in self.queues.values() for item in queue} | {id(item) for item in self.retry_queue}
            pacing.set_pending(
                item.record
                for items in self.in_flight_records.values()
                for item in items
                if item.record is not None and item.outputs != [] and id(item) not in waiting
            )
            self.executor.condition.notify_all()

    def decode_record(
        self, consumer_record: ConsumerRecord, epochs: Mapping[TopicPartition, int], read_at: float
    ) -> InFlightRecord:
        """Decode a record. If it cannot be decoded, make a dead letter.

        A record for another run or stage, or of an erased prompt, gets no outputs.
        """
        epoch = epochs.get(consumer_record.topic_partition, -1)
        item = InFlightRecord(consumer_record, epoch, read_at)
        if dict(consumer_record.headers).get(TARGET_STAGE_HEADER, self.stage_header) != self.stage_header:
            item.outputs = []
            return item
        if self.erased_prompts.covers(consumer_record):
            item.is_erased, item.outputs = True, []
            return item
        try:
            item.record = decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class)
        except RecordError as error:
            self.send_to_dead_letter(item, DeadLetterKind.DECODE, error)
            return item
        if item.record.run_id != self.run_id:
            item.other_run_id, item.outputs = item.record.run_id, []
        elif item.record.prompt_id in self.erased_prompts.prompt_ids:  # the key of an external producer can be another id
            item.is_erased, item.outputs = True, []
        elif self.poison_candidates:
            self.check_poison_candidate(item)
        return item

    def check_poison_candidate(self, item: InFlightRecord) -> None:
        """If processes ended while they processed this record, pause, and then process the record alone. If the record
        caused these ends, make it a dead letter."""
        assert self.journal is not None, "candidates come from the journal"
        count = self.poison_candidates.get(self.journal.make_key(item.consumer_record))
        if count is None:
            return
        item.is_isolated, item.crash_count, item.attempts = True, count, count.ends
        if count.is_conclusive:
            self.send_to_dead_letter(item, DeadLetterKind.CRASH, PoisonRecordError(count.describe()))
        elif count.ends:
            pause_s = compute_backoff(count.ends)
            item.retry_at = time.monotonic() + pause_s
            logger.warning(
                "%s processes %s alone in %.1f s: %s",
                self.stage.name,
                format_coordinates(item.consumer_record),
                pause_s,
                count.describe(),
            )

    def drop_lost_partitions(self, epochs: Mapping[TopicPartition, int]) -> None:
        """Drop the records of lost partitions. Lost partitions include partitions that were lost and then assigned again."""
        with self.executor.condition:
            for tp, items in self.in_flight_records.items():
                for item in items:
                    item.is_dropped = item.epoch != epochs.get(tp)
            for tp in list(self.in_flight_records):
                self.in_flight_records[tp] = deque(item for item in self.in_flight_records[tp] if not item.is_dropped)
            self.in_flight_bytes = sum(item.num_bytes for items in self.in_flight_records.values() for item in items)
            for topic, queue in self.queues.items():
                self.queues[topic] = deque(item for item in queue if not item.is_dropped)
            self.retry_queue = [item for item in self.retry_queue if not item.is_dropped]
            self.consecutive_failures = [item for item in self.consecutive_failures if not item.is_dropped]

    # Called by the executor's threads: process batches

    def take_batch(self) -> list[InFlightRecord]:
        """Return the next batch, from the first topic that has queued records. Return an empty list during a pause.

        The caller must hold `executor.condition`.
        """
        now = time.monotonic()
        if now < self.paused_until or self.fatal_error or self.admission_closed or self.is_processing_candidate:
            return []
        self.requeue_retries(now)
        if self.must_wait_for_commit():
            return []
        for topic in self.stage.inputs:
            if items := self.take_from_queue(self.queues[topic]):
                self.num_processing += len(items)
                return items
        return []

    def must_wait_for_commit(self) -> bool:
        """Return whether no batch may start because of `max_uncommitted`. The caller must hold `executor.condition`.

        A batch may start if nothing else leads to a commit: then the finished records wait for the head of the queue.
        """
        # All records in flight that do not wait for a batch are in a batch or finished.
        num_uncommitted = self.num_in_flight - self.num_queued - len(self.retry_queue)
        if num_uncommitted < self.limits.max_uncommitted:
            return False
        if self.num_processing or self.transaction or self.get_finished_prefixes():
            return True
        if any(queue and queue[0].attempts for queue in self.queues.values()):  # the time of a retry has come
            return False
        if self.retry_queue:
            self.report_wait_for_retry(num_uncommitted)
        return bool(self.retry_queue)

    def report_wait_for_retry(self, num_finished: int) -> None:
        """Log and count that the stage waits for the retry of a record, once for each record."""
        item = min(self.retry_queue, key=lambda item: item.retry_at)
        if item is self.awaited_retry:
            return
        self.awaited_retry = item
        self.num_waits_for_retry += 1
        logger.warning(
            "%s waits up to %.1f s for the next attempt of %s: %d finished records cannot be committed before it"
            " (worker.max_uncommitted)",
            self.stage.name,
            max(0.0, item.retry_at - time.monotonic()),
            format_coordinates(item.consumer_record),
            num_finished,
            extra=self.make_log_extra(item),
        )

    def take_from_queue(self, queue: deque[InFlightRecord]) -> list[InFlightRecord]:
        """Remove the next batch from a queue. Records that are held (engine/pacing.py) stay in the queue, in their order."""
        items, held = list[InFlightRecord](), list[InFlightRecord]()
        while queue and len(items) < self.stage.max_batch_size:
            head = queue[0]
            # A candidate is processed alone, so that the crash journal names only this record.
            if head.is_isolated and (items or (head.crash_count and self.num_processing)):
                break
            queue.popleft()
            if self.pacing and head.record is not None and not self.pacing.admit(head.record):
                held.append(head)
                continue
            items.append(head)
            if head.is_isolated:
                self.is_processing_candidate = head.crash_count is not None
                break
        queue.extendleft(reversed(held))
        return items

    def requeue_retries(self, now: float) -> None:
        """Move the records whose retry time has passed to the head of their queues."""
        for item in self.retry_queue:
            if item.retry_at <= now:
                self.queues[item.consumer_record.topic].appendleft(item)
        self.retry_queue = [item for item in self.retry_queue if item.retry_at > now]

    def process_batch(self, items: list[InFlightRecord]) -> None:
        """Run the stage on a batch. While it runs, the crash journal contains the coordinates of the batch."""
        try:
            if self.journal is None:
                self.run_stage(items)
                return
            consumer_records = [item.consumer_record for item in items]
            try:
                self.journal.mark_started(consumer_records)
            except OSError as error:  # for example, the disk is full: the records are not the cause
                self.pause_stage(items, error)
                return
            try:
                self.run_stage(items)
            finally:
                self.journal.mark_finished(consumer_records)
        finally:
            with self.executor.condition:
                self.num_processing -= len(items)
                self.is_processing_candidate = False
            self.progress.set()

    def run_stage(self, items: list[InFlightRecord]) -> None:
        """Process a batch and finish its records. The result of each record counts separately.

        The class of an error decides whether to pause the stage, retry the record, or make it a dead letter. An error that the
        stage raises applies to the whole batch.
        """
        records = [item.record for item in items if item.record is not None]
        started_ns, started = time.time_ns(), time.monotonic()
        try:
            results = self.stage.process(records)
            if len(results) != len(items):
                raise AssertionError(f"{self.stage.name} returned {len(results)} results for {len(items)} records")
            # The outputs of each record, or its error.
            outputs = [
                result if isinstance(result, CharterError) else [to_producer_record(record) for record in result]
                for result in results
            ]
        except (DependencyUnreachable, MemoryError) as error:
            self.pause_stage(items, error)
        except UsageError:
            raise  # a setting is wrong, so every record would fail: stop the stage and do not commit the batch
        except Exception as error:  # any other error is treated as a failure of the record
            self.handle_failure(items, error)
        else:
            self.note_batch([result for result in results if not isinstance(result, CharterError)], time.monotonic() - started)
            self.finish_records(
                (item, self.trace(item.consumer_record, item_outputs, started_ns))
                for item, item_outputs in zip(items, outputs, strict=True)
                if not isinstance(item_outputs, CharterError)
            )
            self.handle_record_errors(
                [(item, error) for item, error in zip(items, outputs, strict=True) if isinstance(error, CharterError)],
                has_successes=any(not isinstance(result, CharterError) for result in results),
            )

    def note_batch(self, results: Sequence[Sequence[Record]], duration_s: float) -> None:
        """Count a batch. A success shows that the dependencies are available, and that earlier failures have no common cause."""
        with self.executor.condition:
            if results:
                self.num_consecutive_pauses = 0
                self.consecutive_failures = []
                self.pause_report.end()
            self.num_batches += 1
            self.batch_seconds += duration_s
            self.num_tokens += sum(record.prompt_tokens + record.completion_tokens for result in results for record in result)

    def handle_record_errors(self, failed: Sequence[tuple[InFlightRecord, CharterError]], has_successes: bool) -> None:
        """Handle the failed records of a batch whose other records have results."""
        waiting = [(item, error) for item, error in failed if isinstance(error, DependencyUnreachable)]
        if waiting:
            self.pause_stage([item for item, _ in waiting], waiting[0][1])
        for item, error in failed:
            if isinstance(error, UsageError):
                raise error
            if not isinstance(error, DependencyUnreachable):
                self.handle_failure([item], error)
                if has_successes:  # the server answers others, so the failures of this batch have no common cause
                    with self.executor.condition:
                        self.consecutive_failures = []

    def finish_records(self, finished: Iterable[tuple[InFlightRecord, list[ProducerRecord]]]) -> None:
        """Set the outputs of records. If an output is larger than MAX_RECORD_BYTES, make a dead letter instead."""
        accepted = []
        for item, outputs in finished:
            oversized = next((output for output in outputs if len(output.value or b"") > MAX_RECORD_BYTES), None)
            if oversized:
                error = ValueError(f"the output record for {oversized.topic} has {len(oversized.value or b'')} bytes")
                self.send_to_dead_letter(item, DeadLetterKind.TOO_LARGE, error)
                continue
            item.is_erased = self.erased_prompts.covers(item.consumer_record)  # the prompt may have been erased in the meantime
            accepted.append((item, [] if item.is_erased else self.address_outputs(item.consumer_record, outputs)))
        with self.executor.condition:
            for item, outputs in accepted:
                item.outputs = outputs

    def pause_stage(self, items: list[InFlightRecord], error: Exception) -> None:
        """Requeue a batch and pause the stage, because a dependency is unavailable. Each consecutive pause is longer."""
        wait = compute_backoff(self.num_consecutive_pauses)
        self.num_consecutive_pauses += 1
        self.num_pauses += 1
        reason = "; ".join(str(error).splitlines()) if isinstance(error, CharterError) else f"{type(error).__name__}: {error}"
        self.pause_report.add(reason, wait)
        self.requeue_batch(items)
        self.paused_until = time.monotonic() + wait

    def handle_failure(self, items: list[InFlightRecord], error: Exception) -> None:
        """Handle a failed batch.

        If the batch has several records, process them one by one. If it has one record, retry it or make it a dead letter.
        """
        if len(items) > 1:
            logger.info("%s: a batch of %d failed (%s); processing its records one by one", self.stage.name, len(items), error)
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
                "%s failed to process a record %d times",
                self.stage.name,
                item.attempts,
                exc_info=None if isinstance(error, CharterError) else error,  # a CharterError explains itself
                extra=self.make_log_extra(item),
            )
            self.send_to_dead_letter(item, DeadLetterKind.EXHAUSTED, error)
        else:
            item.is_isolated, item.retry_at = True, now + compute_backoff(item.attempts)
            with self.executor.condition:
                if not item.is_dropped:
                    self.retry_queue.append(item)

    def make_log_extra(self, item: InFlightRecord) -> dict[str, object]:
        """Return the run, stage and coordinates of a record, for `extra` of a logging call."""
        return {"run": self.run_id, "stage": self.stage.name} | get_coordinates(item.consumer_record)

    def requeue_batch(self, items: Iterable[InFlightRecord]) -> None:
        with self.executor.condition:
            for item in reversed(list(items)):
                if not item.is_dropped:
                    self.queues[item.consumer_record.topic].appendleft(item)

    def send_to_dead_letter(self, item: InFlightRecord, kind: DeadLetterKind, error: Exception) -> None:
        """Finish a record as a dead letter. After too many consecutive dead letters of one class, set `fatal_error`."""
        dead_letter = make_dead_letter(
            item.consumer_record, kind, error, stage=self.stage.name, run_id=self.run_id, attempts=max(1, item.attempts)
        )
        failure_class = f"{kind.value} {dead_letter.error_class}"
        self.num_dead_letters += 1
        logger.warning(
            "%s sends %s to the dead letters (%s): %s",
            self.stage.name,
            format_coordinates(item.consumer_record),
            kind.value,
            "; ".join(str(error).splitlines()),
            extra=self.make_log_extra(item),
        )
        with self.executor.condition:
            item.outputs = self.address_outputs(item.consumer_record, [to_producer_record(dead_letter)])
            previous = self.consecutive_failures if failure_class == self.consecutive_failure_class else []
            self.consecutive_failures = [*previous, item]
            self.consecutive_failure_class = failure_class
            count = len(self.consecutive_failures)
            if 0 < self.limits.max_consecutive_dead_letters <= count:
                self.fatal_error = _make_too_many_dead_letters_error(self.stage.name, dead_letter, count)

    # 3 and 4: commit

    def get_finished_prefixes(self) -> dict[TopicPartition, list[InFlightRecord]]:
        """Return the finished records before the first unfinished record of each partition, within one transaction's limits.

        Consecutive dead letters are not returned while other records are in progress. The results of these records may show
        that the dead letters have a common cause.
        """
        remaining_records, remaining_bytes, prefixes = _MAX_COMMIT_RECORDS, _MAX_COMMIT_BYTES, {}
        with self.executor.condition:
            held = set(self.consecutive_failures) if self.must_hold_failures() else set()
            for tp, items in self.in_flight_records.items():
                prefix: list[InFlightRecord] = []
                for item in items:
                    if item.outputs is None or item in held or remaining_records <= 0 or remaining_bytes <= 0:
                        break
                    prefix.append(item)
                    remaining_records -= 1
                    for output in item.outputs:
                        remaining_bytes -= len(output.value or b"")
                if prefix:
                    prefixes[tp] = prefix
        return prefixes

    def must_hold_failures(self) -> bool:
        """Return whether the consecutive dead letters are not committed yet. The caller must hold `executor.condition`."""
        if self.fatal_error:
            return True
        if not self.consecutive_failures or not self.limits.max_consecutive_dead_letters:
            return False
        return any(item.outputs is None for items in self.in_flight_records.values() for item in items)

    def commit(self) -> None:
        """Note the result of the last transaction, if it has ended. Then start a transaction with the finished prefixes."""
        committed: list[InFlightRecord] = []
        try:
            if self.transaction and self.transaction.result.done():
                transaction, self.transaction = self.transaction, None
                committed = self.note_result(transaction)
            if self.commit_uncertain and self.transaction is None:
                self.resolve_uncertain_commit()
            if self.transaction is None:
                with self.call_tracker.track("ending a hanging transaction"):
                    self.writer.end_hanging_transaction()
                if prefixes := self.get_finished_prefixes():
                    self.start_transaction(prefixes)
        finally:
            self.count_committed(committed)  # the next transaction does not wait for this

    def start_transaction(self, prefixes: Mapping[TopicPartition, Sequence[InFlightRecord]]) -> None:
        items = [item for prefix in prefixes.values() for item in prefix]
        self.transaction = OpenTransaction(
            items,
            [output for item in items for output in item.outputs or ()],
            {tp: prefix[-1].consumer_record.offset + 1 for tp, prefix in prefixes.items()},
            {tp: prefix[-1].epoch for tp, prefix in prefixes.items()},
        )
        # The thread is a daemon, because a call that hangs must not keep the process alive.
        name = f"{self.stage.name}-commit"
        threading.Thread(target=self.write_transaction, args=(self.transaction,), name=name, daemon=True).start()

    def write_transaction(self, transaction: OpenTransaction) -> None:
        """Write a transaction and set its result. A separate thread runs this function."""
        try:
            with self.commit_tracker.track("commit"):
                self.writer.commit(
                    transaction.outputs,
                    transaction.offsets,
                    consumer=self.consumer,
                    epochs=transaction.epochs,
                    # The ids are compared after the records were read, so all of them are of the topic whose offsets are committed.
                    before_commit=partial(self.topic_guard.verify_since, max(item.read_at for item in transaction.items)),
                )
        except BaseException as error:  # the thread that polls raises the error
            transaction.result.set_exception(error)
        else:
            transaction.result.set_result(None)
        self.progress.set()

    def wait_for_transaction(self) -> None:
        """Wait until the open transaction has ended. The watchdog limits this time."""
        if self.transaction:
            wait([self.transaction.result])

    def note_result(self, transaction: OpenTransaction) -> list[InFlightRecord]:
        """Remove and return the records of a transaction that was committed. Raise its error, if the worker cannot handle it."""
        try:
            transaction.result.result()
        except CommitUncertain as error:
            logger.warning("%s reads its committed offsets again: %s", self.stage.name, error)
            self.commit_uncertain = True
            return []
        except PartitionLost:
            self.drop_lost_partitions(self.consumer.assignment())
            return []
        return self.remove_committed(transaction.offsets)

    def remove_committed(self, offsets: Mapping[TopicPartition, int]) -> list[InFlightRecord]:
        """Remove and return the records below these committed offsets."""
        committed: list[InFlightRecord] = []
        with self.executor.condition:
            for tp, offset in offsets.items():
                items = self.in_flight_records[tp]
                while items and items[0].consumer_record.offset < offset:
                    item = items.popleft()
                    item.is_dropped = True
                    self.in_flight_bytes -= item.num_bytes
                    committed.append(item)
            self.executor.condition.notify_all()  # a thread of the executor may wait because of `max_uncommitted`
        return committed

    def count_committed(self, committed: Sequence[InFlightRecord]) -> None:
        """Count the records of one transaction, and log them."""
        if not committed:
            return
        if logger.isEnabledFor(logging.INFO):
            for item in committed:
                logger.info(
                    "%s has finished %s",
                    self.stage.name,
                    format_coordinates(item.consumer_record),
                    extra=self.make_log_extra(item),
                )
        self.clear_crash_count(committed)
        self.num_committed += len(committed)
        self.num_transactions += 1
        self.count_erased(committed)
        self.num_of_other_runs.update(item.other_run_id for item in committed if item.other_run_id)
        self.num_written += sum(len(item.outputs or ()) for item in committed)

    def count_erased(self, items: Iterable[InFlightRecord]) -> None:
        """Count the committed records of erased prompts, and log the first one."""
        erased = [item for item in items if item.is_erased]
        if erased and not self.num_erased:
            coordinates = format_coordinates(erased[0].consumer_record)
            logger.warning("%s skips the records of erased prompts, first %s", self.stage.name, coordinates)
        self.num_erased += len(erased)

    def address_outputs(self, consumer_record: ConsumerRecord, outputs: Sequence[ProducerRecord]) -> list[ProducerRecord]:
        """Return the outputs with their partitions, and with a header that names the input record."""
        if not outputs:
            return []
        source = make_source_header(self.stage.name, self.consumer.topic_ids[consumer_record.topic], consumer_record)
        return [
            ProducerRecord(
                output.topic,
                output.key,
                output.value,
                (*output.headers, source),
                self.run_start.choose_partition(output.topic, output.key, consumer_record),
            )
            for output in outputs
        ]

    def commit_idle_positions(self) -> None:
        """Commit the positions of a stage that has no records in flight, if the positions have changed.

        On Kafka, transaction markers also take offsets. So the end offset of a partition can be higher than the offset after
        its last record. The positions include the markers. After this commit, the committed offsets of an idle stage are
        equal to the end offsets.
        """
        assigned = self.consumer.assignment()
        offsets = {
            tp: offset for tp, offset in self.idle_positions.items() if tp in assigned and offset != self.idle_committed.get(tp)
        }
        self.idle_positions = {}
        if not offsets:
            return
        self.topic_guard.verify()
        try:
            with self.call_tracker.track("commit"):
                self.writer.commit([], offsets, consumer=self.consumer, epochs={tp: assigned[tp] for tp in offsets})
        except CommitUncertain:
            self.commit_uncertain = True  # `commit` finds out the outcome
        except PartitionLost:
            logger.info("%s lost a partition before it committed its position", self.stage.name)
        else:
            self.idle_committed |= offsets

    def clear_crash_count(self, items: Iterable[InFlightRecord]) -> None:
        """Clear the crash counts of committed records."""
        if not self.journal or not self.poison_candidates:
            return
        candidates = [item.consumer_record for item in items if item.crash_count is not None]
        self.journal.clear_crash_count(candidates)
        for consumer_record in candidates:
            self.poison_candidates.pop(self.journal.make_key(consumer_record), None)

    def resolve_uncertain_commit(self) -> None:
        """Open a new writer, and drop the records that are committed.

        The new writer completes or aborts the old transaction. Results above the committed offsets remain valid and are kept.
        So no model call is repeated, and no seek is needed.
        """
        with self.call_tracker.track("resolving an uncertain commit"):
            with suppress(CommitUncertain):
                self.writer.close()
            self.writer = self.open_writer()
            offsets = {tp: committed.offset for tp, committed in self.consumer.committed().items()}
            self.count_committed(self.remove_committed(offsets))
        self.commit_uncertain = False


class PoisonRecordError(Exception):
    """The same record crashed several processes."""


def _make_too_many_dead_letters_error(stage: str, dead_letter: DeadLetter, count: int) -> TooManyDeadLetters:
    return TooManyDeadLetters(
        f"{stage} stops: {count} consecutive records failed in the same way ({dead_letter.error_class})",
        dead_letter.error_message,
        "fix the common cause and start again: the records are not committed, and nothing is lost"
        " (worker.max_consecutive_dead_letters=0 disables this limit)",
    )
