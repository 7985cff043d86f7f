"""What is Kafka's alone: transactions that hang, and secured listeners."""

import uuid

import kafka
import pytest

import engine.bus.read
from engine.bus import open_bus
from engine.bus.port import Outgoing
from engine.bus.read import read_values
from engine.errors import BusUnreachable
from schemas.records import Prompt
from schemas.topics import TopicSpec

pytestmark = pytest.mark.kafka


@pytest.fixture
def bus(kafka_address):
    opened = open_bus(kafka_address, prefix=f"k{uuid.uuid4().hex[:8]}.")
    opened.create_topics([TopicSpec("in", Prompt, partitions=1)])
    yield opened
    opened.close()


def test_a_transaction_that_stands_open_is_said_and_not_waited_for_endlessly(bus, monkeypatch):
    monkeypatch.setattr(engine.bus.read, "STUCK_S", 3.0)
    bus.publish([Outgoing("in", b"k", b"1")])
    stranger = kafka.KafkaProducer(bootstrap_servers=bus.servers, transactional_id=bus.prefix, transaction_timeout_ms=600_000)
    stranger.init_transactions()
    stranger.begin_transaction()
    stranger.send(bus.name("in"), value=b"2").get(timeout=10)
    with pytest.raises(BusUnreachable, match=r"in\[0\] cannot be read beyond 1, and goes on to 2"):
        read_values(bus, "in")
    stranger.abort_transaction()
    stranger.close(timeout=5)
    assert read_values(bus, "in") == [b"1"]
