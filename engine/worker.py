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
(`engine.journal`). Trouble with a dependency (a server that is down, no memory) pauses the stage and is nobody's fault. Dead
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

from engine.bus.port import Bus, Message, Offsets, Outgoing, TopicPartition
from engine.dead_letters import dead_letter
from engine.errors import (
    CharterError,
    CommitInDoubt,
    DeadLettersInARow,
    DependencyUnreachable,
    PartitionLost,
    PermanentRecordError,
    UsageError,
)
from engine.journal import DEADLY, Journal, coordinates
from engine.logs import place_of, written
from engine.watchdog import Calls
from schemas.codec import RecordError, decode, encode
from schemas.records import DeadLetter, DeadLetterKind, Record
from schemas.topics import MAX_RECORD_BYTES, TOPICS

log = logging.getLogger("charter.worker")

IDLE_POLL_S = 0.5
BUSY_POLL_S = 0.02
COMMIT_RECORDS = 500
COMMIT_BYTES = 16 * 1024 * 1024
BACKOFF_S = (0.5, 30.0)  # first and longest pause after trouble with a dependency
ONLY = "only-stage"  # the header of a message that is meant for one stage alone (a dead letter that is tried again)


@dataclass(frozen=True)
class Stage:
    """What one stage is: its topics and a function from a batch of records to each one's outputs.

    `inputs` are served in their order. `rank` is the place in the stream: a lane serves higher ranks first. `batch` is the
    most records that `work` takes at once.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rank: int
    batch: int
    work: Callable[[Sequence[Record]], Sequence[Sequence[Record]]]


@dataclass(frozen=True)
class Limits:
    """How much a worker holds, and when it gives up. Times are in seconds."""

    in_flight: int = 256  # records that are read but not yet committed
    in_flight_bytes: int = 64 * 1024 * 1024
    attempts: int = 3
    record_s: float = 600.0  # from a record's first failure to its dead letter, whatever the attempts
    dead_in_a_row: int = 10  # 0: never stop for them


@dataclass(eq=False)
class Item:
    """One message on its way through a stage; `outputs` is None until it is finished."""

    message: Message
    epoch: int
    record: Record | None = None
    outputs: list[Outgoing] | None = None
    attempts: int = 0
    alone: bool = False  # its batch failed: try it by itself, to find whose fault it is
    dropped: bool = False  # its partition went to someone else
    failed_at: float = 0.0  # the first time, on the monotonic clock
    not_before: float = 0.0

    @property
    def place(self) -> TopicPartition:
        return TopicPartition(self.message.topic, self.message.partition)


# What came in, what goes out because of it, and when the work on it began (nanoseconds since 1970) -> what goes out, traced.
Trace = Callable[[Message, list[Outgoing], int], list[Outgoing]]


def untraced(message: Message, outputs: list[Outgoing], started_ns: int) -> list[Outgoing]:
    return outputs


def outgoing(record: Record) -> Outgoing:
    """A record as a message: key, bytes, and the run in a header."""
    return Outgoing(record.topic, record.key, encode(record), (("run", record.run_id.encode()),))


def backoff(failures: int) -> float:
    """Exponential with full jitter, in seconds."""
    first, longest = BACKOFF_S
    return random.uniform(0, min(longest, first * 2**failures))


@dataclass
class Lane:
    """The threads of one model. `changed` guards the queues of all its workers."""

    name: str
    threads: int = 1
    linger_s: float = 0.15
    workers: list[Worker] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self, stop: threading.Event) -> None:
        """One thread of the lane: serve the furthest-downstream ready batch until `stop`."""
        while not stop.is_set():
            with self.changed:
                chosen = self.choose()
                if chosen is None:
                    self.changed.wait(BUSY_POLL_S)
                    continue
                worker, items = chosen
            worker.process(items)
            self.linger(worker.stage, stop)

    def choose(self) -> tuple[Worker, list[Item]] | None:
        for worker in sorted(self.workers, key=lambda worker: -worker.stage.rank):
            if items := worker.take():
                return worker, items
        return None

    def linger(self, stage: Stage, stop: threading.Event) -> None:
        """Give the readers of what was just made a moment to see it, before an earlier stage takes the model for seconds."""
        readers = [w for w in self.workers if set(w.stage.inputs) & set(stage.outputs)]
        deadline = time.monotonic() + self.linger_s
        with self.changed:
            while readers and not any(reader.queued for reader in readers) and not stop.is_set():
                left = deadline - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    return


class Worker:
    """One copy of a stage. `run` is its thread; the lane's threads call `take` (holding `lane.changed`) and `process`."""

    def __init__(
        self,
        bus: Bus,
        stage: Stage,
        lane: Lane,
        *,
        run_id: str,
        slot: str,
        limits: Limits | None = None,
        journal: Journal | None = None,
        admits: Callable[[], bool] = lambda: True,
        trace: Trace = untraced,
    ) -> None:
        self.bus, self.stage, self.lane, self.run_id, self.trace = bus, stage, lane, run_id, trace
        self.group = f"{run_id}.{stage.name}"
        self.slot, self.limits, self.journal, self.admits = slot, limits or Limits(), journal, admits
        self.calls = Calls(f"{stage.name} ({slot})")
        self.flight: dict[TopicPartition, deque[Item]] = {}
        self.queues: dict[str, deque[Item]] = {topic: deque() for topic in stage.inputs}
        self.retries: list[Item] = []  # those that wait until they are tried again
        self.suspects = journal.deaths() if journal else {}
        self.streak: list[Item] = []  # the newest dead letters of one class, with nothing good between them
        self.streak_class = ""
        self.fatal: CharterError | None = None
        self.failures = 0
        self.pause_until = 0.0
        self.paused = False  # its partitions are
        self.closed = False  # it may begin nothing new
        self.in_doubt = False
        self.committed = 0  # messages that it has passed
        self.made = 0  # messages that it has written
        self.buried = self.pauses = self.batches = self.tokens = 0
        self.batch_s = 0.0
        self.positions: Offsets = {}  # where it had read to at its last poll
        self.consumer = bus.consumer(self.group, stage.inputs, member=slot)
        self.writer = bus.writer(f"{self.group}.{slot}")
        lane.workers.append(self)

    def run(self, stop: threading.Event) -> None:
        """Poll and commit until `stop`; what is finished by then is committed."""
        bus_failures = 0
        try:
            while not stop.is_set() and not self.fatal:
                try:
                    self.poll()
                    self.commit()
                    bus_failures = 0
                except (DependencyUnreachable, CommitInDoubt) as error:  # of the log or the schema registry
                    self.in_doubt |= isinstance(error, CommitInDoubt)
                    log.warning("%s waits: %s", self.stage.name, error.what)
                    stop.wait(backoff(bus_failures))
                    bus_failures += 1
            self.commit()
            if self.fatal:
                raise self.fatal
        finally:
            with self.calls.call("closing"):
                self.consumer.close()
                self.writer.close()

    # 1 and 2: read

    @property
    def in_flight(self) -> int:
        return sum(len(items) for items in self.flight.values())

    @property
    def held_bytes(self) -> int:
        return sum(len(item.message.value or b"") for items in self.flight.values() for item in items)

    @property
    def queued(self) -> int:
        return sum(len(queue) for queue in self.queues.values())

    def poll(self) -> None:
        """Read what has arrived and queue it; a full stage keeps polling but its partitions are paused."""
        self.hold_back()
        room = max(1, self.limits.in_flight - self.in_flight)
        with self.calls.call("poll"):
            messages = self.consumer.poll(BUSY_POLL_S if self.in_flight else IDLE_POLL_S, room)
        epochs = self.consumer.assignment()
        self.drop_lost(epochs)
        items = self.items(messages, epochs)
        with self.lane.changed:
            for item in items:
                self.flight.setdefault(item.place, deque()).append(item)
                if item.outputs is None:
                    self.queues[item.message.topic].append(item)
            self.lane.changed.notify_all()
        if not messages:
            self.positions = self.consumer.positions()

    def items(self, messages: Sequence[Message], epochs: Mapping[TopicPartition, int]) -> list[Item]:
        """Decode messages; when that needs something that is away, they are read again later."""
        try:
            return [self.item(message, epochs) for message in messages]
        except DependencyUnreachable:
            for message in reversed(messages):  # so that the first of each partition has the last word
                with suppress(PartitionLost):
                    self.consumer.seek(TopicPartition(message.topic, message.partition), message.offset)
            raise

    def caught_up(self, ends: Offsets) -> bool:
        """Whether it has finished everything below `ends` in the partitions that are its own."""
        return self.in_flight == 0 and all(at >= ends.get(place, 0) for place, at in self.positions.items())

    def hold_back(self) -> None:
        """Pause all partitions, those that have just come too, while the stage is full or may take no more."""
        share = 0.5 if self.paused else 1.0  # go on when it is half empty
        limits = self.limits
        full = self.in_flight >= limits.in_flight * share or self.held_bytes >= limits.in_flight_bytes * share
        self.closed = not self.admits()
        if full or self.closed:
            self.consumer.pause(list(self.consumer.assignment()))
            self.paused = True
        elif self.paused:
            self.consumer.resume(list(self.consumer.assignment()))
            self.paused = False

    def item(self, message: Message, epochs: Mapping[TopicPartition, int]) -> Item:
        """Decode a message. Another run's or stage's is finished with nothing; an undecodable one as a dead letter."""
        item = Item(message, epochs.get(TopicPartition(message.topic, message.partition), -1))
        if dict(message.headers).get(ONLY, self.stage.name.encode()) != self.stage.name.encode():
            item.outputs = []
            return item
        try:
            item.record = decode(message.value or b"", TOPICS[message.topic].record)
        except RecordError as error:
            self.bury(item, DeadLetterKind.DECODE, error)
            return item
        if item.record.run_id != self.run_id:
            item.outputs = []
        elif self.suspects:
            self.look_at_suspect(item)
        return item

    def look_at_suspect(self, item: Item) -> None:
        """A record at which processes have died is tried alone, and at the last of these deaths given up."""
        item.attempts = self.suspects.get(coordinates(item.message), 0)
        item.alone = item.attempts > 0
        if item.attempts >= DEADLY:
            self.bury(item, DeadLetterKind.CRASH, RecordKills(f"{item.attempts} processes have died while working on it"))

    def drop_lost(self, epochs: Mapping[TopicPartition, int]) -> None:
        """Forget the records of partitions that are no longer ours, or ours anew."""
        with self.lane.changed:
            for place, items in self.flight.items():
                for item in items:
                    item.dropped = item.epoch != epochs.get(place)
            for place in list(self.flight):
                self.flight[place] = deque(item for item in self.flight[place] if not item.dropped)
            for topic, queue in self.queues.items():
                self.queues[topic] = deque(item for item in queue if not item.dropped)
            self.retries = [item for item in self.retries if not item.dropped]
            self.streak = [item for item in self.streak if not item.dropped]

    # The lane's side: work

    def take(self) -> list[Item]:
        """The next batch, of the first topic that has one; empty while the stage pauses. The lane's lock is held."""
        now = time.monotonic()
        if now < self.pause_until or self.fatal or self.closed:
            return []
        self.queue_again(now)
        for topic in self.stage.inputs:
            queue = self.queues[topic]
            if queue and queue[0].alone:
                return [queue.popleft()]
            items: list[Item] = []
            while queue and not queue[0].alone and len(items) < self.stage.batch:
                items.append(queue.popleft())
            if items:
                return items
        return []

    def queue_again(self, now: float) -> None:
        """Put what is due to be tried again at the head of its queue."""
        for item in self.retries:
            if item.not_before <= now:
                self.queues[item.message.topic].appendleft(item)
        self.retries = [item for item in self.retries if item.not_before > now]

    def process(self, items: list[Item]) -> None:
        """Run the stage on a batch and finish its items, or sort out whose fault it was that it failed."""
        if self.journal is None:
            self.work(items)
            return
        messages = [item.message for item in items]
        try:
            self.journal.begin(messages)
        except OSError as error:  # a full disk is no record's fault
            self.pause(items, error)
            return
        try:
            self.work(items)
        finally:
            self.journal.end(messages)

    def work(self, items: list[Item]) -> None:
        records = [item.record for item in items if item.record is not None]
        started = time.time_ns()
        try:
            made = self.stage.work(records)
            outputs = [[outgoing(record) for record in records_of_one] for records_of_one in made]
            if len(outputs) != len(items):
                raise AssertionError(f"{self.stage.name} returned {len(outputs)} results for {len(items)} records")
        except (DependencyUnreachable, MemoryError) as error:
            self.pause(items, error)
        except UsageError:
            raise  # a setting is wrong, which every record would meet: the stage stops, and nothing of it is committed
        except Exception as error:  # the one place where anything may fail: it is the record's fault, or a bug it shows
            self.blame(items, error)
        else:
            self.failures = 0
            with self.lane.changed:
                self.streak = []
                self.batches += 1
                self.batch_s += (time.time_ns() - started) / 1e9
                self.tokens += sum(record.prompt_tokens + record.completion_tokens for of_one in made for record in of_one)
            for item, messages in zip(items, outputs, strict=True):
                self.finish(item, self.trace(item.message, messages, started))

    def finish(self, item: Item, messages: list[Outgoing]) -> None:
        """Set an item's outputs; one that is larger than its topic allows makes a dead letter instead."""
        for message in messages:
            if len(message.value or b"") > MAX_RECORD_BYTES:
                size = len(message.value or b"")
                self.bury(item, DeadLetterKind.TOO_LARGE, ValueError(f"its {message.topic} record has {size} bytes"))
                return
        with self.lane.changed:
            item.outputs = messages

    def pause(self, items: list[Item], error: Exception) -> None:
        """A dependency is away: put the batch back and wait, longer each time."""
        wait = backoff(self.failures)
        self.failures += 1
        self.pauses += 1
        log.warning("%s pauses %.1f s: %s: %s", self.stage.name, wait, type(error).__name__, error)
        self.put_back(items)
        self.pause_until = time.monotonic() + wait

    def blame(self, items: list[Item], error: Exception) -> None:
        """A batch failed: try its records one by one; a record that fails alone often enough is a dead letter."""
        if len(items) > 1:
            log.info("%s: a batch of %d failed (%s); trying one by one", self.stage.name, len(items), error)
            for item in items:
                item.alone = True
            self.put_back(items)
            return
        item, now = items[0], time.monotonic()
        item.attempts += 1
        item.failed_at = item.failed_at or now
        if isinstance(error, PermanentRecordError):
            self.bury(item, DeadLetterKind.PERMANENT, error)
        elif item.attempts >= self.limits.attempts or now - item.failed_at > self.limits.record_s:
            log.error("%s has tried a record %d times", self.stage.name, item.attempts, exc_info=error, extra=self.where(item))
            self.bury(item, DeadLetterKind.EXHAUSTED, error)
        else:
            item.alone, item.not_before = True, now + backoff(item.attempts)
            with self.lane.changed:
                if not item.dropped:
                    self.retries.append(item)

    def where(self, item: Item) -> dict[str, object]:
        """A record's coordinates, for the log."""
        return {"run": self.run_id, "stage": self.stage.name} | place_of(item.message)

    def put_back(self, items: Iterable[Item]) -> None:
        with self.lane.changed:
            for item in reversed(list(items)):
                if not item.dropped:
                    self.queues[item.message.topic].appendleft(item)

    def bury(self, item: Item, kind: DeadLetterKind, error: Exception) -> None:
        """Finish an item as a dead letter; with too many of its class in a row the stage is to stop."""
        letter = dead_letter(
            item.message, kind, error, stage=self.stage.name, run_id=self.run_id, attempts=max(1, item.attempts)
        )
        kind_of_error = f"{kind.value} {letter.error_class}"
        self.buried += 1
        log.warning(
            "%s gives up on %s (%s): %s",
            self.stage.name,
            written(item.message),
            kind.value,
            "; ".join(str(error).splitlines()),
            extra=self.where(item),
        )
        with self.lane.changed:
            item.outputs = [outgoing(letter)]
            self.streak = [*(self.streak if kind_of_error == self.streak_class else []), item]
            self.streak_class = kind_of_error
            if 0 < self.limits.dead_in_a_row <= len(self.streak):
                self.fatal = in_a_row(self.stage.name, letter, len(self.streak))

    # 3 and 4: commit

    def finished(self) -> dict[TopicPartition, list[Item]]:
        """Of each partition the contiguous finished prefix, as much as one transaction takes.

        The newest dead letters in a row are held back while the stage still has work: it may show that they are no fault
        of these records.
        """
        records, size, prefixes = COMMIT_RECORDS, COMMIT_BYTES, {}
        with self.lane.changed:
            working = any(item.outputs is None for items in self.flight.values() for item in items)
            held = set(self.streak) if self.fatal or (working and self.limits.dead_in_a_row) else set()
            for place, items in self.flight.items():
                prefix: list[Item] = []
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
        if self.in_doubt:
            self.recover()
        while prefixes := self.finished():
            outputs = [message for items in prefixes.values() for item in items for message in item.outputs or []]
            offsets = {place: items[-1].message.offset + 1 for place, items in prefixes.items()}
            epochs = {place: items[-1].epoch for place, items in prefixes.items()}
            try:
                with self.calls.call("commit"):
                    self.writer.commit(outputs, offsets, consumer=self.consumer, epochs=epochs)
            except CommitInDoubt as error:
                log.warning("%s asks the log how far it came: %s", self.stage.name, error)
                self.in_doubt = True
                self.recover()
                return
            except PartitionLost:
                self.drop_lost(self.consumer.assignment())
                return
            if log.isEnabledFor(logging.INFO):
                for item in (item for items in prefixes.values() for item in items):
                    log.info("%s has finished %s", self.stage.name, written(item.message), extra=self.where(item))
            self.acquit(item for items in prefixes.values() for item in items)
            self.forget(offsets)
            self.committed += sum(len(items) for items in prefixes.values())
            self.made += len(outputs)

    def acquit(self, items: Iterable[Item]) -> None:
        """What is committed kills nobody any more."""
        if not self.journal or not self.suspects:
            return
        known = [item.message for item in items if coordinates(item.message) in self.suspects]
        self.journal.acquit(known)
        for message in known:
            del self.suspects[coordinates(message)]

    def forget(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Drop the records below these offsets: they are committed."""
        with self.lane.changed:
            for place, offset in offsets.items():
                items = self.flight.get(place, deque())
                while items and items[0].message.offset < offset:
                    items.popleft().dropped = True

    def recover(self) -> None:
        """After a commit in doubt: a new writer settles the old transaction, then the log says what really landed.

        Results above the committed offsets are still good and are kept; nothing is inferred twice and nothing seeks.
        """
        with self.calls.call("settling a commit in doubt"):
            with suppress(CommitInDoubt):
                self.writer.close()
            self.writer = self.bus.writer(f"{self.group}.{self.slot}")
            self.forget(self.consumer.committed())
        self.in_doubt = False


class RecordKills(Exception):
    """Process after process died while working on one record."""


def in_a_row(stage: str, letter: DeadLetter, count: int) -> DeadLettersInARow:
    return DeadLettersInARow(
        f"{stage} stops: {count} records in a row failed in the same way ({letter.error_class})",
        letter.error_message,
        "mend what they have in common and start again: they are not committed, and nothing is lost"
        " (worker.dead_in_a_row=0 never stops)",
    )
