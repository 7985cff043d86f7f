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

from engine.bus.port import ConsumerRecord, Offsets, ProducerRecord, TopicDescription, TopicPartition
from engine.errors import BusUnreachable, CommitUncertain, OffsetsLost, PartitionLost, UsageError, WriterFenced
from schemas.topics import DEAD_LETTER_OVERHEAD_BYTES, MAX_RECORD_BYTES, TopicSpec

logger = logging.getLogger("charter.bus")
_CONNECT_LOCK = threading.Lock()  # `connecting` listens to a log that all buses of a process share

_TRANSACTION_TIMEOUT_MS = 10_000  # a killed worker's open transaction holds readers up for at most this long
_FLUSH_TIMEOUT_S = 30.0
_BATCH_BYTES = 256 * 1024
_LINGER_MS = 100
BOOTSTRAP_TIMEOUT_MS = 15_000
_CLOSE_TIMEOUT_MS = 5_000
_CONNECT_TIMEOUT_S = 5.0
_REQUEST_TIMEOUT_MS = 30_000
_METADATA_MAX_AGE_MS = 60_000  # how soon added partitions are noticed
_HEARTBEAT_INTERVAL_MS = 1_000  # within this the members learn that the group is sharing out anew
_JOIN_TIMEOUT_S = 2.0
_JOIN_POLL_TIMEOUT_MS = 200
_SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 2 * DEAD_LETTER_OVERHEAD_BYTES
_RETRY_INTERVAL_S = 0.2
# Who would answer is being chosen anew.
_COORDINATOR_ERRORS = (
    errors.CoordinatorNotAvailableError,
    errors.CoordinatorLoadInProgressError,
    errors.NotCoordinatorError,
)
_CONNECTION_ERRORS = (errors.KafkaConnectionError, errors.NodeNotReadyError, errors.NotControllerError)
# The group has moved on without this member.
_MEMBERSHIP_ERRORS = (
    errors.CommitFailedError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.RebalanceInProgressError,
    errors.FencedInstanceIdError,
)
# The broker is there and says no: waiting does not help, somebody has to change something.
_REJECTION_ERRORS = (
    errors.AuthorizationError,
    errors.KafkaConfigurationError,
    errors.InvalidTopicError,
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
)
# kafka-python's words for it.
_DISCONNECT_MESSAGE = "socket disconnected"
# Wrong use of the client, which is a mistake of this file.
_PROGRAMMING_ERRORS = (errors.IllegalStateError, errors.IllegalArgumentError)


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
def _translate_errors(servers: Sequence[str]) -> Iterator[None]:
    """The client's errors in our words: the broker is away, or it is there and refuses."""
    try:
        yield
    except _PROGRAMMING_ERRORS:
        raise
    except _REJECTION_ERRORS as error:
        raise _make_rejected_error(error) from error
    except (errors.KafkaError, OSError) as error:
        raise BusUnreachable(
            f"Kafka at {','.join(servers)} does not answer",
            _explain_failure(servers, error),
            "look at the broker, at bus.address, and at the user, password and protocol that it wants",
        ) from error


def _make_rejected_error(error: Exception) -> UsageError:
    return UsageError(
        "Kafka refuses what it was asked",
        f"{error}",
        "look at the client's settings, the rights of its user, and the topic's max.message.bytes",
    )


def _check_reachable(servers: Sequence[str]) -> None:
    """Raise OSError at once when nobody listens on any of the servers: the client would try for its whole timeout."""
    failures = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            failures.append(f"{server}: {error}")
    raise ConnectionError("; ".join(failures))


def _explain_failure(servers: Sequence[str], error: Exception) -> str:
    """Tell a broker that is not there from one that does not let us in (the client says the same of both)."""
    try:
        _check_reachable(servers)
    except OSError as unreachable:
        return str(unreachable)
    return f"it accepts connections, but then: {error}"


class _ConnectionErrorCapture(logging.Handler):
    """What the client's log says of its attempts to connect: its error says only that they took too long."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failures: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.failures += [argument for argument in arguments if isinstance(argument, Exception)]

    def get_most_specific(self, error: Exception) -> Exception:
        """Brokers also just hang up, and the client gives up, on the same occasion."""
        vague = (_DISCONNECT_MESSAGE, errors.RequestTimedOutError.__name__, errors.KafkaTimeoutError.__name__)
        telling = [failure for failure in self.failures if not any(word in repr(failure) for word in vague)]
        return (telling or self.failures or [error])[0]


@contextmanager
def capture_connection_errors(protocol: str) -> Iterator[None]:
    """Raise what kept the client from connecting in place of its timeout."""
    logger, overheard = logging.getLogger("kafka.net.manager"), _ConnectionErrorCapture()
    level, propagate, shown = logger.level, logger.propagate, logger.isEnabledFor(logging.WARNING)
    logger.addHandler(overheard)
    logger.setLevel(logging.WARNING)
    logger.propagate = propagate and shown  # heard here, and no louder elsewhere than it was
    try:
        yield
    except errors.KafkaTimeoutError as error:
        words = f"{overheard.get_most_specific(error)}"
        # A slow client reads the broker's refusal together with the end of the connection, and drops it.
        hint = (
            " (so a broker ends a failed authentication too)"
            if _DISCONNECT_MESSAGE in words and protocol.startswith("SASL")
            else ""
        )
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
        if protocol not in _SECURITY_PROTOCOLS:  # the client would take it for PLAINTEXT
            raise UsageError(
                f"there is no security_protocol {protocol!r}",
                f"it is one of {', '.join(_SECURITY_PROTOCOLS)}",
                "set bus.security_protocol",
            )
        self.client_options = {
            "bootstrap_servers": servers,
            "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
            "reconnect_backoff_max_ms": 1000,
            **(options or {}),
        }
        self.lock = threading.Lock()
        self.known_topics: set[str] = set()
        with _translate_errors(servers):
            _check_reachable(servers)
            with _CONNECT_LOCK, capture_connection_errors(protocol):
                self.admin = KafkaAdminClient(**self.client_options)
            self.cluster_id = str(self.call_with_retry(self.admin.describe_cluster)["cluster_id"])
        self.producer: kafka.KafkaProducer | None = None

    def call_with_retry(self, call: Callable[[], Any]) -> Any:
        """Ask again while whoever has to answer is only just being chosen: of a fresh broker, or after one has gone away."""
        deadline = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
        while True:
            try:
                with self.lock:
                    return call()
            except (*_COORDINATOR_ERRORS, *_CONNECTION_ERRORS):
                _check_reachable(self.servers)  # with nobody there at all it is over at once
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_INTERVAL_S)

    def add_prefix(self, topic: str) -> str:
        return self.prefix + topic

    def to_kafka_partition(self, topic_partition: TopicPartition) -> Place:
        return Place(self.add_prefix(topic_partition.topic), topic_partition.partition)

    def from_kafka_partition(self, kafka_partition: Place) -> TopicPartition:
        return TopicPartition(kafka_partition.topic.removeprefix(self.prefix), kafka_partition.partition)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        with _translate_errors(self.servers):
            there = set(self.call_with_retry(self.admin.list_topics))
            missing = {
                self.add_prefix(spec.name): _make_topic_options(spec)
                for spec in specs
                if self.add_prefix(spec.name) not in there
            }
            if not missing:
                return []
            answers = self.call_with_retry(lambda: self.admin.create_topics(missing, raise_errors=False))["topics"]
            for answer in answers:
                error = errors.for_code(answer["error_code"])
                # Another process may have created them at the same moment.
                if error not in (errors.NoError, errors.TopicAlreadyExistsError):
                    raise error(f"{answer['name']}: {answer['error_message']}")
            self.call_with_retry(lambda: self.admin.wait_for_topics(list(missing)))
        return [answer["name"].removeprefix(self.prefix) for answer in answers if not answer["error_code"]]

    def fetch_topic_metadata(self, topics: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What the cluster says now of those of these topics that there are."""
        names = [self.add_prefix(topic) for topic in topics]
        with _translate_errors(self.servers):
            found = self.call_with_retry(lambda: self.admin.describe_topics(names))
        return {topic["name"].removeprefix(self.prefix): topic for topic in found if not topic["error_code"]}

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        return {name: str(topic["topic_id"]) for name, topic in self.fetch_topic_metadata(topics).items()}

    def count_partitions(self, topic: str) -> int:
        return len(self.list_partitions([topic]))

    def list_partitions(self, topics: Iterable[str]) -> list[Place]:
        """Every partition that these topics have now; they may have been given more since the last time."""
        wanted = list(topics)
        described = self.fetch_topic_metadata(wanted)
        for topic in wanted:
            if topic not in described:
                where = f"{self.add_prefix(topic)} at {','.join(self.servers)}"
                raise UsageError(f"there is no topic {where}", "nobody has created it yet", "type: charter topics create")
        self.known_topics |= set(wanted)
        return [
            Place(self.add_prefix(topic), number) for topic in wanted for number in range(len(described[topic]["partitions"]))
        ]

    def check_topics(self, records: Iterable[ProducerRecord]) -> None:
        """Raise UsageError for a topic that there is not: the client would wait a minute for it to appear."""
        if unknown := {message.topic for message in records} - self.known_topics:
            self.list_partitions(unknown)

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets:
        return self.list_offsets(topics, OffsetSpec.EARLIEST)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        """Ends as written, not as committed.

        A transaction's markers come a moment after its commit has returned, and whoever reads up to these ends must not
        miss what it has just written itself.
        """
        return self.list_offsets(topics, OffsetSpec.LATEST)

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        return self.end_offsets(topics) | {
            place: offset for place, offset in self.list_offsets(topics, timestamp_ms).items() if offset >= 0
        }

    def list_offsets(self, topics: Sequence[str], offset_spec: Any) -> Offsets:
        places = self.list_partitions(topics)
        with _translate_errors(self.servers):
            found = self.call_with_retry(
                lambda: self.admin.list_partition_offsets(dict.fromkeys(places, offset_spec), timeout_ms=_REQUEST_TIMEOUT_MS)
            )
        return {self.from_kafka_partition(place): entry.offset for place, entry in found.items()}

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        described = self.fetch_topic_metadata(topics)
        resources = [ConfigResource(ConfigResourceType.TOPIC, self.add_prefix(topic)) for topic in described]
        with _translate_errors(self.servers):
            configs = self.call_with_retry(lambda: self.admin.describe_configs(resources))["topic"] if resources else {}
        return [
            TopicDescription(
                name=name,
                topic_id=str(topic["topic_id"]),
                partitions=len(topic["partitions"]),
                replicas=min(len(p["replica_nodes"]) for p in topic["partitions"]),
                in_sync_replicas=min(len(p["isr_nodes"]) for p in topic["partitions"]),
                configs={key: str(config["value"]) for key, config in configs.get(self.add_prefix(name), {}).items()},
            )
            for name, topic in described.items()
        ]

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        name, places = self.prefix + group, self.list_partitions(topics)
        with _translate_errors(self.servers):
            found = self.call_with_retry(lambda: self.admin.list_group_offsets({name: places})).get(name, {})
        return {self.from_kafka_partition(place): entry.offset for place, entry in found.items() if entry.offset >= 0}

    def initialize_group_offsets(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        known = self.committed(group, sorted({place.topic for place in offsets}))
        wanted = {
            self.to_kafka_partition(place): OffsetAndMetadata(offset, "", -1)
            for place, offset in offsets.items()
            if place not in known
        }
        if not wanted:
            return
        with _translate_errors(self.servers):
            answers = self.call_with_retry(
                lambda: _raise_partition_errors(self.admin.alter_group_offsets(self.prefix + group, wanted))
            )
        assert set(answers) == set(wanted)

    # Writing and reading

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        self.check_topics(records)
        with self.lock, _translate_errors(self.servers):
            if self.producer is None:
                self.producer = kafka.KafkaProducer(**self.client_options, **make_producer_options())
            try:
                require_delivered(
                    self.producer, [_send_record(self.producer, self.add_prefix(message.topic), message) for message in records]
                )
            except errors.KafkaError:
                # It may be broken for good, and may hold messages that the caller publishes again.
                _close_producer(self.producer, 0)
                self.producer = None
                raise

    def open_writer(self, transactional_id: str) -> KafkaWriter:
        return KafkaWriter(self, self.prefix + transactional_id)

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str) -> KafkaConsumer:
        self.list_partitions(topics)  # an unknown topic is an error now, not at the first poll
        return KafkaConsumer(self, self.prefix + group, topics, member)

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> KafkaReader:
        return KafkaReader(self, positions)

    def close(self) -> None:
        if self.producer is not None:
            _close_producer(self.producer)
        self.admin.close()


def _raise_partition_errors(answers: Mapping[Place, type[errors.KafkaError]]) -> Mapping[Place, type[errors.KafkaError]]:
    """Raise the first error of a per-partition answer."""
    for place, error in answers.items():
        if error is not errors.NoError:
            raise error(f"{place.topic}[{place.partition}]")
    return answers


def make_consumer_options() -> dict[str, Any]:
    return {
        "metrics_enabled": False,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": _MAX_REQUEST_BYTES,
    }


def make_producer_options() -> dict[str, Any]:
    """Whoever sends here flushes at once, so a long linger costs nothing.

    Without it the client sends each record by itself while the next is being added: more requests, and a wakeup for each.
    """
    return {
        "acks": "all",
        "allow_auto_create_topics": False,
        "batch_size": _BATCH_BYTES,
        "compression_type": "lz4",
        "linger_ms": _LINGER_MS,
        "max_request_size": _MAX_REQUEST_BYTES,
        "metrics_enabled": False,  # nobody reads them, and they cost a tenth of the client's time
    }


def _make_topic_options(spec: TopicSpec) -> dict[str, Any]:
    configs = {
        "cleanup.policy": "compact" if spec.is_compacted else "delete",
        "retention.ms": str(spec.retention_ms),
        "max.message.bytes": str(spec.max_message_bytes + DEAD_LETTER_OVERHEAD_BYTES),
    }
    return {"num_partitions": spec.num_partitions, "replication_factor": spec.replication_factor, "configs": configs}


def _send_record(producer: kafka.KafkaProducer, topic: str, record: ProducerRecord) -> Any:
    return producer.send(topic, key=record.key, value=record.value, headers=list(record.headers))


def require_delivered(producer: kafka.KafkaProducer, futures: Sequence[Any]) -> None:
    """Raise unless every send has succeeded; a commit that returns is not enough (see the module's docstring)."""
    producer.flush(timeout=_FLUSH_TIMEOUT_S)
    for future in futures:
        future.get(timeout=0)


def _close_producer(producer: kafka.KafkaProducer, timeout_s: float = _CLOSE_TIMEOUT_MS / 1000) -> None:
    """Close a producer without hanging or failing. What it still holds then is not sent: its successor settles that."""
    try:
        producer.close(timeout=timeout_s)
    except errors.KafkaError as error:
        logger.info("a producer is closed by force: %s", error)
        producer._sender.force_close()  # what `close` would go on to do, had it not raised


class KafkaWriter:
    """Transactions under one transactional id; opening it settles and fences what the id's earlier writer left."""

    def __init__(self, bus: KafkaBus, transactional_id: str) -> None:
        self.bus, self.transactional_id = bus, transactional_id
        self.is_usable = True
        self.producer = self.open_producer()

    def open_producer(self) -> kafka.KafkaProducer:
        with _translate_errors(self.bus.servers):
            producer = kafka.KafkaProducer(
                **self.bus.client_options,
                **make_producer_options(),
                transactional_id=self.transactional_id,
                transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
            )
            try:
                producer.init_transactions()
            except BaseException:
                _close_producer(producer)
                raise
        return producer

    def commit(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        if not self.is_usable:
            raise CommitUncertain("this writer's last commit is in doubt", "it can settle that only by being made anew")
        self.bus.check_topics(outputs)
        membership = None
        if offsets:
            assert isinstance(consumer, KafkaConsumer), "offsets are a consumer group's"
            membership = consumer.require_ownership(offsets, epochs or {})
        began = time.monotonic()
        try:
            self.write_transaction(outputs, offsets or {}, membership)
        except _MEMBERSHIP_ERRORS as error:
            self.replace_producer()
            raise PartitionLost("the group has moved on without this member", type(error).__name__) from error
        except _REJECTION_ERRORS as error:
            self.replace_producer()
            raise _make_rejected_error(error) from error
        except (errors.KafkaError, RuntimeError) as error:  # its I/O thread reports some of its own mistakes as RuntimeError
            self.is_usable = False
            raise self.classify_failure(error, time.monotonic() - began) from error

    def write_transaction(
        self, outputs: Sequence[ProducerRecord], offsets: Mapping[TopicPartition, int], membership: ConsumerGroupMetadata | None
    ) -> None:
        self.producer.begin_transaction()
        require_delivered(
            self.producer, [_send_record(self.producer, self.bus.add_prefix(message.topic), message) for message in outputs]
        )
        if offsets:
            wire = {self.bus.to_kafka_partition(place): OffsetAndMetadata(offset, "", -1) for place, offset in offsets.items()}
            self.producer.send_offsets_to_transaction(wire, membership)
        self.producer.commit_transaction()

    def classify_failure(self, error: Exception, after_s: float) -> WriterFenced | CommitUncertain:
        """What a failed commit means. A broker fences a transaction that it timed out, too: that is doubt, not a rival."""
        if errors.ProducerFencedError.__name__ in f"{error!r}" and after_s * 1000 < _TRANSACTION_TIMEOUT_MS:
            return WriterFenced(
                f"another process has taken over as {self.transactional_id}",
                "two processes ran in the same slot",
                "stop one of them, or give each its own: --slot NAME",
            )
        return CommitUncertain("it is not known whether a transaction was written", f"{type(error).__name__}: {error}")

    def replace_producer(self) -> None:
        """Nothing was written; a new producer ends the old one's transaction and forgets what the old one would repeat."""
        _close_producer(self.producer, 0)
        try:
            self.producer = self.open_producer()
        except BusUnreachable as error:
            self.is_usable = False
            raise CommitUncertain("a transaction could not be ended", error.why) from error

    def close(self) -> None:
        _close_producer(self.producer, _CLOSE_TIMEOUT_MS / 1000 if self.is_usable else 0)


def _to_consumer_records(bus: KafkaBus, polled: Mapping[Place, Sequence[Any]]) -> list[ConsumerRecord]:
    messages = []
    for place, records in polled.items():
        topic, partition = bus.from_kafka_partition(place)
        messages += [
            ConsumerRecord(topic, partition, r.offset, r.key, r.value, tuple(map(tuple, r.headers or ())), r.timestamp)
            for r in records
        ]
    return messages


class KafkaReader:
    """Reads given partitions, without a group."""

    def __init__(self, bus: KafkaBus, positions: Mapping[TopicPartition, int]) -> None:
        self.bus = bus
        self.partitions: list[TopicPartition] = []
        with _translate_errors(bus.servers):
            self.client = kafka.KafkaConsumer(**bus.client_options, **make_consumer_options())
        self.add_partitions(positions)

    def add_partitions(self, positions: Mapping[TopicPartition, int]) -> None:
        kept = self.positions()
        self.partitions = list({**kept, **positions})
        self.client.assign([self.bus.to_kafka_partition(place) for place in self.partitions])
        for place, offset in {**kept, **positions}.items():
            self.client.seek(self.bus.to_kafka_partition(place), offset)

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        with _translate_offset_errors(self.bus):
            return _to_consumer_records(self.bus, self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records))

    def positions(self) -> Offsets:
        with _translate_errors(self.bus.servers):
            return {
                place: self.client.position(self.bus.to_kafka_partition(place), timeout_ms=_REQUEST_TIMEOUT_MS)
                for place in self.partitions
            }

    def close(self) -> None:
        self.client.close(timeout_ms=_CLOSE_TIMEOUT_MS)


@contextmanager
def _translate_offset_errors(bus: KafkaBus) -> Iterator[None]:
    with _translate_errors(bus.servers):
        try:
            yield
        except errors.OffsetOutOfRangeError as error:
            raise _make_offsets_lost_error(bus, error.args[0], "its retention was faster than this reader") from error
        except errors.LogTruncationError as error:
            why = "a broker that lacked them has become its leader (unclean leader election)"
            raise _make_offsets_lost_error(bus, error.divergent_offsets, why) from error


def _make_offsets_lost_error(bus: KafkaBus, places: Mapping[Place, object], why: str) -> OffsetsLost:
    names = ", ".join(
        f"{bus.from_kafka_partition(place).topic}[{place.partition}]@{offset}" for place, offset in places.items()
    )
    return OffsetsLost(
        f"the log no longer holds what comes next: {names}",
        why,
        "raise bus.retention_ms; to go on without them, start a new run: --run NAME",
    )


class _AssignmentEpochs(kafka.ConsumerRebalanceListener):
    """Notes which partitions are ours, each with the number of the assignment that gave it to us."""

    def __init__(self, bus: KafkaBus) -> None:
        self.bus, self.latest_epoch = bus, 0
        self.by_partition: Offsets = {}

    def on_partitions_assigned(self, assigned: Iterable[Place]) -> None:
        self.latest_epoch += 1
        new = {self.bus.from_kafka_partition(place): self.latest_epoch for place in assigned}
        self.by_partition = {**new, **{place: epoch for place, epoch in self.by_partition.items() if place not in new}}

    def on_partitions_revoked(self, revoked: Iterable[Place]) -> None:
        gone = {self.bus.from_kafka_partition(place) for place in revoked}
        self.by_partition = {place: epoch for place, epoch in self.by_partition.items() if place not in gone}

    def on_partitions_lost(self, lost: Iterable[Place]) -> None:
        self.on_partitions_revoked(lost)

    def renew_all(self) -> None:
        """Every partition is ours anew."""
        self.latest_epoch += 1
        self.by_partition = dict.fromkeys(self.by_partition, self.latest_epoch)


class KafkaConsumer:
    """A member of a consumer group with cooperative rebalancing."""

    def __init__(self, bus: KafkaBus, group: str, topics: Sequence[str], member: str) -> None:
        self.bus = bus
        self.epochs = _AssignmentEpochs(bus)
        self.membership: ConsumerGroupMetadata | None = None
        with _translate_errors(bus.servers):
            self.client = kafka.KafkaConsumer(
                **bus.client_options,
                **make_consumer_options(),
                group_id=group,
                client_id=f"charter-{member}",
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=10_000,
                heartbeat_interval_ms=_HEARTBEAT_INTERVAL_MS,
                metadata_max_age_ms=_METADATA_MAX_AGE_MS,
                **({"group_instance_id": f"{group}.{member}"} if bus.static_members else {}),
            )
            self.wait_for_metadata([bus.add_prefix(topic) for topic in topics])
        self.client.subscribe([bus.add_prefix(topic) for topic in topics], listener=self.epochs)

    def wait_for_metadata(self, names: Sequence[str]) -> None:
        """Wait for the metadata of these topics.

        The member that leads the group shares out the partitions that it knows of: of a topic that is only just there it
        may know none, and would give nobody anything until its metadata ages.
        """
        deadline = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
        while not all(self.client.partitions_for_topic(name) for name in names):
            if time.monotonic() > deadline:
                raise errors.KafkaTimeoutError(f"no metadata of {', '.join(names)}")

    def assignment(self) -> Offsets:
        return dict(self.epochs.by_partition)

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        with _translate_offset_errors(self.bus):
            try:
                polled = self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
                polled = polled or self.finish_join(max_records)
            except errors.NoOffsetForPartitionError as error:
                # The group has never committed here: an explicit beginning, and only of these partitions.
                self.seek_all(self.client.beginning_offsets(list(error.args[0]), timeout_ms=_REQUEST_TIMEOUT_MS))
                polled = {}
            if self.detect_rejoin():
                return []
        return _to_consumer_records(self.bus, polled)

    def finish_join(self, max_records: int) -> Mapping[Place, Sequence[Any]]:
        """Poll on for a while if a join is under way.

        The client throws away a join that completes between two polls and begins another, for which all members must join
        again: members that often do something else between short polls would hardly ever all come through.
        """
        polled: Mapping[Place, Sequence[Any]] = {}
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while not polled and self.client.group_metadata().state == MemberState.REBALANCING and time.monotonic() < deadline:
            polled = self.client.poll(timeout_ms=_JOIN_POLL_TIMEOUT_MS, max_records=max_records)
        return polled

    def detect_rejoin(self) -> bool:
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
            self.epochs.renew_all()
            places = [self.bus.to_kafka_partition(place) for place in self.epochs.by_partition]
            committed = {self.bus.to_kafka_partition(place): offset for place, offset in self.committed().items()}
            self.seek_all(self.client.beginning_offsets(places, timeout_ms=_REQUEST_TIMEOUT_MS) | committed)
        self.membership = present
        return anew

    def seek_all(self, offsets: Mapping[Place, int]) -> None:
        for place, offset in offsets.items():
            self.client.seek(place, offset)

    def require_ownership(
        self, partitions: Iterable[TopicPartition], epochs: Mapping[TopicPartition, int]
    ) -> ConsumerGroupMetadata:
        """The membership under which these partitions are ours in these epochs; raises PartitionLost."""
        present = self.assignment()
        for place in {*partitions, *epochs}:
            if place not in present or epochs.get(place, present[place]) != present[place]:
                raise PartitionLost(f"{place.topic}[{place.partition}] has moved to another member")
        now = self.client.group_metadata()
        if self.membership is None or now[:3] != self.membership[:3]:  # the broker would say so too, after more work
            raise PartitionLost("the group is sharing out its partitions anew")
        return self.membership

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.client.pause(*self.filter_owned(partitions))

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self.client.resume(*self.filter_owned(partitions))

    def filter_owned(self, partitions: Iterable[TopicPartition]) -> list[Place]:
        return [self.bus.to_kafka_partition(place) for place in partitions if place in self.epochs.by_partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.epochs.by_partition:
            raise PartitionLost(f"{partition.topic}[{partition.partition}] is not assigned to this member")
        self.client.seek(self.bus.to_kafka_partition(partition), offset)

    def positions(self) -> Offsets:
        with _translate_errors(self.bus.servers):
            return {
                place: self.client.position(self.bus.to_kafka_partition(place), timeout_ms=_REQUEST_TIMEOUT_MS)
                for place in self.epochs.by_partition
            }

    def committed(self) -> Offsets:
        with _translate_errors(self.bus.servers):
            found = {
                place: self.client.committed(self.bus.to_kafka_partition(place), timeout_ms=_REQUEST_TIMEOUT_MS)
                for place in self.epochs.by_partition
            }
        return {place: offset for place, offset in found.items() if offset is not None}

    def close(self) -> None:
        self.client.close(autocommit=False, timeout_ms=_CLOSE_TIMEOUT_MS)
