"""Apache Kafka through kafka-python, behind the bus port.

What the client does by itself is not enough for exactly-once, so here:

* `commit_transaction` of this client can return normally although nothing was written (its batches outlived the delivery
  timeout). Every send's future is looked at before offsets are sent and the transaction is committed; after any doubt the
  producer is thrown away, and a new one under the same transactional id settles what the old one left open.
* offsets that a broker refused stay in this client's producer and would ride along in its next transaction: after a refusal
  the producer is thrown away too.
* offsets go into the transaction with the membership under which the present assignment was learnt, so the broker fences
  members of an older generation. The client's own idea of it runs ahead: it joins in the background, and once a heartbeat has
  learnt that it was put out of the group it names no member at all, which a broker takes without checking anything. A member
  that lost one partition in a cooperative rebalance could still commit it, hence the check of assignment epochs.
* consumers read bytes, only committed records, never commit on their own, and never reset their offsets silently.
* rebalance listeners run on the client's thread: they only note epochs.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import kafka
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata
from kafka.structs import TopicPartition as Place

from engine.bus.port import Message, Offsets, Outgoing, TopicDescription, TopicPartition
from engine.errors import BusUnreachable, CommitInDoubt, Fenced, OffsetsLost, PartitionLost, UsageError
from schemas.topics import ENVELOPE_BYTES, MAX_RECORD_BYTES, TopicSpec

log = logging.getLogger("charter.bus")
OPENING = threading.Lock()  # `connecting` listens to a log that all buses of a process share

TRANSACTION_TIMEOUT_MS = 10_000  # a killed worker's open transaction holds readers up for at most this long
FLUSH_S = 30.0
BATCH_BYTES = 256 * 1024
LINGER_MS = 100
BOOTSTRAP_MS = 15_000
CLOSE_MS = 5_000
KNOCK_S = 5.0
CALL_MS = 30_000
METADATA_MS = 60_000  # how soon added partitions are noticed
HEARTBEAT_MS = 1_000  # within this the members learn that the group is sharing out anew
JOIN_S = 2.0
JOIN_POLL_MS = 200
PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
REQUEST_BYTES = MAX_RECORD_BYTES + 2 * ENVELOPE_BYTES
SETTLE_S = 0.2
# Who would answer is being chosen anew.
COORDINATOR = (
    errors.CoordinatorNotAvailableError,
    errors.CoordinatorLoadInProgressError,
    errors.NotCoordinatorError,
)
GONE = (errors.KafkaConnectionError, errors.NodeNotReadyError, errors.NotControllerError)
# The group has moved on without this member.
LOST = (
    errors.CommitFailedError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.RebalanceInProgressError,
    errors.FencedInstanceIdError,
)
# The broker is there and says no: waiting does not help, somebody has to change something.
REFUSED = (
    errors.AuthorizationError,
    errors.KafkaConfigurationError,
    errors.InvalidTopicError,
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
)
# kafka-python's words for it.
HUNG_UP = "socket disconnected"
# Wrong use of the client, which is a mistake of this file.
MISUSED = (errors.IllegalStateError, errors.IllegalArgumentError)


def parse_address(address: str) -> list[str]:
    """The bootstrap servers of kafka://HOST:PORT[,HOST:PORT]."""
    if "@" in address:  # and what stands before it may be a password: it is not repeated
        raise UsageError(
            "a Kafka address holds no user and no password",
            "they are client settings (sasl_plain_username, sasl_plain_password)",
            "type: kafka://HOST:PORT",
        )
    servers = [server.strip() for server in address.removeprefix("kafka://").rstrip("/").split(",")]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"{address!r} is no Kafka address", f"{server!r} is not HOST:PORT", "type: kafka://localhost:9092")
    return servers


@contextmanager
def reached(servers: Sequence[str]) -> Iterator[None]:
    """The client's errors in our words: the broker is away, or it is there and refuses."""
    try:
        yield
    except MISUSED:
        raise
    except REFUSED as error:
        raise refused(error) from error
    except (errors.KafkaError, OSError) as error:
        raise BusUnreachable(
            f"Kafka at {','.join(servers)} does not answer",
            reason(servers, error),
            "look at the broker, at bus.address, and at the user, password and protocol that it wants",
        ) from error


def refused(error: Exception) -> UsageError:
    return UsageError(
        "Kafka refuses what it was asked",
        f"{error}",
        "look at the client's settings, the rights of its user, and the topic's max.message.bytes",
    )


def knock(servers: Sequence[str]) -> None:
    """Raise OSError at once when nobody listens on any of the servers: the client would try for its whole timeout."""
    failures = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
            return
        except OSError as error:
            failures.append(f"{server}: {error}")
    raise ConnectionError("; ".join(failures))


def reason(servers: Sequence[str], error: Exception) -> str:
    """Tell a broker that is not there from one that does not let us in (the client says the same of both)."""
    try:
        knock(servers)
    except OSError as unreachable:
        return str(unreachable)
    return f"it accepts connections, but then: {error}"


class Overheard(logging.Handler):
    """What the client's log says of its attempts to connect: its error says only that they took too long."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failures: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.failures += [argument for argument in arguments if isinstance(argument, Exception)]

    def most_telling(self, error: Exception) -> Exception:
        """Brokers also just hang up, and the client gives up, on the same occasion."""
        vague = (HUNG_UP, errors.RequestTimedOutError.__name__, errors.KafkaTimeoutError.__name__)
        telling = [failure for failure in self.failures if not any(word in repr(failure) for word in vague)]
        return (telling or self.failures or [error])[0]


@contextmanager
def connecting(protocol: str) -> Iterator[None]:
    """Raise what kept the client from connecting in place of its timeout."""
    logger, overheard = logging.getLogger("kafka.net.manager"), Overheard()
    level, propagate, shown = logger.level, logger.propagate, logger.isEnabledFor(logging.WARNING)
    logger.addHandler(overheard)
    logger.setLevel(logging.WARNING)
    logger.propagate = propagate and shown  # heard here, and no louder elsewhere than it was
    try:
        yield
    except errors.KafkaTimeoutError as error:
        words = f"{overheard.most_telling(error)}"
        # A slow client reads the broker's refusal together with the end of the connection, and drops it.
        hint = " (so a broker ends a failed authentication too)" if HUNG_UP in words and protocol.startswith("SASL") else ""
        raise ConnectionError(words + hint) from error
    finally:
        logger.removeHandler(overheard)
        logger.setLevel(level)
        logger.propagate = propagate


class KafkaBus:
    """The brokers at `servers`. `options` are kafka-python settings (security); they are never printed."""

    def __init__(
        self, servers: list[str], *, prefix: str = "", options: Mapping[str, Any] | None = None, static_members: bool = False
    ) -> None:
        self.servers, self.prefix, self.static_members = servers, prefix, static_members
        protocol = (options or {}).get("security_protocol", "PLAINTEXT")
        if protocol not in PROTOCOLS:  # the client would take it for PLAINTEXT
            raise UsageError(
                f"there is no security_protocol {protocol!r}",
                f"it is one of {', '.join(PROTOCOLS)}",
                "set bus.security_protocol",
            )
        self.client = {
            "bootstrap_servers": servers,
            "bootstrap_timeout_ms": BOOTSTRAP_MS,
            "reconnect_backoff_max_ms": 1000,
            **(options or {}),
        }
        self.lock = threading.Lock()
        self.known: set[str] = set()
        with reached(servers):
            knock(servers)
            with OPENING, connecting(protocol):
                self.admin = KafkaAdminClient(**self.client)
            self.cluster_id = str(self.ask(self.admin.describe_cluster)["cluster_id"])
        self.producer: kafka.KafkaProducer | None = None

    def ask(self, call: Callable[[], Any]) -> Any:
        """Ask again while whoever has to answer is only just being chosen: of a fresh broker, or after one has gone away."""
        deadline = time.monotonic() + CALL_MS / 1000
        while True:
            try:
                with self.lock:
                    return call()
            except (*COORDINATOR, *GONE):
                knock(self.servers)  # with nobody there at all it is over at once
                if time.monotonic() > deadline:
                    raise
                time.sleep(SETTLE_S)

    def name(self, topic: str) -> str:
        return self.prefix + topic

    def place(self, partition: TopicPartition) -> Place:
        return Place(self.name(partition.topic), partition.partition)

    def ours(self, place: Place) -> TopicPartition:
        return TopicPartition(place.topic.removeprefix(self.prefix), place.partition)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        with reached(self.servers):
            there = set(self.ask(self.admin.list_topics))
            missing = {self.name(spec.name): topic_options(spec) for spec in specs if self.name(spec.name) not in there}
            if not missing:
                return []
            answers = self.ask(lambda: self.admin.create_topics(missing, raise_errors=False))["topics"]
            for answer in answers:
                error = errors.for_code(answer["error_code"])
                # Another process may have created them at the same moment.
                if error not in (errors.NoError, errors.TopicAlreadyExistsError):
                    raise error(f"{answer['name']}: {answer['error_message']}")
            self.ask(lambda: self.admin.wait_for_topics(list(missing)))
        return [answer["name"].removeprefix(self.prefix) for answer in answers if not answer["error_code"]]

    def described(self, topics: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What the cluster says now of those of these topics that there are."""
        names = [self.name(topic) for topic in topics]
        with reached(self.servers):
            found = self.ask(lambda: self.admin.describe_topics(names))
        return {topic["name"].removeprefix(self.prefix): topic for topic in found if not topic["error_code"]}

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        return {name: str(topic["topic_id"]) for name, topic in self.described(topics).items()}

    def partitions(self, topic: str) -> int:
        return len(self.places([topic]))

    def places(self, topics: Iterable[str]) -> list[Place]:
        """Every partition that these topics have now; they may have been given more since the last time."""
        wanted = list(topics)
        described = self.described(wanted)
        for topic in wanted:
            if topic not in described:
                where = f"{self.name(topic)} at {','.join(self.servers)}"
                raise UsageError(f"there is no topic {where}", "nobody has created it yet", "type: charter topics create")
        self.known |= set(wanted)
        return [Place(self.name(topic), number) for topic in wanted for number in range(len(described[topic]["partitions"]))]

    def check_topics(self, outgoing: Iterable[Outgoing]) -> None:
        """Raise UsageError for a topic that there is not: the client would wait a minute for it to appear."""
        if unknown := {message.topic for message in outgoing} - self.known:
            self.places(unknown)

    def begin_offsets(self, topics: Sequence[str]) -> Offsets:
        return self.looked_up(topics, OffsetSpec.EARLIEST)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        """Ends as written, not as committed.

        A transaction's markers come a moment after its commit has returned, and whoever reads up to these ends must not
        miss what it has just written itself.
        """
        return self.looked_up(topics, OffsetSpec.LATEST)

    def offsets_at(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        return self.end_offsets(topics) | {
            place: offset for place, offset in self.looked_up(topics, timestamp_ms).items() if offset >= 0
        }

    def looked_up(self, topics: Sequence[str], wanted: Any) -> Offsets:
        places = self.places(topics)
        with reached(self.servers):
            found = self.ask(lambda: self.admin.list_partition_offsets(dict.fromkeys(places, wanted), timeout_ms=CALL_MS))
        return {self.ours(place): entry.offset for place, entry in found.items()}

    def describe(self, topics: Sequence[str]) -> list[TopicDescription]:
        described = self.described(topics)
        resources = [ConfigResource(ConfigResourceType.TOPIC, self.name(topic)) for topic in described]
        with reached(self.servers):
            configs = self.ask(lambda: self.admin.describe_configs(resources))["topic"] if resources else {}
        return [
            TopicDescription(
                name=name,
                topic_id=str(topic["topic_id"]),
                partitions=len(topic["partitions"]),
                replicas=min(len(p["replica_nodes"]) for p in topic["partitions"]),
                in_sync=min(len(p["isr_nodes"]) for p in topic["partitions"]),
                configs={key: str(config["value"]) for key, config in configs.get(self.name(name), {}).items()},
            )
            for name, topic in described.items()
        ]

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        name, places = self.prefix + group, self.places(topics)
        with reached(self.servers):
            found = self.ask(lambda: self.admin.list_group_offsets({name: places})).get(name, {})
        return {self.ours(place): entry.offset for place, entry in found.items() if entry.offset >= 0}

    def seed(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        known = self.committed(group, sorted({place.topic for place in offsets}))
        wanted = {
            self.place(place): OffsetAndMetadata(offset, "", -1) for place, offset in offsets.items() if place not in known
        }
        if not wanted:
            return
        with reached(self.servers):
            answers = self.ask(lambda: answered(self.admin.alter_group_offsets(self.prefix + group, wanted)))
        assert set(answers) == set(wanted)

    # Writing and reading

    def publish(self, outgoing: Sequence[Outgoing]) -> None:
        self.check_topics(outgoing)
        with self.lock, reached(self.servers):
            if self.producer is None:
                self.producer = kafka.KafkaProducer(**self.client, **writing())
            try:
                settled(self.producer, [send(self.producer, self.name(message.topic), message) for message in outgoing])
            except errors.KafkaError:
                # It may be broken for good, and may hold messages that the caller publishes again.
                end(self.producer, 0)
                self.producer = None
                raise

    def writer(self, transactional_id: str) -> KafkaWriter:
        return KafkaWriter(self, self.prefix + transactional_id)

    def consumer(self, group: str, topics: Sequence[str], *, member: str) -> KafkaConsumer:
        self.places(topics)  # an unknown topic is an error now, not at the first poll
        return KafkaConsumer(self, self.prefix + group, topics, member)

    def reader(self, positions: Mapping[TopicPartition, int]) -> KafkaReader:
        return KafkaReader(self, positions)

    def close(self) -> None:
        if self.producer is not None:
            end(self.producer)
        self.admin.close()


def answered(answers: Mapping[Place, type[errors.KafkaError]]) -> Mapping[Place, type[errors.KafkaError]]:
    """Raise the first error of a per-partition answer."""
    for place, error in answers.items():
        if error is not errors.NoError:
            raise error(f"{place.topic}[{place.partition}]")
    return answers


def reading() -> dict[str, Any]:
    return {
        "metrics_enabled": False,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": REQUEST_BYTES,
    }


def writing() -> dict[str, Any]:
    """Whoever sends here flushes at once, so a long linger costs nothing.

    Without it the client sends each record by itself while the next is being added: more requests, and a wakeup for each.
    """
    return {
        "acks": "all",
        "allow_auto_create_topics": False,
        "batch_size": BATCH_BYTES,
        "compression_type": "lz4",
        "linger_ms": LINGER_MS,
        "max_request_size": REQUEST_BYTES,
        "metrics_enabled": False,  # nobody reads them, and they cost a tenth of the client's time
    }


def topic_options(spec: TopicSpec) -> dict[str, Any]:
    configs = {
        "cleanup.policy": "compact" if spec.compacted else "delete",
        "retention.ms": str(spec.retention_ms),
        "max.message.bytes": str(spec.max_bytes + ENVELOPE_BYTES),
    }
    return {"num_partitions": spec.partitions, "replication_factor": spec.replication, "configs": configs}


def send(producer: kafka.KafkaProducer, topic: str, message: Outgoing) -> Any:
    return producer.send(topic, key=message.key, value=message.value, headers=list(message.headers))


def settled(producer: kafka.KafkaProducer, futures: Sequence[Any]) -> None:
    """Raise unless every send has succeeded; a commit that returns is not enough (see the module's docstring)."""
    producer.flush(timeout=FLUSH_S)
    for future in futures:
        future.get(timeout=0)


def end(producer: kafka.KafkaProducer, timeout_s: float = CLOSE_MS / 1000) -> None:
    """Close a producer without hanging or failing. What it still holds then is not sent: its successor settles that."""
    try:
        producer.close(timeout=timeout_s)
    except errors.KafkaError as error:
        log.info("a producer is closed by force: %s", error)
        producer._sender.force_close()  # what `close` would go on to do, had it not raised


class KafkaWriter:
    """Transactions under one transactional id; opening it settles and fences what the id's earlier writer left."""

    def __init__(self, bus: KafkaBus, transactional_id: str) -> None:
        self.bus, self.id = bus, transactional_id
        self.usable = True
        self.producer = self.opened()

    def opened(self) -> kafka.KafkaProducer:
        with reached(self.bus.servers):
            producer = kafka.KafkaProducer(
                **self.bus.client,
                **writing(),
                transactional_id=self.id,
                transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            )
            try:
                producer.init_transactions()
            except BaseException:
                end(producer)
                raise
        return producer

    def commit(
        self,
        outputs: Sequence[Outgoing],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        if not self.usable:
            raise CommitInDoubt("this writer's last commit is in doubt", "it can settle that only by being made anew")
        self.bus.check_topics(outputs)
        membership = None
        if offsets:
            assert isinstance(consumer, KafkaConsumer), "offsets are a consumer group's"
            membership = consumer.entitled(offsets, epochs or {})
        began = time.monotonic()
        try:
            self.transact(outputs, offsets or {}, membership)
        except LOST as error:
            self.start_anew()
            raise PartitionLost("the group has moved on without this member", type(error).__name__) from error
        except REFUSED as error:
            self.start_anew()
            raise refused(error) from error
        except (errors.KafkaError, RuntimeError) as error:  # its I/O thread reports some of its own mistakes as RuntimeError
            self.usable = False
            raise self.failed(error, time.monotonic() - began) from error

    def transact(
        self, outputs: Sequence[Outgoing], offsets: Mapping[TopicPartition, int], membership: ConsumerGroupMetadata | None
    ) -> None:
        self.producer.begin_transaction()
        settled(self.producer, [send(self.producer, self.bus.name(message.topic), message) for message in outputs])
        if offsets:
            wire = {self.bus.place(place): OffsetAndMetadata(offset, "", -1) for place, offset in offsets.items()}
            self.producer.send_offsets_to_transaction(wire, membership)
        self.producer.commit_transaction()

    def failed(self, error: Exception, after_s: float) -> Fenced | CommitInDoubt:
        """What a failed commit means. A broker fences a transaction that it timed out, too: that is doubt, not a rival."""
        if errors.ProducerFencedError.__name__ in f"{error!r}" and after_s * 1000 < TRANSACTION_TIMEOUT_MS:
            return Fenced(
                f"another process has taken over as {self.id}",
                "two processes ran in the same slot",
                "stop one of them, or give each its own: --slot NAME",
            )
        return CommitInDoubt("it is not known whether a transaction was written", f"{type(error).__name__}: {error}")

    def start_anew(self) -> None:
        """Nothing was written; a new producer ends the old one's transaction and forgets what the old one would repeat."""
        end(self.producer, 0)
        try:
            self.producer = self.opened()
        except BusUnreachable as error:
            self.usable = False
            raise CommitInDoubt("a transaction could not be ended", error.why) from error

    def close(self) -> None:
        end(self.producer, CLOSE_MS / 1000 if self.usable else 0)


def messages_of(bus: KafkaBus, polled: Mapping[Place, Sequence[Any]]) -> list[Message]:
    messages = []
    for place, records in polled.items():
        topic, partition = bus.ours(place)
        messages += [
            Message(topic, partition, r.offset, r.key, r.value, tuple(map(tuple, r.headers or ())), r.timestamp)
            for r in records
        ]
    return messages


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
        self.client.close(timeout_ms=CLOSE_MS)


@contextmanager
def polling(bus: KafkaBus) -> Iterator[None]:
    with reached(bus.servers):
        try:
            yield
        except errors.OffsetOutOfRangeError as error:
            raise offsets_lost(bus, error.args[0], "its retention was faster than this reader") from error
        except errors.LogTruncationError as error:
            why = "a broker that lacked them has become its leader (unclean leader election)"
            raise offsets_lost(bus, error.divergent_offsets, why) from error


def offsets_lost(bus: KafkaBus, places: Mapping[Place, object], why: str) -> OffsetsLost:
    names = ", ".join(f"{bus.ours(place).topic}[{place.partition}]@{offset}" for place, offset in places.items())
    return OffsetsLost(
        f"the log no longer holds what comes next: {names}",
        why,
        "raise bus.retention_ms; to go on without them, start a new run: --run NAME",
    )


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

    def renew(self) -> None:
        """Every partition is ours anew."""
        self.number += 1
        self.current = dict.fromkeys(self.current, self.number)


class KafkaConsumer:
    """A member of a consumer group with cooperative rebalancing."""

    def __init__(self, bus: KafkaBus, group: str, topics: Sequence[str], member: str) -> None:
        self.bus = bus
        self.epochs = Epochs(bus)
        self.membership: ConsumerGroupMetadata | None = None
        with reached(bus.servers):
            self.client = kafka.KafkaConsumer(
                **bus.client,
                **reading(),
                group_id=group,
                client_id=f"charter-{member}",
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=10_000,
                heartbeat_interval_ms=HEARTBEAT_MS,
                metadata_max_age_ms=METADATA_MS,
                **({"group_instance_id": f"{group}.{member}"} if bus.static_members else {}),
            )
            self.learn([bus.name(topic) for topic in topics])
        self.client.subscribe([bus.name(topic) for topic in topics], listener=self.epochs)

    def learn(self, names: Sequence[str]) -> None:
        """Wait for the metadata of these topics.

        The member that leads the group shares out the partitions that it knows of: of a topic that is only just there it
        may know none, and would give nobody anything until its metadata ages.
        """
        deadline = time.monotonic() + CALL_MS / 1000
        while not all(self.client.partitions_for_topic(name) for name in names):
            if time.monotonic() > deadline:
                raise errors.KafkaTimeoutError(f"no metadata of {', '.join(names)}")

    def assignment(self) -> Offsets:
        return dict(self.epochs.current)

    def poll(self, timeout_s: float, max_records: int) -> list[Message]:
        with polling(self.bus):
            try:
                polled = self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
                polled = polled or self.finish_join(max_records)
            except errors.NoOffsetForPartitionError as error:
                # The group has never committed here: an explicit beginning, and only of these partitions.
                self.seek_all(self.client.beginning_offsets(list(error.args[0]), timeout_ms=CALL_MS))
                polled = {}
            if self.joined_anew():
                return []
        return messages_of(self.bus, polled)

    def finish_join(self, max_records: int) -> Mapping[Place, Sequence[Any]]:
        """Poll on for a while if a join is under way.

        The client throws away a join that completes between two polls and begins another, for which all members must join
        again: members that often do something else between short polls would hardly ever all come through.
        """
        polled: Mapping[Place, Sequence[Any]] = {}
        deadline = time.monotonic() + JOIN_S
        while not polled and self.client.group_metadata().state == MemberState.REBALANCING and time.monotonic() < deadline:
            polled = self.client.poll(timeout_ms=JOIN_POLL_MS, max_records=max_records)
        return polled

    def joined_anew(self) -> bool:
        """Note the membership that the present assignment belongs to.

        If it is another one than before, we were out of the group meanwhile and others may have moved on from where we
        stood, although the client (when it happens in the middle of a join) keeps its positions and calls no listener. So
        all partitions are ours anew, from their committed offsets.
        """
        present = self.client.group_metadata()
        if present.state != MemberState.STABLE:
            return False
        anew = self.membership is not None and present.member_id != self.membership.member_id
        if anew:
            self.epochs.renew()
            places = [self.bus.place(place) for place in self.epochs.current]
            committed = {self.bus.place(place): offset for place, offset in self.committed().items()}
            self.seek_all(self.client.beginning_offsets(places, timeout_ms=CALL_MS) | committed)
        self.membership = present
        return anew

    def seek_all(self, offsets: Mapping[Place, int]) -> None:
        for place, offset in offsets.items():
            self.client.seek(place, offset)

    def entitled(self, places: Iterable[TopicPartition], epochs: Mapping[TopicPartition, int]) -> ConsumerGroupMetadata:
        """The membership under which these partitions are ours in these epochs; raises PartitionLost."""
        present = self.assignment()
        for place in {*places, *epochs}:
            if place not in present or epochs.get(place, present[place]) != present[place]:
                raise PartitionLost(f"{place.topic}[{place.partition}] has moved to another member")
        now = self.client.group_metadata()
        if self.membership is None or now[:3] != self.membership[:3]:  # the broker would say so too, after more work
            raise PartitionLost("the group is sharing out its partitions anew")
        return self.membership

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.client.pause(*self.owned(partitions))

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self.client.resume(*self.owned(partitions))

    def owned(self, partitions: Iterable[TopicPartition]) -> list[Place]:
        return [self.bus.place(place) for place in partitions if place in self.epochs.current]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.epochs.current:
            raise PartitionLost(f"{partition.topic}[{partition.partition}] is not assigned to this member")
        self.client.seek(self.bus.place(partition), offset)

    def positions(self) -> Offsets:
        with reached(self.bus.servers):
            return {place: self.client.position(self.bus.place(place), timeout_ms=CALL_MS) for place in self.epochs.current}

    def committed(self) -> Offsets:
        with reached(self.bus.servers):
            found = {place: self.client.committed(self.bus.place(place), timeout_ms=CALL_MS) for place in self.epochs.current}
        return {place: offset for place, offset in found.items() if offset is not None}

    def close(self) -> None:
        self.client.close(autocommit=False, timeout_ms=CLOSE_MS)
