"""Implement the bus on Apache Kafka with the client kafka-python.

The defaults of the client do not give exactly-once delivery. This module uses the client differently:

1. `commit_transaction` of the client can return normally although nothing was written, because the batches exceeded the
   delivery timeout. So the result of every send is checked before the transaction is committed. After an uncertain commit the
   producer is closed. A new producer with the same transactional id completes or aborts the old transaction.
2. If a broker rejects offsets, the client's producer keeps the offsets and sends them again with its next transaction. So the
   producer is also replaced after a rejection.
3. Offsets are sent with the group membership at the time of the current assignment. So the broker fences members of an older
   generation. The current membership of the client is unsuitable, because the client rejoins in the background. When a
   heartbeat reports that the client was removed from the group, the client does not send a member id. In this case the broker
   does not check the membership. After a cooperative rebalance, a member could still commit offsets of a partition that it has
   lost. The check of assignment epochs prevents this.
4. Consumers read only committed records, never auto-commit, and never reset their offsets automatically.
5. Rebalance listeners run on the client's thread, so they only record epochs.
6. Every committed offset has the topic id and the offset itself in its metadata. So an offset of a deleted topic with the same
   name, and an offset that another program has written, can be recognized, even if that program keeps the metadata.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import kafka
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata
from kafka.structs import TopicPartition as KafkaTopicPartition

from engine.bus.hanging_transactions import (
    ConnectionWatch,
    commit_empty_transaction,
    find_hanging_partitions,
    is_last_transaction_committed,
)
from engine.bus.login import require_login
from engine.bus.port import (
    CommittedOffset,
    ConsumerRecord,
    Offsets,
    ProducerRecord,
    TopicDescription,
    TopicPartition,
    make_group_active_error,
    omit_old_topics,
)
from engine.errors import (
    BusUnreachable,
    CommitUncertain,
    LoginRejected,
    OffsetsLost,
    OffsetsUnstable,
    PartitionLost,
    UsageError,
    WriterFenced,
)
from schemas.topics import DEAD_LETTER_OVERHEAD_BYTES, MAX_RECORD_BYTES, TopicSpec

if TYPE_CHECKING:
    from engine.bus.tokens import TokenProvider

logger = logging.getLogger("charter.bus")
_CONNECT_LOCK = threading.Lock()  # all buses of a process share the logger that `capture_connection_errors` changes

_TRANSACTION_TIMEOUT_MS = 10_000  # the open transaction of a killed worker blocks readers for at most this time
_FLUSH_TIMEOUT_S = 30.0
_BATCH_BYTES = 256 * 1024
_LINGER_MS = 100
BOOTSTRAP_TIMEOUT_MS = 15_000
_CLOSE_TIMEOUT_MS = 5_000
_CONNECT_TIMEOUT_S = 5.0
_REQUEST_TIMEOUT_MS = 30_000
_METADATA_MAX_AGE_MS = 60_000  # new partitions are detected within this time
_CLIENT_ID_PREFIX = "charter-"
_HEARTBEAT_INTERVAL_MS = 1_000  # members detect a rebalance within this time
_JOIN_TIMEOUT_S = 2.0
_JOIN_POLL_TIMEOUT_MS = 200
_SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 2 * DEAD_LETTER_OVERHEAD_BYTES
_RETRY_INTERVAL_S = 0.2
_STAMP_PREFIX = "charter:"  # before the topic id and the offset in the metadata of a committed offset
# These errors occur while a coordinator is being elected.
_COORDINATOR_ERRORS = (
    errors.CoordinatorNotAvailableError,
    errors.CoordinatorLoadInProgressError,
    errors.NotCoordinatorError,
)
# These errors occur while a partition has no leader: its topic was just created, or its broker has just failed.
_LEADER_ERRORS = (errors.UnknownBrokerIdError, errors.LeaderNotAvailableError, errors.NotLeaderForPartitionError)
_CONNECTION_ERRORS = (errors.KafkaConnectionError, errors.NodeNotReadyError, errors.NotControllerError)
# These errors occur if the group has rebalanced without this member.
_MEMBERSHIP_ERRORS = (
    errors.CommitFailedError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.RebalanceInProgressError,
    errors.FencedInstanceIdError,
)
# The broker rejected the request. A retry does not help: the configuration must be changed.
_REJECTION_ERRORS = (
    errors.AuthorizationError,
    errors.KafkaConfigurationError,
    errors.InvalidTopicError,
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
)
# kafka-python's error contains this text if the broker closed the connection.
_DISCONNECT_MESSAGE = "socket disconnected"
# These errors indicate bugs in this module: it used the client incorrectly.
_PROGRAMMING_ERRORS = (errors.IllegalStateError, errors.IllegalArgumentError)


def parse_address(address: str) -> list[str]:
    """Return the bootstrap servers of kafka://HOST:PORT[,HOST:PORT]. Raise UsageError if the address has a different form."""
    if "@" in address:  # the part before @ may contain a password, so the message does not contain the address
        raise UsageError(
            "a Kafka address must not contain a user or a password",
            "the user and the password are settings: bus.sasl_username, bus.sasl_password_env, bus.sasl_password_file",
            "type: kafka://HOST:PORT",
        )
    servers = [server.strip() for server in address.removeprefix("kafka://").rstrip("/").split(",")]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(
                f"{address!r} is not a Kafka address", f"{server!r} is not HOST:PORT", "type: kafka://localhost:9092"
            )
    return servers


@contextmanager
def _translate_errors(client_options: Mapping[str, Any]) -> Iterator[None]:
    """Raise UsageError if the broker rejects a request or the login. Replace all other errors of the client with BusUnreachable."""
    try:
        yield
    except _PROGRAMMING_ERRORS:
        raise
    except _REJECTION_ERRORS as error:
        raise _make_rejected_error(error) from error
    except (errors.KafkaError, OSError) as error:
        raise BusUnreachable(
            f"Kafka at {','.join(client_options['bootstrap_servers'])} is unreachable",
            _explain_failure(client_options, error),
            "check the broker, bus.address, and the user, password and security protocol",
        ) from error


def _make_rejected_error(error: Exception) -> UsageError:
    return UsageError(
        "Kafka rejected the request",
        f"{error}",
        "check the bus settings, the permissions of the Kafka user, and max.message.bytes of the topic",
    )


def _check_reachable(servers: Sequence[str]) -> None:
    """Raise OSError at once if no server accepts connections. Without this check the client retries until its timeout."""
    failures = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            failures.append(f"{server}: {error}")
    raise ConnectionError("; ".join(failures))


def _explain_failure(client_options: Mapping[str, Any], error: Exception) -> str:
    """Return the reason of a failure. Raise LoginRejected if it is a rejected login. The client's error is often only a timeout."""
    try:
        _check_reachable(client_options["bootstrap_servers"])
    except OSError as unreachable:
        return str(unreachable)
    _require_current_login(client_options)
    return f"the broker accepts connections, but then fails: {error}"


def _require_current_login(client_options: Mapping[str, Any]) -> None:
    """Raise LoginRejected if the brokers reject the login. Try once more with a new token, because a token can be withdrawn."""
    if "security_protocol" not in client_options:
        return
    try:
        require_login(client_options)
    except LoginRejected:
        if provider := client_options.get("sasl_oauth_token_provider"):
            provider.renew()
        require_login(client_options)


class _ConnectionErrorCapture(logging.Handler):
    """Collects the errors that the client logs while it connects. The exception of the client only reports a timeout."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failures: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.failures += [argument for argument in arguments if isinstance(argument, Exception)]

    def get_most_specific(self, error: Exception) -> Exception:
        """Return the first logged error that is not a disconnect or a timeout, because these often follow the actual cause."""
        generic = (_DISCONNECT_MESSAGE, errors.RequestTimedOutError.__name__, errors.KafkaTimeoutError.__name__)
        specific = [failure for failure in self.failures if not any(text in repr(failure) for text in generic)]
        return (specific or self.failures or [error])[0]


@contextmanager
def capture_connection_errors(protocol: str) -> Iterator[None]:
    """If the client times out while it connects, raise a ConnectionError with the logged cause instead."""
    logger, capture = logging.getLogger("kafka.net.manager"), _ConnectionErrorCapture()
    level, propagate, is_shown = logger.level, logger.propagate, logger.isEnabledFor(logging.WARNING)
    logger.addHandler(capture)
    logger.setLevel(logging.WARNING)
    logger.propagate = (
        propagate and is_shown
    )  # other handlers must receive only the messages that they would receive without this capture
    try:
        yield
    except errors.KafkaTimeoutError as error:
        cause = f"{capture.get_most_specific(error)}"
        # If a slow client reads the rejection and the end of the connection together, it discards the rejection.
        is_ambiguous = _DISCONNECT_MESSAGE in cause and protocol.startswith("SASL")
        hint = " (brokers also disconnect after a failed authentication)" if is_ambiguous else ""
        raise ConnectionError(cause + hint) from error
    finally:
        logger.removeHandler(capture)
        logger.setLevel(level)
        logger.propagate = propagate


def _hide_debug_messages() -> None:
    """Drop the debug messages of the client that contain the bytes of a login or its configuration, and so its secrets."""
    for name in ("kafka.net.connection", "kafka.protocol.parser", "kafka.admin.client"):
        logging.getLogger(name).addFilter(_is_no_debug_message)


def _is_no_debug_message(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


class KafkaBus:
    """The log on the Kafka brokers at `servers`.

    `options` are security options of kafka-python. These options are never printed.
    """

    def __init__(
        self, servers: list[str], *, prefix: str = "", options: Mapping[str, Any] | None = None, static_members: bool = False
    ) -> None:
        self.servers, self.prefix, self.static_members = servers, prefix, static_members
        protocol = (options or {}).get("security_protocol", "PLAINTEXT")
        if protocol not in _SECURITY_PROTOCOLS:  # with an unknown protocol the client uses PLAINTEXT without an error
            raise UsageError(
                f"unknown security protocol {protocol!r}",
                f"the security protocol must be one of {', '.join(_SECURITY_PROTOCOLS)}",
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
        self.producer: kafka.KafkaProducer | None = None
        self.token_provider: TokenProvider | None = self.client_options.get("sasl_oauth_token_provider")
        try:
            if protocol != "PLAINTEXT":
                _hide_debug_messages()
            if self.token_provider:
                self.token_provider.start()
            self.connect(protocol)
        except BaseException:
            if self.token_provider:
                self.token_provider.close()
            raise

    def connect(self, protocol: str) -> None:
        """Open the client for administration, and read the id of the cluster."""
        with _translate_errors(self.client_options):
            _check_reachable(self.servers)
            if protocol != "PLAINTEXT":
                require_login(self.client_options)
            with _CONNECT_LOCK, capture_connection_errors(protocol):
                self.admin = KafkaAdminClient(**self.client_options)
            self.cluster_id = str(self.call_with_retry(self.admin.describe_cluster)["cluster_id"])

    def call_with_retry(self, call: Callable[[], Any]) -> Any:
        """Call a function. Retry while a coordinator, controller or leader is being elected.

        This happens on a new cluster, on a new topic, and after a failure of a broker.
        """
        deadline = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
        is_login_checked = False
        while True:
            try:
                with self.lock:
                    return call()
            except (*_COORDINATOR_ERRORS, *_LEADER_ERRORS, *_CONNECTION_ERRORS) as error:
                _check_reachable(self.servers)  # fail at once when no broker is reachable, or when the brokers reject the login
                if isinstance(error, _CONNECTION_ERRORS) and not is_login_checked:
                    _require_current_login(self.client_options)
                    is_login_checked = True
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_INTERVAL_S)

    def add_prefix(self, topic: str) -> str:
        return self.prefix + topic

    def to_kafka_partition(self, topic_partition: TopicPartition) -> KafkaTopicPartition:
        return KafkaTopicPartition(self.add_prefix(topic_partition.topic), topic_partition.partition)

    def from_kafka_partition(self, kafka_partition: KafkaTopicPartition) -> TopicPartition:
        return TopicPartition(kafka_partition.topic.removeprefix(self.prefix), kafka_partition.partition)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        with _translate_errors(self.client_options):
            existing = set(self.call_with_retry(self.admin.list_topics))
            missing = {
                self.add_prefix(spec.name): _make_topic_options(spec)
                for spec in specs
                if self.add_prefix(spec.name) not in existing
            }
            if not missing:
                return []
            results = self.call_with_retry(lambda: self.admin.create_topics(missing, raise_errors=False))["topics"]
            for result in results:
                error = errors.for_code(result["error_code"])
                # Another process may have created a topic at the same time.
                if error not in (errors.NoError, errors.TopicAlreadyExistsError):
                    raise error(f"{result['name']}: {result['error_message']}")
            self.call_with_retry(lambda: self.admin.wait_for_topics(list(missing)))
        return [result["name"].removeprefix(self.prefix) for result in results if not result["error_code"]]

    def fetch_topic_metadata(self, topics: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the metadata of each existing topic. The keys are topic names without the prefix."""
        names = [self.add_prefix(topic) for topic in topics]
        with _translate_errors(self.client_options):
            descriptions = self.call_with_retry(lambda: self.admin.describe_topics(names))
        return {topic["name"].removeprefix(self.prefix): topic for topic in descriptions if not topic["error_code"]}

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        return {name: str(topic["topic_id"]) for name, topic in self.fetch_topic_metadata(topics).items()}

    def count_partitions(self, topic: str) -> int:
        return len(self.list_partitions([topic]))

    def list_partitions(self, topics: Iterable[str]) -> list[KafkaTopicPartition]:
        """Return the current partitions of these topics. Always ask the cluster, because partitions may have been added."""
        names = list(topics)
        metadata = self.fetch_topic_metadata(names)
        for topic in names:
            if topic not in metadata:
                raise UsageError(
                    f"there is no topic {self.add_prefix(topic)} at {','.join(self.servers)}",
                    "the topic has not been created yet",
                    "type: charter topics create",
                )
        self.known_topics |= set(names)
        return [
            KafkaTopicPartition(self.add_prefix(topic), number)
            for topic in names
            for number in range(len(metadata[topic]["partitions"]))
        ]

    def check_topics(self, records: Iterable[ProducerRecord]) -> None:
        """Raise UsageError if a topic does not exist. Without this check the client waits for the topic for a minute."""
        if unknown := {record.topic for record in records} - self.known_topics:
            self.list_partitions(unknown)

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets:
        return self.list_offsets(topics, OffsetSpec.EARLIEST)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        """Return the ends of the partitions, including uncommitted records.

        The markers of a transaction are written shortly after the commit returns. Until then, its records do not count as
        committed. If these offsets excluded such records, a process could miss records that it has just written.
        """
        return self.list_offsets(topics, OffsetSpec.LATEST)

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        return self.end_offsets(topics) | {
            tp: offset for tp, offset in self.list_offsets(topics, timestamp_ms).items() if offset >= 0
        }

    def list_offsets(self, topics: Sequence[str], offset_spec: Any) -> Offsets:
        specs = dict.fromkeys(self.list_partitions(topics), offset_spec)
        with _translate_errors(self.client_options):
            offsets = self.call_with_retry(lambda: self.admin.list_partition_offsets(specs, timeout_ms=_REQUEST_TIMEOUT_MS))
        return {self.from_kafka_partition(tp): entry.offset for tp, entry in offsets.items()}

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        metadata = self.fetch_topic_metadata(topics)
        resources = [ConfigResource(ConfigResourceType.TOPIC, self.add_prefix(topic)) for topic in metadata]
        with _translate_errors(self.client_options):
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
            for name, topic in metadata.items()
        ]

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        return omit_old_topics(self.list_committed(group, topics), self.topic_ids(topics))

    def list_committed(self, group: str, topics: Sequence[str]) -> dict[TopicPartition, CommittedOffset]:
        name, partitions = self.prefix + group, self.list_partitions(topics)
        with _translate_errors(self.client_options):
            offsets = self.call_with_retry(lambda: self.admin.list_group_offsets({name: partitions})).get(name, {})
        return {self.from_kafka_partition(tp): _parse_committed(entry) for tp, entry in offsets.items() if entry.offset >= 0}

    def list_members(self, group_prefixes: Sequence[str]) -> dict[str, list[str]]:
        prefixes = tuple(self.prefix + prefix for prefix in group_prefixes)
        with _translate_errors(self.client_options):
            groups = [group["group_id"] for group in self.call_with_retry(self.admin.list_groups)]
            names = [name for name in groups if name.startswith(prefixes)]
            # A group can disappear between the two calls, so each group is described separately.
            described = [self.describe_group(name) for name in names]
        members = {
            name.removeprefix(self.prefix): sorted(member["client_id"].removeprefix(_CLIENT_ID_PREFIX) for member in found)
            for name, found in zip(names, described, strict=True)
        }
        return {name: found for name, found in members.items() if found}

    def describe_group(self, name: str) -> list[Mapping[str, Any]]:
        """Return the members of a group. `name` includes the prefix."""
        try:
            groups = self.call_with_retry(lambda: self.admin.describe_groups([name]))
        except errors.GroupIdNotFoundError:
            return []
        members: list[Mapping[str, Any]] = groups[name]["members"]
        return members

    def set_committed(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        topic_ids = self.topic_ids(sorted({tp.topic for tp in offsets}))
        stamped = {
            self.to_kafka_partition(tp): _make_stamped_offset(offset, topic_ids[tp.topic]) for tp, offset in offsets.items()
        }
        self.change_group(group, lambda: self.admin.alter_group_offsets(self.prefix + group, stamped))

    def delete_committed(self, group: str, topics: Sequence[str]) -> None:
        partitions = [self.to_kafka_partition(tp) for tp in self.list_committed(group, topics)]
        if partitions:
            self.change_group(group, lambda: self.admin.delete_group_offsets(self.prefix + group, partitions))

    def change_group(self, group: str, call: Callable[[], _PartitionResults]) -> None:
        """Change the offsets of a group that has no members."""
        with _translate_errors(self.client_options):
            try:
                self.call_with_retry(lambda: _raise_partition_errors(call()))
            except (*_MEMBERSHIP_ERRORS, errors.NonEmptyGroupError, errors.GroupSubscribedToTopicError) as error:
                raise make_group_active_error(group, f"Kafka answers {type(error).__name__}: the group has members") from error

    # Writing and reading

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        self.check_topics(records)
        with self.lock, _translate_errors(self.client_options):
            if self.producer is None:
                self.producer = open_client_producer(self.client_options)
            try:
                futures = _send_records(self.producer, self.prefix, records)
                require_delivered(self.producer, futures)
            except errors.KafkaError:
                # The producer may be unusable, and may still contain records that the caller will publish again.
                _close_producer(self.producer, 0)
                self.producer = None
                raise

    def erase_values(self, topics: Sequence[str], identifiers: Collection[bytes]) -> int:
        return 0  # Kafka cannot delete single records of these topics

    def open_writer(self, transactional_id: str, *, topics: Sequence[str] = (), group: str = "") -> KafkaWriter:
        return KafkaWriter(self, self.prefix + transactional_id, topics, self.prefix + group if group else "")

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str, hold_new: bool = False) -> KafkaConsumer:
        self.list_partitions(topics)  # raise the error for an unknown topic now, not at the first poll
        return KafkaConsumer(self, self.prefix + group, topics, member, hold_new)

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> KafkaReader:
        return KafkaReader(self, positions)

    def close(self) -> None:
        if self.producer is not None:
            _close_producer(self.producer)
        if self.token_provider:
            self.token_provider.close()
        self.admin.close()


_PartitionResults = Mapping[KafkaTopicPartition, type[errors.KafkaError]]


def _make_stamped_offset(offset: int, topic_id: str) -> OffsetAndMetadata:
    return OffsetAndMetadata(offset, f"{_STAMP_PREFIX}{topic_id}:{offset}", -1)


def _parse_committed(entry: OffsetAndMetadata) -> CommittedOffset:
    """Return the offset and the topic id of its stamp, or "" if the stamp is missing or was made for another offset."""
    prefix, _, stamp = (entry.metadata or "").partition(_STAMP_PREFIX)
    topic_id, _, offset = stamp.partition(":")
    return CommittedOffset(entry.offset, topic_id if not prefix and offset == str(entry.offset) else "")


def _raise_partition_errors(results: _PartitionResults) -> _PartitionResults:
    """Return the results of a request that has one result for each partition. Raise the first error among them."""
    for tp, error in results.items():
        if error is not errors.NoError:
            raise error(f"{tp.topic}[{tp.partition}]")
    return results


def make_consumer_options() -> dict[str, Any]:
    """Return the options of every consumer.

    A consumer reads only committed records. It does not commit or reset offsets automatically.
    """
    return {
        "metrics_enabled": False,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": _MAX_REQUEST_BYTES,
    }


def make_producer_options() -> dict[str, Any]:
    """Return the options of every producer.

    Every caller flushes right after it sends, so a long `linger_ms` does not cause a delay. With a short `linger_ms` the client
    would send each record in a separate request.
    """
    return {
        "acks": "all",
        "allow_auto_create_topics": False,
        "batch_size": _BATCH_BYTES,
        "compression_type": "lz4",
        "linger_ms": _LINGER_MS,
        "max_request_size": _MAX_REQUEST_BYTES,
        "metrics_enabled": False,  # the metrics are not used, and they would take a tenth of the client's time
    }


def open_client_consumer(client_options: Mapping[str, Any], **options: Any) -> kafka.KafkaConsumer:
    """Open a consumer of the client with the options of `make_consumer_options`."""
    consumer = kafka.KafkaConsumer(**client_options, **make_consumer_options(), **options)
    consumer._cluster.config["allow_auto_create_topics"] = False  # see `open_client_producer`
    return consumer


def open_client_producer(client_options: Mapping[str, Any], **options: Any) -> kafka.KafkaProducer:
    """Open a producer of the client with the options of `make_producer_options`.

    kafka-python 3.0 accepts the option `allow_auto_create_topics`, but its requests for metadata ignore it. So a client that still
    uses a topic that an operator deletes would create it again, with one partition and the default retention of the broker.
    """
    producer = kafka.KafkaProducer(**client_options, **make_producer_options(), **options)
    producer._metadata.config["allow_auto_create_topics"] = False
    return producer


def _make_topic_options(spec: TopicSpec) -> dict[str, Any]:
    """Return the options of a new topic.

    The broker sets the times of records. With the times of the writers, it rejects the records of a writer whose clock is an hour
    ahead, and deletes the records of a writer whose clock is behind before they are read.
    """
    configs = {
        "cleanup.policy": "compact" if spec.is_compacted else "delete",
        "retention.ms": str(spec.retention_ms),
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(spec.max_message_bytes + DEAD_LETTER_OVERHEAD_BYTES),
    }
    return {"num_partitions": spec.num_partitions, "replication_factor": spec.replication_factor, "configs": configs}


def _send_records(producer: kafka.KafkaProducer, prefix: str, records: Sequence[ProducerRecord]) -> list[Any]:
    """Give records to the client, start to send them, and return their futures. `require_delivered` must follow.

    `send` looks up the partition in the metadata, adds it to the transaction and wakes up the client's thread, once more for each
    record. That takes half of its time. So it gets only the first record of each partition. The others go to the same buffer of the
    client directly. If the client fails between two records, the later ones have futures that fail.
    """
    futures, remaining = [], list[tuple[KafkaTopicPartition, ProducerRecord]]()
    partitions = dict[tuple[str, int], KafkaTopicPartition]()
    for record in records:
        partition = None if record.partition is None else partitions.get((record.topic, record.partition))
        if partition:
            remaining.append((partition, record))
            continue
        topic, headers = prefix + record.topic, list(record.headers)
        futures.append(producer.send(topic, key=record.key, value=record.value, headers=headers, partition=record.partition))
        if record.partition is not None:  # otherwise the client chooses a partition for each record
            partitions[record.topic, record.partition] = KafkaTopicPartition(topic, record.partition)
    append = producer._accumulator.append
    futures += [append(tp, None, record.key, record.value, list(record.headers))[0] for tp, record in remaining]
    producer._accumulator.begin_flush()
    producer._sender.wakeup()
    return futures


def require_delivered(producer: kafka.KafkaProducer, futures: Sequence[Any]) -> None:
    """Wait for the sends of `_send_records`, and raise an error if one failed.

    A commit can succeed although a send failed (see the module docstring).
    """
    producer._accumulator.await_flush_completion(timeout=_FLUSH_TIMEOUT_S)
    for future in futures:
        future.get(timeout=0)


def _close_producer(producer: kafka.KafkaProducer, timeout_s: float = _CLOSE_TIMEOUT_MS / 1000) -> None:
    """Close a producer and ignore errors. Unsent records are dropped. A new producer then resolves the open transaction."""
    try:
        producer.close(timeout=timeout_s)
    except errors.KafkaError as error:
        logger.info("a producer is closed by force: %s", error)
        producer._sender.force_close()  # `close` raised an error before this step, so do the step here


class KafkaWriter:
    """Writes transactions under one transactional id. A new writer resolves the open transaction and fences older writers."""

    def __init__(self, bus: KafkaBus, transactional_id: str, topics: Sequence[str], group: str) -> None:
        self.bus, self.transactional_id, self.topics, self.group = bus, transactional_id, topics, group
        self.is_usable = True
        self.producer = self.open_producer()

    def open_producer(self) -> kafka.KafkaProducer:
        with _translate_errors(self.bus.client_options):
            bus, transactional_id = self.bus, self.transactional_id
            was_committed = bus.call_with_retry(lambda: is_last_transaction_committed(bus.admin, transactional_id))
            producer = open_client_producer(
                self.bus.client_options,
                transactional_id=self.transactional_id,
                transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
            )
            try:
                producer.init_transactions()
                if was_committed:
                    self.commit_hanging_partitions(producer, self.find_hanging_partitions(producer))
            except BaseException:
                _close_producer(producer)
                raise
        self.connection_watch = ConnectionWatch(producer)
        return producer

    def find_hanging_partitions(self, producer: kafka.KafkaProducer) -> list[KafkaTopicPartition]:
        partitions = self.bus.list_partitions(self.bus.fetch_topic_metadata(self.topics))
        producer_id = producer._transaction_manager.producer_id_and_epoch.producer_id
        return self.bus.call_with_retry(lambda: find_hanging_partitions(self.bus.admin, partitions, producer_id))

    def commit_hanging_partitions(self, producer: kafka.KafkaProducer, partitions: Sequence[KafkaTopicPartition]) -> None:
        """End the last transaction of the producer again: in these partitions, and for the offsets of the group."""
        if partitions:
            names = ", ".join(f"{tp.topic}[{tp.partition}]" for tp in partitions)
            logger.warning(
                "%s commits again, because the broker has lost the end of a transaction: %s", self.transactional_id, names
            )
        if partitions or self.group:
            commit_empty_transaction(producer, partitions, self.group)

    def end_hanging_transaction(self) -> None:
        if not self.is_usable or not self.connection_watch.has_lost_connection():
            return
        with _translate_errors(self.bus.client_options):
            partitions = self.find_hanging_partitions(self.producer)
        started = time.monotonic()
        try:
            self.commit_hanging_partitions(self.producer, partitions)
        except (errors.KafkaError, RuntimeError) as error:
            self.is_usable = False
            raise self.classify_failure(error, time.monotonic() - started) from error
        self.connection_watch.restart()

    def commit(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        if not self.is_usable:
            raise CommitUncertain(
                "the outcome of the last commit of this writer is unknown", "only a new writer can resolve the transaction"
            )
        self.bus.check_topics(outputs)
        self.end_hanging_transaction()
        membership, kafka_offsets = None, {}
        if offsets:
            assert isinstance(consumer, KafkaConsumer), "offsets need the consumer of their group"
            membership = consumer.require_ownership(offsets, epochs or {})
            kafka_offsets = {
                self.bus.to_kafka_partition(tp): _make_stamped_offset(offset, consumer.topic_ids[tp.topic])
                for tp, offset in offsets.items()
            }
        started = time.monotonic()
        try:
            self.write_transaction(outputs, kafka_offsets, membership, before_commit)
        except _MEMBERSHIP_ERRORS as error:
            self.replace_producer()
            raise PartitionLost("the group has rebalanced without this member", type(error).__name__) from error
        except _REJECTION_ERRORS as error:
            self.replace_producer()
            raise _make_rejected_error(error) from error
        except (errors.KafkaError, RuntimeError) as error:  # the client's I/O thread reports some errors as RuntimeError
            self.is_usable = False
            raise self.classify_failure(error, time.monotonic() - started) from error

    def write_transaction(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[KafkaTopicPartition, OffsetAndMetadata],
        membership: ConsumerGroupMetadata | None,
        before_commit: Callable[[], None] | None,
    ) -> None:
        """Write a transaction. The check runs while the log receives the outputs.

        The offsets follow only after all outputs are delivered, because the client waits for them without a time limit, and does not
        expire the outputs during this wait.
        """
        self.producer.begin_transaction()
        futures = _send_records(self.producer, self.bus.prefix, outputs)
        if before_commit:
            try:
                before_commit()
            except BaseException:
                self.replace_producer()
                raise
        require_delivered(self.producer, futures)
        if offsets:
            self.producer.send_offsets_to_transaction(offsets, membership)
        self.producer.commit_transaction()

    def classify_failure(self, error: Exception, elapsed_s: float) -> WriterFenced | CommitUncertain:
        """Return the error for a failed commit.

        A broker also fences a producer if its transaction timed out. In that case no other writer exists, and the outcome of
        the transaction is unknown.
        """
        if errors.ProducerFencedError.__name__ in f"{error!r}" and elapsed_s * 1000 < _TRANSACTION_TIMEOUT_MS:
            return WriterFenced(
                f"another process has opened a writer with the transactional id {self.transactional_id}",
                "two processes have the same instance name",
                "stop one of the processes, or give each process a different name: --instance NAME",
            )
        return CommitUncertain("the outcome of a transaction is unknown", f"{type(error).__name__}: {error}")

    def replace_producer(self) -> None:
        """Replace the producer after a rejected transaction.

        The new producer aborts the old transaction. The new producer does not contain the offsets that the old producer would
        send again.
        """
        _close_producer(self.producer, 0)
        try:
            self.producer = self.open_producer()
        except BusUnreachable as error:
            self.is_usable = False
            raise CommitUncertain("a transaction could not be aborted", error.why) from error

    def close(self) -> None:
        _close_producer(self.producer, _CLOSE_TIMEOUT_MS / 1000 if self.is_usable else 0)


def _to_consumer_records(bus: KafkaBus, polled: Mapping[KafkaTopicPartition, Sequence[Any]]) -> list[ConsumerRecord]:
    consumer_records = []
    for tp, records in polled.items():
        topic, partition = bus.from_kafka_partition(tp)
        consumer_records += [
            ConsumerRecord(topic, partition, r.offset, r.key, r.value, tuple(r.headers or ()), r.timestamp) for r in records
        ]
    return consumer_records


class KafkaReader:
    """Reads given partitions from given offsets, without a consumer group."""

    def __init__(self, bus: KafkaBus, positions: Mapping[TopicPartition, int]) -> None:
        self.bus = bus
        self.partitions: list[TopicPartition] = []
        with _translate_errors(bus.client_options):
            self.client = open_client_consumer(bus.client_options)
        self.add_partitions(positions)

    def add_partitions(self, positions: Mapping[TopicPartition, int]) -> None:
        all_positions = {**self.positions(), **positions}
        self.partitions = list(all_positions)
        self.client.assign([self.bus.to_kafka_partition(tp) for tp in self.partitions])
        for tp, offset in all_positions.items():
            self.client.seek(self.bus.to_kafka_partition(tp), offset)

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        with _translate_offset_errors(self.bus, "to continue at the beginning of the log, start the command again"):
            return _to_consumer_records(self.bus, self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records))

    def positions(self) -> Offsets:
        with _translate_errors(self.bus.client_options):
            return {
                tp: self.client.position(self.bus.to_kafka_partition(tp), timeout_ms=_REQUEST_TIMEOUT_MS)
                for tp in self.partitions
            }

    def close(self) -> None:
        self.client.close(timeout_ms=_CLOSE_TIMEOUT_MS)


@contextmanager
def _translate_offset_errors(bus: KafkaBus, remedy: str) -> Iterator[None]:
    with _translate_errors(bus.client_options):
        try:
            yield
        except errors.OffsetOutOfRangeError as error:
            why = "retention or an operator deleted the records before they were read, or the log is shorter than before"
            raise _make_offsets_lost_error(bus, error.args[0], why, remedy) from error
        except errors.LogTruncationError as error:
            why = "a broker without these records has become the leader (unclean leader election)"
            raise _make_offsets_lost_error(bus, error.divergent_offsets, why, remedy) from error


def _make_offsets_lost_error(
    bus: KafkaBus, offsets: Mapping[KafkaTopicPartition, object], why: str, remedy: str
) -> OffsetsLost:
    names = ", ".join(f"{bus.from_kafka_partition(tp).topic}[{tp.partition}]@{offset}" for tp, offset in offsets.items())
    return OffsetsLost(
        f"the log no longer has the next records: {names}",
        why,
        f"raise bus.retention_ms; {remedy}",
    )


class _AssignmentEpochs(kafka.ConsumerRebalanceListener):
    """Records the assigned partitions and their epochs. The epoch is the number of the assignment that added the partition."""

    def __init__(self, bus: KafkaBus) -> None:
        self.bus, self.latest_epoch = bus, 0
        self.by_partition: Offsets = {}

    def on_partitions_assigned(self, assigned: Iterable[KafkaTopicPartition]) -> None:
        self.latest_epoch += 1
        new = {self.bus.from_kafka_partition(tp): self.latest_epoch for tp in assigned}
        self.by_partition = {**new, **{tp: epoch for tp, epoch in self.by_partition.items() if tp not in new}}

    def on_partitions_revoked(self, revoked: Iterable[KafkaTopicPartition]) -> None:
        removed = {self.bus.from_kafka_partition(tp) for tp in revoked}
        self.by_partition = {tp: epoch for tp, epoch in self.by_partition.items() if tp not in removed}

    def on_partitions_lost(self, lost: Iterable[KafkaTopicPartition]) -> None:
        self.on_partitions_revoked(lost)

    def renew_all(self) -> None:
        """Give every assigned partition a new epoch."""
        self.latest_epoch += 1
        self.by_partition = dict.fromkeys(self.by_partition, self.latest_epoch)


class KafkaConsumer:
    """A member of a consumer group with cooperative rebalancing."""

    def __init__(self, bus: KafkaBus, group: str, topics: Sequence[str], member: str, hold_new: bool = False) -> None:
        self.bus, self.hold_new = bus, hold_new
        self.group = group.removeprefix(bus.prefix)
        run_id, _, stage = self.group.rpartition(".")
        self.lost_offsets_remedy = (
            f"to continue without these records, type: charter offsets set --run {run_id} --stage {stage} --to earliest"
        )
        self.topic_ids: Mapping[str, str] = bus.topic_ids(topics)
        self.started_epochs: Offsets = {}  # the epoch in which each partition was started
        self.epochs = _AssignmentEpochs(bus)
        self.membership: ConsumerGroupMetadata | None = None
        with _translate_errors(bus.client_options):
            self.client = open_client_consumer(
                bus.client_options,
                group_id=group,
                client_id=f"{_CLIENT_ID_PREFIX}{member}",
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

        The leader of the group assigns only the partitions in its metadata. If the metadata of a new topic were missing, the
        leader would not assign its partitions until the metadata expires.
        """
        deadline = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
        while not all(self.client.partitions_for_topic(name) for name in names):
            if time.monotonic() > deadline:
                raise errors.KafkaTimeoutError(f"no metadata for {', '.join(names)}")

    def assignment(self) -> Offsets:
        return dict(self.epochs.by_partition)

    def held(self) -> Offsets:
        if not self.hold_new:
            return {}
        return {tp: epoch for tp, epoch in self.epochs.by_partition.items() if self.started_epochs.get(tp) != epoch}

    def start(self, partition: TopicPartition, offset: int) -> None:
        self.seek(partition, offset)
        self.started_epochs[partition] = self.epochs.by_partition[partition]
        self.resume([partition])

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        with _translate_offset_errors(self.bus, self.lost_offsets_remedy):
            try:
                polled = self.client.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
                polled = polled or self.finish_join(max_records)
            except errors.NoOffsetForPartitionError as error:
                # The group has no committed offsets for these partitions. They start at their beginning, unless they are held.
                self.seek_all(self.client.beginning_offsets(list(error.args[0]), timeout_ms=_REQUEST_TIMEOUT_MS))
                polled = {}
            except errors.OffsetOutOfRangeError as error:
                # The committed offset of a held partition is not used before it is checked.
                if not all(self.bus.from_kafka_partition(tp) in self.held() for tp in error.args[0]):
                    raise
                self.seek_all(self.client.beginning_offsets(list(error.args[0]), timeout_ms=_REQUEST_TIMEOUT_MS))
                polled = {}
            if self.detect_rejoin():
                return []
            held = self.held()
            if held:
                self.pause(held)
        # The client may have read records of a new partition before the pause. `start` seeks, so they are read again.
        return _to_consumer_records(
            self.bus, {tp: polled[tp] for tp in polled if self.bus.from_kafka_partition(tp) not in held}
        )

    def finish_join(self, max_records: int) -> Mapping[KafkaTopicPartition, Sequence[Any]]:
        """Continue polling for up to _JOIN_TIMEOUT_S while a join is in progress.

        If a join completes between two polls, the client discards it and starts a new join for all members. With short polls
        and other work between them, the members would rarely complete a join.
        """
        polled: Mapping[KafkaTopicPartition, Sequence[Any]] = {}
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while not polled and self.client.group_metadata().state == MemberState.REBALANCING and time.monotonic() < deadline:
            polled = self.client.poll(timeout_ms=_JOIN_POLL_TIMEOUT_MS, max_records=max_records)
        return polled

    def detect_rejoin(self) -> bool:
        """Record the membership of the current assignment. Return whether this member was removed and has rejoined.

        If the member id has changed, this member was outside the group for some time. During this time, other members
        may have committed offsets that are higher than the positions of this member. During a join the client keeps its
        old positions and does not call the listener. So this method gives all partitions a new epoch and continues at
        their committed offsets. If the consumer holds new partitions, all its partitions are held again.
        """
        current = self.client.group_metadata()
        if current.state != MemberState.STABLE:
            return False
        has_rejoined = self.membership is not None and current.member_id != self.membership.member_id
        if has_rejoined:
            self.epochs.renew_all()
            partitions = [self.bus.to_kafka_partition(tp) for tp in self.epochs.by_partition]
            committed = {self.bus.to_kafka_partition(tp): entry.offset for tp, entry in self.committed().items()}
            self.seek_all(self.client.beginning_offsets(partitions, timeout_ms=_REQUEST_TIMEOUT_MS) | committed)
        self.membership = current
        return has_rejoined

    def seek_all(self, offsets: Mapping[KafkaTopicPartition, int]) -> None:
        for tp, offset in offsets.items():
            self.client.seek(tp, offset)

    def require_ownership(
        self, partitions: Iterable[TopicPartition], epochs: Mapping[TopicPartition, int]
    ) -> ConsumerGroupMetadata:
        """Return the current membership. Raise PartitionLost if this member does not own the partitions in these epochs."""
        assignment = self.assignment()
        for tp in {*partitions, *epochs}:
            if tp not in assignment or epochs.get(tp, assignment[tp]) != assignment[tp]:
                raise PartitionLost(f"{tp.topic}[{tp.partition}] has moved to another member")
        current = self.client.group_metadata()
        if self.membership is None or current[:3] != self.membership[:3]:  # if not checked here, the broker rejects the commit
            raise PartitionLost("the group is rebalancing")
        return self.membership

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.client.pause(*self.filter_owned(partitions))

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        held = self.held()
        self.client.resume(*self.filter_owned(tp for tp in partitions if tp not in held))

    def filter_owned(self, partitions: Iterable[TopicPartition]) -> list[KafkaTopicPartition]:
        return [self.bus.to_kafka_partition(tp) for tp in partitions if tp in self.epochs.by_partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.epochs.by_partition:
            raise PartitionLost(f"{partition.topic}[{partition.partition}] is not assigned to this member")
        self.client.seek(self.bus.to_kafka_partition(partition), offset)

    def positions(self) -> Offsets:
        with _translate_errors(self.bus.client_options):
            return {
                tp: self.client.position(self.bus.to_kafka_partition(tp), timeout_ms=_REQUEST_TIMEOUT_MS)
                for tp in self.epochs.by_partition
            }

    def committed(self) -> dict[TopicPartition, CommittedOffset]:
        entries = {tp: self.fetch_committed(tp) for tp in list(self.epochs.by_partition)}
        return {tp: _parse_committed(entry) for tp, entry in entries.items() if entry is not None}

    def fetch_committed(self, partition: TopicPartition) -> OffsetAndMetadata | None:
        with _translate_errors(self.bus.client_options):
            try:
                return self.client.committed(
                    self.bus.to_kafka_partition(partition), metadata=True, timeout_ms=_REQUEST_TIMEOUT_MS
                )
            except errors.KafkaTimeoutError:
                self.bus.list_committed(self.group, [partition.topic])  # raises the error, if the broker is unreachable
        raise OffsetsUnstable(
            f"the committed offset of {partition.topic}[{partition.partition}] in the group {self.group} is not stable",
            "a transaction with this offset has not ended",
            f"wait until the broker aborts it, {_TRANSACTION_TIMEOUT_MS // 1000} s after it began; if it does not, look for a"
            " transaction that hangs: kafka-transactions.sh find-hanging",
        )

    def close(self) -> None:
        self.client.close(autocommit=False, timeout_ms=_CLOSE_TIMEOUT_MS)
