"""Kafka only: open transactions and secured listeners."""

import json
import logging
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import kafka
import pytest
from kafka import errors

import engine.bus.read
from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.bus import open_bus
from engine.bus.kafka import capture_connection_errors
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_values
from engine.errors import BusUnreachable, CharterError
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.records import Prompt
from schemas.topics import TOPICS, TopicSpec
from tests.support import fork_server
from tests.support.kafka import SecureBroker, start_shared_broker
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


class SecuredListener(NamedTuple):
    """The address of a `SecureBroker`, its certificate, and the login."""

    address: str
    ca_file: Path
    PASSWORD = SecureBroker.PASSWORD


@pytest.fixture(scope="session")
def secure():
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka to secure: set KAFKA_HOME to a folder with libs/*.jar")
    folder, address = start_shared_broker("secure-kafka", lambda folder: SecureBroker(Path(home), folder))
    return SecuredListener(address, folder / SecureBroker.CA_FILE)


def make_flags(broker, folder, **changes):
    return {
        "bus.address": f"kafka://{broker.address}", "bus.security_protocol": "SASL_SSL", "bus.sasl_username": SecureBroker.USER,
        "bus.ssl_cafile": str(broker.ca_file), "data.folder": str(folder), "models.policy": "scripted",
    } | {key.replace("__", "."): value for key, value in changes.items() if key != "password"}  # fmt: skip


def run_charter(broker, folder, *arguments, password=SecureBroker.PASSWORD, **changes):
    """Run the command line with the secured broker; the password is only in the environment."""
    options = [word for key, value in make_flags(broker, folder, **changes).items() for word in ("--set", f"{key}={value}")]
    return fork_server.run_charter([*arguments, *options], environment=os.environ | {"CHARTER_KAFKA_PASSWORD": password})


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"])
def test_secured_listener_accepts_valid_credentials(secure, tmp_path, mechanism):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'"a question for {mechanism}"\n')
    completed = run_charter(secure, tmp_path / "d", "produce", str(prompts), "-v", bus__sasl_mechanism=mechanism)
    assert completed.returncode == 0 and "1 prompt published" in completed.stdout, completed.stderr
    assert secure.PASSWORD not in completed.stdout + completed.stderr
    completed = run_charter(secure, tmp_path / "d", "topics", "lag", "--json", bus__sasl_mechanism=mechanism)
    assert completed.returncode == 0 and json.loads(completed.stdout)[0]["lag"] > 0


def test_pipeline_on_a_secured_listener_never_stores_the_password(secure, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", SecureBroker.PASSWORD)
    settings, _ = load_settings(make_flags(secure, tmp_path, bus__prefix="s."), environment={})
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=2)
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = open_store(settings)
        finished = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
        wait_until(lambda: store.query(finished).rows == [(2,)], host)
    log_bytes = b"".join(value for topic in TOPICS for value in read_values(bus, topic))
    bus.close()
    file_bytes = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"live" in log_bytes and SecureBroker.PASSWORD.encode() not in log_bytes + file_bytes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"password": "wrong-one"}, ["is unreachable", "uthentication"]),
        ({"bus__ssl_cafile": ""}, ["is unreachable", "certificate"]),
        ({"bus__security_protocol": "PLAINTEXT"}, ["is unreachable", "accepts connections"]),
        ({"bus__sasl_username": ""}, ["no Kafka user name"]),
        ({"password": ""}, ["no password"]),
    ],
)
def test_error_for_rejected_credentials_names_the_reason_and_no_secret(secure, tmp_path, monkeypatch, changes, expected):
    monkeypatch.setattr("engine.bus.kafka.BOOTSTRAP_TIMEOUT_MS", 4000)
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", changes.get("password", secure.PASSWORD))
    settings, _ = load_settings(make_flags(secure, tmp_path, **changes), environment={})
    with pytest.raises(CharterError) as caught:
        connect_bus(settings)
    assert caught.value.exit_code in (2, 3) and all(word in str(caught.value) for word in expected), str(caught.value)
    assert "wrong-one" not in str(caught.value) and secure.PASSWORD not in str(caught.value)


@pytest.mark.parametrize(("protocol", "has_hint"), [("SASL_SSL", True), ("PLAINTEXT", False)])
def test_closed_connection_hints_at_failed_authentication(protocol, has_hint):
    with pytest.raises(ConnectionError, match="socket disconnected") as caught, capture_connection_errors(protocol):
        logging.getLogger("kafka.net.manager").error(
            "Connection failed: %s", errors.KafkaConnectionError("socket disconnected")
        )
        raise errors.KafkaTimeoutError("Unable to bootstrap")
    assert ("failed authentication" in str(caught.value)) is has_hint
