"""The worker loop: one stage reads its topics, works in batches, and commits what it made together with how far it came.

For each stage one thread runs `Worker.run`:

1. poll (at least once a second, whatever the model does) and decode the bytes ourselves;
2. put good records in the queue of the stage's lane; a record that cannot be decoded is finished at once, as a dead letter;
3. of each partition take the contiguous prefix of finished records;
4. one short transaction: their outputs, their dead letters, and the offsets after them (`Writer.commit`).

Model work never happens inside a transaction: it happens in a `Lane`, the threads of one model, which serves the stage that
is furthest down the stream first, so that chains in progress finish before new ones start. A stage never commits results of a
partition that it has lost, and after any doubt about a commit it takes a new writer and asks the log how far it really came.

A record whose processing fails alone, `attempts` times over, is a dead letter; trouble with a dependency (a server that is
down, no memory) pauses the stage and is nobody's fault.
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

from engine.bus.port import Bus, Message, Outgoing, TopicPartition
from engine.dead_letters import dead_letter
from engine.errors import (
    BusUnreachable,
    CommitInDoubt,
    DependencyUnreachable,
    PartitionLost,
    PermanentRecordError,
    UsageError,
)
from schemas.codec import RecordError, decode, encode
from schemas.records import DeadLetterKind, Record
from schemas.topics import MAX_RECORD_BYTES, TOPICS

log = logging.getLogger("charter.worker")

IDLE_POLL_S = 0.5
BUSY_POLL_S = 0.02
COMMIT_RECORDS = 500
BACKOFF_S = (0.5, 30.0)  # first and longest pause after trouble with a dependency


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


@dataclass
class Item:
    """One message on its way through a stage; `outputs` is None until it is finished."""

    message: Message
    epoch: int
    record: Record | None = None
    outputs: list[Outgoing] | None = None
    attempts: int = 0
    alone: bool = False  # its batch failed: try it by itself, to find whose fault it is
    dropped: bool = False  # its partition went to someone else

    @property
    def place(self) -> TopicPartition:
        return TopicPartition(self.message.topic, self.message.partition)


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
        max_in_flight: int = 256,
        attempts: int = 3,
    ) -> None:
        self.bus, self.stage, self.lane, self.run_id = bus, stage, lane, run_id
        self.group = f"{run_id}.{stage.name}"
        self.slot, self.max_in_flight, self.attempts = slot, max_in_flight, attempts
        self.flight: dict[TopicPartition, deque[Item]] = {}
        self.queues: dict[str, deque[Item]] = {topic: deque() for topic in stage.inputs}
        self.failures = 0
        self.pause_until = 0.0
        self.paused = False
        self.committed = 0
        self.consumer = bus.consumer(self.group, stage.inputs, member=slot)
        self.writer = bus.writer(f"{self.group}.{slot}")
        lane.workers.append(self)

    def run(self, stop: threading.Event) -> None:
        """Poll and commit until `stop`; what is finished by then is committed."""
        try:
            while not stop.is_set():
                try:
                    self.poll()
                    self.commit()
                except BusUnreachable as error:
                    log.warning("%s waits for the log: %s", self.stage.name, error.what)
                    stop.wait(backoff(self.failures))
                    self.failures += 1
            self.commit()
        finally:
            self.consumer.close()
            self.writer.close()

    # 1 and 2: read

    @property
    def in_flight(self) -> int:
        return sum(len(items) for items in self.flight.values())

    @property
    def queued(self) -> int:
        return sum(len(queue) for queue in self.queues.values())

    def poll(self) -> None:
        """Read what has arrived and queue it; a full stage keeps polling but its partitions are paused."""
        self.hold_back()
        room = max(1, self.max_in_flight - self.in_flight)
        messages = self.consumer.poll(BUSY_POLL_S if self.in_flight else IDLE_POLL_S, room)
        epochs = self.consumer.assignment()
        self.drop_lost(epochs)
        items = [self.item(message, epochs) for message in messages]
        with self.lane.changed:
            for item in items:
                self.flight.setdefault(item.place, deque()).append(item)
                if item.outputs is None:
                    self.queues[item.message.topic].append(item)
            self.lane.changed.notify_all()

    def hold_back(self) -> None:
        if not self.paused and self.in_flight >= self.max_in_flight:
            self.consumer.pause(list(self.consumer.assignment()))
            self.paused = True
        elif self.paused and self.in_flight <= self.max_in_flight // 2:
            self.consumer.resume(list(self.consumer.assignment()))
            self.paused = False

    def item(self, message: Message, epochs: Mapping[TopicPartition, int]) -> Item:
        """Decode a message. Another run's record is finished with nothing; an undecodable one as a dead letter."""
        item = Item(message, epochs.get(TopicPartition(message.topic, message.partition), -1))
        try:
            item.record = decode(message.value or b"", TOPICS[message.topic].record)
        except RecordError as error:
            self.bury(item, DeadLetterKind.DECODE, error)
            return item
        if item.record.run_id != self.run_id:
            item.outputs = []
        return item

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

    # The lane's side: work

    def take(self) -> list[Item]:
        """The next batch, of the first topic that has one; empty while the stage pauses. The lane's lock is held."""
        if time.monotonic() < self.pause_until:
            return []
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

    def process(self, items: list[Item]) -> None:
        """Run the stage on a batch and finish its items, or sort out whose fault it was that it failed."""
        records = [item.record for item in items if item.record is not None]
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
            for item, messages in zip(items, outputs, strict=True):
                self.finish(item, messages)

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
        item = items[0]
        item.attempts += 1
        if isinstance(error, PermanentRecordError):
            self.bury(item, DeadLetterKind.PERMANENT, error)
        elif item.attempts >= self.attempts:
            log.error("%s gives up on a record", self.stage.name, exc_info=error)
            self.bury(item, DeadLetterKind.EXHAUSTED, error)
        else:
            item.alone = True
            self.put_back(items)

    def put_back(self, items: Iterable[Item]) -> None:
        with self.lane.changed:
            for item in reversed(list(items)):
                if not item.dropped:
                    self.queues[item.message.topic].appendleft(item)

    def bury(self, item: Item, kind: DeadLetterKind, error: Exception) -> None:
        """Finish an item as a dead letter."""
        letter = dead_letter(
            item.message, kind, error, stage=self.stage.name, run_id=self.run_id, attempts=max(1, item.attempts)
        )
        with self.lane.changed:
            item.outputs = [outgoing(letter)]

    # 3 and 4: commit

    def finished(self) -> dict[TopicPartition, list[Item]]:
        """Of each partition the contiguous finished prefix, at most COMMIT_RECORDS in all."""
        room, prefixes = COMMIT_RECORDS, {}
        with self.lane.changed:
            for place, items in self.flight.items():
                prefix: list[Item] = []
                for item in items:
                    if item.outputs is None or len(prefix) >= room:
                        break
                    prefix.append(item)
                if prefix:
                    prefixes[place] = prefix
                    room -= len(prefix)
        return prefixes

    def commit(self) -> None:
        """Write everything that is finished and in order, in as few transactions as its size needs."""
        while prefixes := self.finished():
            outputs = [message for items in prefixes.values() for item in items for message in item.outputs or []]
            offsets = {place: items[-1].message.offset + 1 for place, items in prefixes.items()}
            epochs = {place: items[-1].epoch for place, items in prefixes.items()}
            try:
                self.writer.commit(outputs, offsets, consumer=self.consumer, epochs=epochs)
            except CommitInDoubt as error:
                log.warning("%s asks the log how far it came: %s", self.stage.name, error)
                self.recover()
                return
            except PartitionLost:
                self.drop_lost(self.consumer.assignment())
                return
            self.forget(offsets)
            self.committed += sum(len(items) for items in prefixes.values())

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
        with suppress(CommitInDoubt):
            self.writer.close()
        self.writer = self.bus.writer(f"{self.group}.{self.slot}")
        self.forget(self.consumer.committed())
