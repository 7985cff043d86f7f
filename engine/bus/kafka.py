"""Apache Kafka through kafka-python, behind the bus port.

What the client does by itself is not enough for exactly-once, so here:

* `commit_transaction` of this client can return normally although nothing was written (its batches outlived the delivery
  timeout). Every send's future is looked at before offsets are sent and the transaction is committed; after any doubt the
  producer is thrown away, and a new one under the same transactional id settles what the old one left open.
* offsets go into the transaction with the group's present metadata, so the broker fences members of an older generation; a
  member that lost one partition in a cooperative rebalance could still commit it, hence the check of assignment epochs.
* consumers read bytes, only committed records, never commit on their own, and never reset their offsets silently.
* rebalance listeners run on the client's thread: they only note epochs.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import kafka
from kafka import errors
from kafka.admin import KafkaAdminClient
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as Place

from engine.bus.port import Message, Offsets, Outgoing, TopicPartition
from engine.errors import BusUnreachable, CommitInDoubt, Fenced, OffsetsLost, PartitionLost, UsageError
from schemas.topics import ENVELOPE_BYTES, MAX_RECORD_BYTES, TopicSpec

log = logging.getLogger("charter.bus")

TRANSACTION_TIMEOUT_MS = 10_000  # a killed worker's open transaction holds readers up for at most this long
FLUSH_S = 30.0
BOOTSTRAP_MS = 15_000
CLOSE_S = 5.0
CALL_MS = 30_000
METADATA_MS = 60_000  # how soon added partitions are noticed
REQUEST_BYTES = MAX_RECORD_BYTES + 2 * ENVELOPE_BYTES
LOST = (
    errors.CommitFailedError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.RebalanceInProgressError,
    errors.FencedInstanceIdError,
)


def parse_address(address: str) -> list[str]:
    """The bootstrap servers of kafka://HOST:PORT[,HOST:PORT]."""
    servers = address.removeprefix("kafka://").rstrip("/").split(",")
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"{address!r} is no Kafka address", f"{server!r} is not HOST:PORT", "type: kafka://localhost:9092")
    return servers


@contextmanager
def reached(servers: Sequence[str]) -> Iterator[None]:
    """The client's errors of the broker being away, in our words."""
    try:
        yield
    except (errors.KafkaError, OSError) as error:
        raise BusUnreachable(
            f"Kafka at {','.join(servers)} does not answer", reason(servers, error), "look at the broker and at bus.address"
        ) from error


def reason(servers: Sequence[str], error: Exception) -> str:
    """Tell a broker that is not there from one that does not let us in (the client says the same of both)."""
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError as refused:
            return f"{server}: {refused}"
    return f"it accepts connections, but then: {type(error).__name__} (a wrong password or protocol looks like this too)"


class KafkaBus:
    """The brokers at `servers`. `options` are kafka-python settings (security); they are never printed."""

    def __init__(self, servers: list[str], *, prefix: str = "", options: Mapping[str, Any] | None = None) -> None:
        self.servers, self.prefix = servers, prefix
        self.client = {
            "bootstrap_servers": servers,
            "bootstrap_timeout_ms": BOOTSTRAP_MS,
            "reconnect_backoff_max_ms": 1000,
            **(options or {}),
        }
        self.lock = threading.Lock()
        with reached(servers):
            self.admin = KafkaAdminClient(**self.client)
            self.cluster_id = str(self.admin.describe_cluster()["cluster_id"])
            # Ends as written, not as committed: a transaction's markers come a moment after its commit has returned, and
            # whoever reads up to these ends must not miss what it has just written itself.
            self.offsets = kafka.KafkaConsumer(**self.client, **(reading() | {"isolation_level": "read_uncommitted"}))
        self.producer: kafka.KafkaProducer | None = None

    def name(self, topic: str) -> str:
        return self.prefix + topic

    def place(self, partition: TopicPartition) -> Place:
        return Place(self.name(partition.topic), partition.partition)

    def ours(self, place: Place) -> TopicPartition:
        return TopicPartition(place.topic.removeprefix(self.prefix), place.partition)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        with self.lock, reached(self.servers):
            there = set(self.admin.list_topics())
            missing = [spec for spec in specs if self.name(spec.name) not in there]
            if not missing:
                return []
            try:
                self.admin.create_topics({self.name(s.name): topic_options(s) for s in missing}, wait_for_metadata=True)
            except errors.TopicAlreadyExistsError:
                log.info("another process created the topics at the same moment")
        return [spec.name for spec in missing]

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        with self.lock, reached(self.servers):
            described = self.admin.describe_topics([self.name(topic) for topic in topics])
        return {d["name"].removeprefix(self.prefix): str(d["topic_id"]) for d in described if not d["error_code"]}

    def partitions(self, topic: str) -> int:
        with self.lock, reached(self.servers):
            found = self.offsets.partitions_for_topic(self.name(topic))
        if not found:
            raise UsageError(
                f"there is no topic {self.name(topic)} at {','.join(self.servers)}",
                "",
                "type: charter topics (it creates them)",
            )
        return len(found)

    def places(self, topics: Iterable[str]) -> list[Place]:
        return [Place(self.name(topic), number) for topic in topics for number in range(self.partitions(topic))]

    def begin_offsets(self, topics: Sequence[str]) -> Offsets:
        return self.looked_up(topics, self.offsets.beginning_offsets)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        return self.looked_up(topics, self.offsets.end_offsets)

    def looked_up(self, topics: Sequence[str], call: Callable[..., dict[Place, int]]) -> Offsets:
        places = self.places(topics)
        with self.lock, reached(self.servers):
            return {self.ours(place): offset for place, offset in call(places, timeout_ms=CALL_MS).items()}

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        name, places = self.prefix + group, self.places(topics)
        with self.lock, reached(self.servers):
            found = self.admin.list_group_offsets({name: places}).get(name, {})
        return {self.ours(place): entry.offset for place, entry in found.items() if entry.offset >= 0}

    # Writing and reading

    def publish(self, outgoing: Sequence[Outgoing]) -> None:
        with self.lock, reached(self.servers):
            if self.producer is None:
                self.producer = kafka.KafkaProducer(**self.client, **writing())
            futures = [send(self.producer, self.name(message.topic), message) for message in outgoing]
            self.producer.flush(timeout=FLUSH_S)
            for future in futures:
                future.get(timeout=0)

    def writer(self, transactional_id: str) -> KafkaWriter:
        return KafkaWriter(self, self.prefix + transactional_id)

    def consumer(self, group: str, topics: Sequence[str], *, member: str) -> KafkaConsumer:
        self.places(topics)  # an unknown topic is an error now, not at the first poll
        return KafkaConsumer(self, self.prefix + group, topics, member)

    def reader(self, positions: Mapping[TopicPartition, int]) -> KafkaReader:
        return KafkaReader(self, positions)

    def close(self) -> None:
        if self.producer is not None:
            self.producer.close(timeout=CLOSE_S)
        self.offsets.close()
        self.admin.close()


def reading() -> dict[str, Any]:
    return {
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": REQUEST_BYTES,
    }


def writing() -> dict[str, Any]:
    return {"acks": "all", "max_request_size": REQUEST_BYTES, "compression_type": "lz4", "allow_auto_create_topics": False}


def topic_options(spec: TopicSpec) -> dict[str, Any]:
    configs = {
        "cleanup.policy": "compact" if spec.compacted else "delete",
        "retention.ms": str(spec.retention_ms),
        "max.message.bytes": str(spec.max_bytes + ENVELOPE_BYTES),
    }
    return {"num_partitions": spec.partitions, "configs": configs}


def send(producer: kafka.KafkaProducer, topic: str, message: Outgoing) -> Any:
    return producer.send(topic, key=message.key, value=message.value, headers=list(message.headers))


def settled(producer: kafka.KafkaProducer, futures: Sequence[Any]) -> None:
    """Raise unless every send has succeeded; a commit that returns is not enough (see the module's docstring)."""
    producer.flush(timeout=FLUSH_S)
    for future in futures:
        future.get(timeout=0)


class KafkaWriter:
    """Transactions under one transactional id; opening it settles and fences what the id's earlier writer left."""

    def __init__(self, bus: KafkaBus, transactional_id: str) -> None:
        self.bus, self.id = bus, transactional_id
        with reached(bus.servers):
            self.producer = kafka.KafkaProducer(
                **bus.client,
                **writing(),
                transactional_id=transactional_id,
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            )
            self.producer.init_transactions()

    def commit(
        self,
        outputs: Sequence[Outgoing],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        if offsets:
            assert isinstance(consumer, KafkaConsumer), "offsets are a consumer group's"
            check_epochs(consumer, epochs or {})
        try:
            self.producer.begin_transaction()
            futures = [send(self.producer, self.bus.name(message.topic), message) for message in outputs]
            settled(self.producer, futures)
            if offsets:
                assert isinstance(consumer, KafkaConsumer)
                self.send_offsets(consumer, offsets, epochs or {})
            self.producer.commit_transaction()
        except PartitionLost:
            self.abort()
            raise
        except errors.ProducerFencedError as error:
            raise Fenced(
                f"another process has taken over as {self.id}",
                "two processes ran in the same slot",
                "stop one of them, or give each its own: --slot NAME",
            ) from error
        except errors.KafkaError as error:
            raise CommitInDoubt(
                "it is not known whether a transaction was written", f"{type(error).__name__}: {error}"
            ) from error

    def send_offsets(
        self, consumer: KafkaConsumer, offsets: Mapping[TopicPartition, int], epochs: Mapping[TopicPartition, int]
    ) -> None:
        metadata = consumer.client.group_metadata()
        # After the metadata is captured: a partition lost before is noticed here, one lost later fences the generation.
        check_epochs(consumer, epochs)
        wire = {self.bus.place(place): OffsetAndMetadata(offset, "", -1) for place, offset in offsets.items()}
        try:
            self.producer.send_offsets_to_transaction(wire, metadata)
        except LOST as error:
            raise PartitionLost("the group has moved on without this member", type(error).__name__) from error

    def abort(self) -> None:
        try:
            self.producer.abort_transaction()
        except errors.KafkaError as error:
            raise CommitInDoubt("a transaction could not be aborted", f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self.producer.close(timeout=CLOSE_S)


def check_epochs(consumer: KafkaConsumer, epochs: Mapping[TopicPartition, int]) -> None:
    present = consumer.assignment()
    for place, epoch in epochs.items():
        if present.get(place) != epoch:
            raise PartitionLost(f"{place.topic}[{place.partition}] has moved to another member")


def messages_of(bus: KafkaBus, polled: Mapping[Place, Sequence[Any]]) -> list[Message]:
    return [
        Message(
            bus.ours(place).topic,
            place.partition,
            record.offset,
            record.key,
            record.value,
            tuple((key, value) for key, value in record.headers or ()),
            record.timestamp,
        )
        for place, records in polled.items()
        for record in records
    ]


class KafkaReader:
    """Reads given partitions, without a group."""

    def __init__(self, bus: KafkaBus, positions: Mapping[TopicPartition, int]) -> None:
        self.bus = bus
        self.places: list[TopicPartition] = []
        with reached(bus.servers):
            self.client = kafka.KafkaConsumer(**bus.client, **reading())
        self.add(positions)

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        kept = self.positions()
        self.places = list({**kept, **positions})
        self.client.assign([self.bus.place(place) for place in self.places])
        for place, offset in {**kept, **positions}.items():
            self.client.seek(self.bus.place(place), offset)

    def poll(self, timeout_s: float, max_records: int) -> list[Message]:
        with polling(self.bus):
            return messages_of(self.bus, self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records))

    def positions(self) -> Offsets:
        with reached(self.bus.servers):
            return {place: self.client.position(self.bus.place(place), timeout_ms=CALL_MS) for place in self.places}

    def close(self) -> None:
        self.client.close(timeout_ms=int(CLOSE_S * 1000))


@contextmanager
def polling(bus: KafkaBus) -> Iterator[None]:
    try:
        yield
    except errors.OffsetOutOfRangeError as error:
        raise OffsetsLost(
            "the log no longer holds the records that come next",
            f"{error.args[0] if error.args else error}: its retention was faster than this reader",
            "raise bus.retention_ms; to go on without them, start a new run: --run NAME",
        ) from error
    except errors.KafkaError as error:
        raise BusUnreachable("Kafka does not answer", f"{type(error).__name__}: {error}") from error


class Epochs(kafka.ConsumerRebalanceListener):
    """Notes which partitions are ours, each with the number of the assignment that gave it to us."""

    def __init__(self, bus: KafkaBus) -> None:
        self.bus, self.number = bus, 0
        self.current: Offsets = {}

    def on_partitions_assigned(self, assigned: Iterable[Place]) -> None:
        self.number += 1
        new = {self.bus.ours(place): self.number for place in assigned}
        self.current = {**new, **{place: epoch for place, epoch in self.current.items() if place not in new}}

    def on_partitions_revoked(self, revoked: Iterable[Place]) -> None:
        gone = {self.bus.ours(place) for place in revoked}
        self.current = {place: epoch for place, epoch in self.current.items() if place not in gone}

    def on_partitions_lost(self, lost: Iterable[Place]) -> None:
        self.on_partitions_revoked(lost)


class KafkaConsumer:
    """A member of a consumer group with cooperative rebalancing."""

    def __init__(self, bus: KafkaBus, group: str, topics: Sequence[str], member: str) -> None:
        self.bus = bus
        self.epochs = Epochs(bus)
        self.held_back: set[TopicPartition] = set()
        with reached(bus.servers):
            self.client = kafka.KafkaConsumer(
                **bus.client,
                **reading(),
                group_id=group,
                client_id=f"charter-{member}",
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=10_000,
                heartbeat_interval_ms=2_000,
                metadata_max_age_ms=METADATA_MS,
            )
            # The member that leads the group shares out the partitions that it knows of: of a topic that is only just
            # there it may know none, and would give nobody anything until its metadata ages.
            while not all(self.client.partitions_for_topic(bus.name(topic)) for topic in topics):
                log.info("waiting for the metadata of %s", ", ".join(topics))
        self.client.subscribe([bus.name(topic) for topic in topics], listener=self.epochs)

    def assignment(self) -> Offsets:
        return dict(self.epochs.current)

    def poll(self, timeout_s: float, max_records: int) -> list[Message]:
        self.hold_back()
        with polling(self.bus):
            try:
                polled = self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
            except errors.NoOffsetForPartitionError:
                self.start_new_partitions()
                return []
        return messages_of(self.bus, polled)

    def start_new_partitions(self) -> None:
        """A partition without a committed offset is new to the group: it starts at its beginning, explicitly."""
        committed = self.committed()
        new = [self.bus.place(place) for place in self.epochs.current if place not in committed]
        for place, offset in self.client.beginning_offsets(new, timeout_ms=CALL_MS).items():
            self.client.seek(place, offset)

    def hold_back(self) -> None:
        held = [self.bus.place(place) for place in self.held_back if place in self.epochs.current]
        if held:
            self.client.pause(*held)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.held_back |= set(partitions)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        wanted = [self.bus.place(place) for place in partitions if place in self.epochs.current]
        self.held_back -= set(partitions)
        if wanted:
            self.client.resume(*wanted)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.client.seek(self.bus.place(partition), offset)

    def committed(self) -> Offsets:
        with reached(self.bus.servers):
            found = {place: self.client.committed(self.bus.place(place), timeout_ms=CALL_MS) for place in self.epochs.current}
        return {place: offset for place, offset in found.items() if offset is not None}

    def close(self) -> None:
        self.client.close(autocommit=False, timeout_ms=int(CLOSE_S * 1000))
