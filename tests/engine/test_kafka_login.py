"""Logins to a real Kafka broker: passwords, tokens and client certificates."""

import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from kafka import errors

import engine.bus.tokens
from charter.connect import connect_bus, open_bus_from_settings, open_store
from charter.diagnostics import run_checks
from charter.pipeline import STAGES, make_host
from charter.telemetry import _MetricsCollector, make_pipeline_collector
from engine.bus.kafka import capture_connection_errors
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_values
from engine.bus.token_statistics import TOKEN_STATISTICS
from engine.errors import BusUnreachable, CharterError, LoginRejected, UsageError
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.records import Prompt
from schemas.topics import TOPICS, TopicSpec
from tests.support import fork_server
from tests.support.credentials import ClientCertificates, TokenIssuer
from tests.support.kafka import SecureBroker, start_shared_broker
from tests.support.token_server import FakeTokenServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.kafka


class SecuredBroker(NamedTuple):
    """The folder of a `SecureBroker`, and the address of its listener for passwords."""

    folder: Path
    address: str
    PASSWORD = SecureBroker.PASSWORD

    @property
    def ca_file(self):
        return self.folder / SecureBroker.CA_FILE

    @property
    def issuer(self):
        return TokenIssuer(self.folder)

    def find_address(self, listener):
        return f"kafka://{SecureBroker.find_address(self.folder, listener)}"


@pytest.fixture(scope="session")
def secure():
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka to secure: set KAFKA_HOME to a folder with libs/*.jar")
    return SecuredBroker(*start_shared_broker("secure-kafka", lambda folder: SecureBroker(Path(home), folder)))


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
    topics = {tp.topic for tp, offset in bus.end_offsets(list(TOPICS)).items() if offset}
    log_bytes = b"".join(value for topic in topics for value in read_values(bus, topic))
    bus.close()
    file_bytes = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"live" in log_bytes and SecureBroker.PASSWORD.encode() not in log_bytes + file_bytes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"password": "wrong-one"}, ["rejects the login with SCRAM-SHA-512", "invalid credentials", "check bus.sasl_username"]),
        ({"bus__ssl_cafile": ""}, ["certificate of the Kafka broker", "is not trusted", "set bus.ssl_cafile"]),
        (
            {"bus__security_protocol": "PLAINTEXT", "bus__sasl_username": "", "bus__ssl_cafile": ""},
            ["is unreachable", "accepts connections"],
        ),
        ({"bus__security_protocol": "PLAINTEXT"}, ["bus.ssl_cafile would have no effect"]),
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


# Tokens and client certificates


def make_token_flags(secure, folder, *command, **changes):
    flags = {"bus.address": secure.find_address("OAUTH"), "bus.sasl_mechanism": "OAUTHBEARER", "bus.sasl_username": ""}
    flags |= {"bus.sasl_token_command": list(command)} if command else {}
    return make_flags(secure, folder, **changes) | flags


def open_bus_with(flags):
    settings, _ = load_settings(flags, environment={})
    return open_bus_from_settings(settings)


def make_certificate_flags(secure, folder, certificate, key, **changes):
    get_files = ClientCertificates(secure.folder).get_files
    certificate, key = get_files(certificate)[0] if certificate else "", get_files(key)[1] if key else ""
    flags = {"bus.address": secure.find_address("MTLS"), "bus.security_protocol": "SSL", "bus.sasl_username": ""}
    return make_flags(secure, folder, **changes) | flags | {"bus.ssl_certfile": certificate, "bus.ssl_keyfile": key}


def test_stage_with_a_token_never_stores_or_logs_it(secure, tmp_path, caplog):
    """Producers, consumers and the client for administration log in with the token of an endpoint."""
    caplog.set_level(logging.DEBUG, logger="kafka")
    secret, token = "s3cret-of-the-client", secure.issuer.make_token()
    (tmp_path / "secret").write_text(secret)
    with FakeTokenServer() as server:
        server.answer = 200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600}, {}
        flags = {"bus.sasl_token_url": server.url, "bus.sasl_client_id": "charter", "bus.prefix": "o."}
        flags |= {"bus.sasl_client_secret_file": str(tmp_path / "secret"), "bus.sasl_extensions": ["logicalCluster=lkc-1"]}
        settings, _ = load_settings(make_token_flags(secure, tmp_path / "d") | flags, environment={})
        bus = connect_bus(settings)
        FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=1)
        with make_host(settings, bus, ["respond"], sink=True) as host:
            store = open_store(settings)
            wait_until(lambda: store.query("SELECT count(*) FROM responses").rows == [(1,)], host)
        checks = {result.check: result for result in run_checks(settings)}
        assert checks["login"].state == "ok" and "SASL_SSL with OAUTHBEARER; the token is valid for 3" in checks["login"].detail
        topics = {tp.topic for tp, offset in bus.end_offsets(list(TOPICS)).items() if offset}
        log_bytes = b"".join(value for topic in topics for value in read_values(bus, topic))
        bus.close()
        num_requests = len(server.requests)
    assert num_requests == 2  # one for each bus, not one for each client
    file_bytes = b"".join(path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file())
    outputs = log_bytes + file_bytes + caplog.text.encode() + repr([vars(record) for record in caplog.records]).encode()
    assert b"live" in log_bytes and token.encode() not in outputs and secret.encode() not in outputs


def test_commands_never_print_the_token(secure, tmp_path):
    token = secure.issuer.make_token()
    (tmp_path / "token").write_text(token)
    flags = make_token_flags(secure, tmp_path / "d") | {"bus.sasl_token_command": f"cat,{tmp_path / 'token'}"}
    options = [word for key, value in flags.items() for word in ("--set", f"{key}={value}")]
    for command in (
        ["topics", "lag", "-v"],
        ["config", "--json"],
        ["topics", "lag", "--log-json", "--set", "bus.address=kafka://127.0.0.1:9"],
    ):
        completed = fork_server.run_charter([command[0], *options, *command[1:]])
        assert completed.stdout + completed.stderr and token not in completed.stdout + completed.stderr


@pytest.mark.parametrize("next_token", ["valid", "missing", "rejected"])
def test_token_that_expires_while_records_flow(secure, tmp_path, monkeypatch, next_token):
    """The broker ends a session with its token. The clients log in again on the open connections, wait, or report the rejection."""
    monkeypatch.setattr(engine.bus.tokens, "_MIN_RENEWAL_AGE_S", 0.0)
    monkeypatch.setattr(engine.bus.tokens, "_RETRY_RANGE_S", (0.1, 0.1))
    path, issuer = tmp_path / "token", secure.issuer
    path.write_text(issuer.make_token(7))
    bus = open_bus_with(make_token_flags(secure, tmp_path, "cat", str(path), bus__prefix=f"e-{next_token}."))
    expires_at = time.monotonic() + bus.token_provider.remaining_s
    bus.create_topics([TopicSpec("in", Prompt, num_partitions=1)])
    writer, reader = bus.open_writer("w"), bus.open_reader({TopicPartition("in", 0): 0})
    written, read = [], []

    def pass_record():
        written.append(f"{len(written)}".encode())
        writer.commit([ProducerRecord("in", b"k", written[-1])])
        while len(read) < len(written):
            read.extend(record.value for record in reader.poll(0.2, 100))
        bus.end_offsets(["in"])

    pass_record()
    connections = [c for client in (bus.admin, reader.client) for c in client._manager._conns.values() if c.connected]
    first_logins = [connection._reauth.authenticated_at for connection in connections]
    # All clients have logged in with the first token. Now the command gives another one, or fails.
    replacements = {"valid": issuer.make_token(), "rejected": issuer.make_token(aud="another-cluster")}
    path.unlink() if next_token == "missing" else path.write_text(replacements[next_token])
    if next_token == "valid":
        wait_until(lambda: pass_record() or time.monotonic() > expires_at + 0.5, interval_s=0.2)
        assert connections and all(connection.connected for connection in connections)
        assert all(c._reauth.authenticated_at > first for c, first in zip(connections, first_logins, strict=True))
        assert TOKEN_STATISTICS.get_remaining_s() > 3000
    elif next_token == "rejected":
        with pytest.raises(LoginRejected, match=r"rejects the login with OAUTHBEARER\n.*invalid_token"):
            wait_until(lambda: not bus.end_offsets(["in"]), interval_s=0.2)  # until it raises the error
    else:
        with pytest.raises(BusUnreachable, match=r"command cat .* failed\nit ended with exit code 1"):
            wait_until(lambda: not bus.end_offsets(["in"]), interval_s=0.2)  # until it raises the error
        assert TOKEN_STATISTICS.fetch_counts["failure"] >= 1
        path.write_text(issuer.make_token())
        wait_until(lambda: bus.token_provider.remaining_s > 0)
        assert bus.end_offsets(["in"])
        writer.close()
        writer = bus.open_writer("w")
        pass_record()
    assert read == written
    for opened in (writer, reader, bus):
        opened.close()


@pytest.mark.parametrize("name", ["charter", "charter-encrypted"])
def test_broker_accepts_a_client_certificate(secure, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CHARTER_KAFKA_KEY_PASSWORD", ClientCertificates.KEY_PASSWORD)
    bus = open_bus_with(make_certificate_flags(secure, tmp_path, "charter", name, bus__prefix=f"{name}."))
    bus.create_topics([TopicSpec("in", Prompt, num_partitions=1)])
    bus.publish([ProducerRecord("in", b"k", b"1")])
    assert read_values(bus, "in") == [b"1"]
    bus.close()


@pytest.mark.parametrize(
    ("certificate", "key", "error", "expected"),
    [
        ("stranger", "stranger", LoginRejected, "rejects the client certificate\nthe broker answers .*CERTIFICATE"),
        ("", "", LoginRejected, "rejects the client certificate\nbus.ssl_certfile is not set"),
        ("charter", "stranger", UsageError, "cannot be used\nKEY_VALUES_MISMATCH"),
        ("charter", "charter-encrypted", UsageError, "cannot be decrypted\nits password is wrong"),
    ],
)
def test_wrong_client_certificate_is_refused(secure, tmp_path, monkeypatch, certificate, key, error, expected):
    monkeypatch.setenv("CHARTER_KAFKA_KEY_PASSWORD", "wrong-one")
    with pytest.raises(error, match=expected) as caught:
        open_bus_with(make_certificate_flags(secure, tmp_path, certificate, key))
    assert len(str(caught.value).splitlines()) == 3 and "wrong-one" not in str(caught.value)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"aud": "another-cluster"}, "rejects the login with OAUTHBEARER\n.*invalid_token.*\ncheck the issuer, the audience"),
        ({"exp": 1}, "the token of the command echo .* has expired"),
    ],
)
def test_rejected_token_is_reported_at_once(secure, tmp_path, claims, expected):
    token = secure.issuer.make_token(**claims)
    with pytest.raises(CharterError, match=expected) as caught:
        open_bus_with(make_token_flags(secure, tmp_path, "echo", token))
    assert len(str(caught.value).splitlines()) == 3 and token not in str(caught.value)


def test_metrics_are_served_when_the_broker_rejects_the_login(secure, tmp_path):
    flags = make_token_flags(secure, tmp_path, "echo", secure.issuer.make_token(aud="another-cluster"))
    settings, _ = load_settings(flags, environment={})
    collector = _MetricsCollector(settings, make_pipeline_collector([], []))
    collector()  # the first scrape opens the log
    assert {sample.name for sample in collector()} == {"charter_kafka_token_fetches_total"}


def test_name_of_the_broker_is_checked(secure, tmp_path):
    flags = make_certificate_flags(secure, tmp_path, "charter", "charter")
    flags["bus.address"] = flags["bus.address"].replace("127.0.0.1", "127.1")  # the same address, but not in the certificate
    with pytest.raises(LoginRejected, match=r"mismatch.*\nuse the host name of the certificate in bus.address"):
        open_bus_with(flags)


def test_listener_without_the_mechanism_is_reported(secure, tmp_path):
    flags = make_token_flags(secure, tmp_path, "echo", secure.issuer.make_token())
    with pytest.raises(LoginRejected, match="rejects the login with OAUTHBEARER\nthe listener does not offer this mechanism"):
        open_bus_with(flags | {"bus.address": f"kafka://{secure.address}"})
