"""Kafka only: open transactions, topics and leaders."""

import socket
import uuid

import kafka
import pytest
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.producer import transaction_manager
from kafka.producer.transaction_manager import TxnOffsetCommitHandler
from kafka.structs import TopicPartition as KafkaTopicPartition

import engine.bus.kafka
import engine.bus.read
from engine.bus import open_bus
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_values
from engine.errors import BusUnreachable, OffsetsUnstable
from schemas.records import Prompt
from schemas.topics import TopicSpec
from tests.support.waiting import HANG_S, wait_until

pytestmark = pytest.mark.kafka


@pytest.fixture
def bus(kafka_address):
    bus = open_bus(kafka_address, prefix=f"k{uuid.uuid4().hex[:8]}.")
    bus.create_topics([TopicSpec("in", Prompt, num_partitions=1)])
    yield bus
    bus.close()


def test_open_transaction_of_another_producer_raises_bus_unreachable(bus, monkeypatch):
    monkeypatch.setattr(engine.bus.read, "STALL_TIMEOUT_S", 3.0)
    bus.publish([ProducerRecord("in", b"k", b"1")])
    other_producer = kafka.KafkaProducer(
        bootstrap_servers=bus.servers, transactional_id=bus.prefix, transaction_timeout_ms=600_000
    )
    other_producer.init_transactions()
    other_producer.begin_transaction()
    other_producer.send(bus.add_prefix("in"), value=b"2").get(timeout=HANG_S)
    with pytest.raises(BusUnreachable, match=r"in\[0\] cannot be read beyond offset 1; the end offset is 2"):
        read_values(bus, "in")
    other_producer.abort_transaction()
    other_producer.close(timeout=HANG_S)
    assert read_values(bus, "in") == [b"1"]


def test_no_client_creates_a_topic(bus):
    """A broker with default settings creates a topic if a client asks for its metadata and allows it."""
    bus.publish([])
    writer, reader = bus.open_writer("w"), bus.open_reader({TopicPartition("in", 0): 0})
    consumer = bus.open_consumer("r.s", ["in"], member="a")
    for metadata in (bus.producer._metadata, writer.producer._metadata, reader.client._cluster, consumer.client._cluster):
        assert metadata.metadata_request().allow_auto_topic_creation is False
    for opened in (writer, reader, consumer):
        opened.close()


def test_calls_are_repeated_until_a_new_partition_has_a_leader(bus, monkeypatch):
    failures, list_offsets = (
        [errors.UnknownBrokerIdError(-1), errors.LeaderNotAvailableError()],
        bus.admin.list_partition_offsets,
    )

    def list_after_failures(*arguments, **options):
        if failures:
            raise failures.pop()
        return list_offsets(*arguments, **options)

    monkeypatch.setattr(bus.admin, "list_partition_offsets", list_after_failures)
    assert bus.end_offsets(["in"]) == {TopicPartition("in", 0): 0} and not failures


@pytest.fixture
def unverified_transactions(bus):
    """Let the broker accept records and offsets that were not added to their transaction."""
    setting, brokers = "transaction.partition.verification.enable", bus.admin.describe_cluster()["brokers"]
    names = [str(broker["broker_id"]) for broker in brokers]
    bus.admin.alter_configs([ConfigResource(ConfigResourceType.BROKER, name, {setting: "false"}) for name in names])
    yield
    bus.admin.reset_configs([ConfigResource(ConfigResourceType.BROKER, name, [setting]) for name in names])


def commit_without_markers(writer, monkeypatch, outputs, offsets=None, **options):
    """Commit outputs to partition 0 with a marker. Commit outputs to partition 1, and the offsets, without a marker.

    The broker leaves the transaction in the same state if it is killed before it writes these markers, and then skips them.
    """
    producer, manager = writer.producer, writer.producer._transaction_manager
    begin_transaction, unmarked = producer.begin_transaction, KafkaTopicPartition(writer.bus.add_prefix("out"), 1)

    def begin_without_marker():
        begin_transaction()
        manager._partitions_in_transaction.add(unmarked)

    def send_offsets(manager, membership, offsets):
        manager._pending_txn_offset_commits.update(offsets)
        return TxnOffsetCommitHandler(
            manager, membership, manager._pending_txn_offset_commits, transaction_manager.TransactionalRequestResult()
        )

    with monkeypatch.context() as patch:
        patch.setattr(producer, "begin_transaction", begin_without_marker)
        patch.setattr(transaction_manager, "AddOffsetsToTxnHandler", send_offsets)
        writer.commit(outputs, offsets, **options)


@pytest.fixture
def hanging(bus, unverified_transactions, monkeypatch):
    """A writer, and a consumer with a committed offset. The broker has left their last transaction open in out[1] and for the offset."""
    bus.create_topics([TopicSpec("out", Prompt, num_partitions=2)])
    bus.publish([ProducerRecord("in", b"k", b"1")])
    consumer = bus.open_consumer("r.s", ["in"], member="a")
    wait_until(lambda: consumer.poll(0.1, 10))
    writer = bus.open_writer("r.s.a", topics=["out"], group="r.s")
    outputs = [ProducerRecord("out", b"k", b"%d" % number, partition=number) for number in range(2)]
    commit_without_markers(
        writer, monkeypatch, outputs, {TopicPartition("in", 0): 1}, consumer=consumer, epochs=consumer.assignment()
    )
    monkeypatch.setattr(engine.bus.read, "STALL_TIMEOUT_S", 2.0)
    with pytest.raises(BusUnreachable, match=r"out\[1\] cannot be read beyond offset 0; the end offset is 1"):
        read_values(bus, "out")
    yield writer, consumer
    writer.close()
    consumer.close()


def check_nothing_hangs(bus, consumer):
    assert sorted(read_values(bus, "out")) == [b"0", b"1"]
    assert {tp: committed.offset for tp, committed in consumer.committed().items()} == {TopicPartition("in", 0): 1}


def test_new_writer_ends_the_transaction_that_the_broker_left_open(bus, hanging, caplog):
    _, consumer = hanging
    bus.open_writer("r.s.a", topics=["out"], group="r.s").close()
    check_nothing_hangs(bus, consumer)
    assert [record.getMessage() for record in caplog.records if record.name == "charter.bus"] == [
        f"{bus.prefix}r.s.a commits again, because the broker has lost the end of a transaction: {bus.prefix}out[1]"
    ]


def test_writer_that_lost_a_connection_ends_its_transaction_again(bus, hanging):
    writer, consumer = hanging
    writer.end_hanging_transaction()  # no connection was lost, so it does nothing
    with pytest.raises(BusUnreachable):
        read_values(bus, "out")
    for connection in writer.connection_watch.watched:
        connection.transport._sock.shutdown(socket.SHUT_RDWR)  # as when the broker ends
    wait_until(writer.connection_watch.has_lost_connection)
    writer.end_hanging_transaction()
    check_nothing_hangs(bus, consumer)
    assert not writer.connection_watch.has_lost_connection()


def test_unstable_offset_is_reported_with_its_reason(bus, hanging, monkeypatch):
    _, consumer = hanging
    monkeypatch.setattr(engine.bus.kafka, "_REQUEST_TIMEOUT_MS", 1000)
    with pytest.raises(OffsetsUnstable, match=r"the committed offset of in\[0\] in the group r.s is not stable"):
        consumer.committed()
