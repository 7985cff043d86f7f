"""What is Kafka's alone: transactions that hang, and secured listeners."""

import json
import logging
import os
import subprocess
import sys
import uuid
from pathlib import Path

import kafka
import pytest
from kafka import errors

import engine.bus.read
from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.bus import open_bus
from engine.bus.kafka import capture_connection_errors
from engine.bus.port import ProducerRecord
from engine.bus.read import read_values
from engine.errors import BusUnreachable, CharterError
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.records import Prompt
from schemas.topics import TOPICS, TopicSpec
from tests.support.kafka import SecureBroker

pytestmark = pytest.mark.kafka


@pytest.fixture
def bus(kafka_address):
    opened = open_bus(kafka_address, prefix=f"k{uuid.uuid4().hex[:8]}.")
    opened.create_topics([TopicSpec("in", Prompt, num_partitions=1)])
    yield opened
    opened.close()


def test_a_transaction_that_stands_open_is_said_and_not_waited_for_endlessly(bus, monkeypatch):
    monkeypatch.setattr(engine.bus.read, "STALL_TIMEOUT_S", 3.0)
    bus.publish([ProducerRecord("in", b"k", b"1")])
    stranger = kafka.KafkaProducer(bootstrap_servers=bus.servers, transactional_id=bus.prefix, transaction_timeout_ms=600_000)
    stranger.init_transactions()
    stranger.begin_transaction()
    stranger.send(bus.add_prefix("in"), value=b"2").get(timeout=10)
    with pytest.raises(BusUnreachable, match=r"in\[0\] cannot be read beyond 1, and goes on to 2"):
        read_values(bus, "in")
    stranger.abort_transaction()
    stranger.close(timeout=5)
    assert read_values(bus, "in") == [b"1"]


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka to secure: set KAFKA_HOME to a folder with libs/*.jar")
    with SecureBroker(Path(home), tmp_path_factory.mktemp("secure")) as broker:
        yield broker


def flags(broker, folder, **changes):
    return {
        "bus.address": f"kafka://{broker.address}", "bus.security_protocol": "SASL_SSL", "bus.sasl_username": broker.USER,
        "bus.ssl_cafile": str(broker.ca_file), "data.folder": str(folder), "models.policy": "scripted",
    } | {key.replace("__", "."): value for key, value in changes.items() if key != "password"}  # fmt: skip


def charter(broker, folder, *arguments, password=SecureBroker.PASSWORD, **changes):
    """The command line against the secured broker; the password is in the environment alone."""
    words = [word for key, value in flags(broker, folder, **changes).items() for word in ("--set", f"{key}={value}")]
    environment = os.environ | {"CHARTER_KAFKA_PASSWORD": password}
    command = [sys.executable, "-m", "charter", *arguments, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"])
def test_a_secured_listener_lets_in_who_may(secure, tmp_path, mechanism):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'"a question for {mechanism}"\n')
    done = charter(secure, tmp_path / "d", "produce", str(prompts), "-v", bus__sasl_mechanism=mechanism)
    assert done.returncode == 0 and "1 prompts published" in done.stdout, done.stderr
    assert secure.PASSWORD not in done.stdout + done.stderr
    done = charter(secure, tmp_path / "d", "topics", "lag", "--json", bus__sasl_mechanism=mechanism)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["behind"] > 0


def test_a_whole_stream_on_a_secured_listener_keeps_the_password_to_itself(secure, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", SecureBroker.PASSWORD)
    settings, _ = load_settings(flags(secure, tmp_path, bus__prefix="s."), environment={})
    opened = connect_bus(settings)
    FileProducer(opened, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=2)
    with make_host(settings, opened, STAGES, sink=True) as host:
        store = open_store(settings)
        while store.query("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL").rows != [
            (2,)
        ]:
            host.failure_event.wait(0.05)
            host.raise_if_failed()
    kept = b"".join(value for topic in TOPICS for value in read_values(opened, topic))
    opened.close()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"live" in kept and SecureBroker.PASSWORD.encode() not in kept + files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": "wrong-one"}, ["does not answer", "uthentication"]),
        ({"bus__ssl_cafile": ""}, ["does not answer", "certificate"]),
        ({"bus__security_protocol": "PLAINTEXT"}, ["does not answer", "accepts connections"]),
        ({"bus__sasl_username": ""}, ["wants a user"]),
        ({"password": ""}, ["no password"]),
    ],
)
def test_who_may_not_is_told_why_and_no_secret(secure, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr("engine.bus.kafka.BOOTSTRAP_TIMEOUT_MS", 4000)
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", changes.get("password", secure.PASSWORD))
    settings, _ = load_settings(flags(secure, tmp_path, **changes), environment={})
    with pytest.raises(CharterError) as refused:
        connect_bus(settings)
    assert refused.value.exit_code in (2, 3) and all(word in str(refused.value) for word in words), str(refused.value)
    assert "wrong-one" not in str(refused.value) and secure.PASSWORD not in str(refused.value)


@pytest.mark.parametrize(("protocol", "hints"), [("SASL_SSL", True), ("PLAINTEXT", False)])
def test_a_broker_that_hangs_up_may_have_refused_the_user(protocol, hints):
    with pytest.raises(ConnectionError, match="socket disconnected") as hung_up, capture_connection_errors(protocol):
        logging.getLogger("kafka.net.manager").error(
            "Connection failed: %s", errors.KafkaConnectionError("socket disconnected")
        )
        raise errors.KafkaTimeoutError("Unable to bootstrap")
    assert ("failed authentication" in str(hung_up.value)) is hints
