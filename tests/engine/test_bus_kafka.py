"""Kafka only: open transactions, topics and leaders."""

import uuid

import kafka
import pytest
from kafka import errors

import engine.bus.read
from engine.bus import open_bus
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_values
from engine.errors import BusUnreachable
from schemas.records import Prompt
from schemas.topics import TopicSpec
from tests.support.waiting import HANG_S

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
