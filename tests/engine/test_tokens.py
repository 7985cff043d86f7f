"""Tokens for OAUTHBEARER without a broker: their expiry, the command, the endpoint, and settings that do not match."""

import socket
import sys
import time

import pytest

import engine.bus.tokens
from engine.bus import open_bus
from engine.bus.security import make_client_options
from engine.bus.token_statistics import TOKEN_STATISTICS
from engine.bus.tokens import TokenCommand, TokenEndpoint, TokenProvider, make_token
from engine.errors import BusUnreachable, UsageError
from engine.metrics import collect_token_metrics
from engine.settings import BusSettings
from tests.support.credentials import ClientCertificates, make_unsigned_token
from tests.support.token_server import FakeTokenServer
from tests.support.waiting import wait_until

SECRET = "s3cret/of+the=client"
OAUTH = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
COMMAND = OAUTH | {"sasl_token_command": ["get-token"]}
ENDPOINT = OAUTH | {"sasl_token_url": "https://login.example.com/token", "sasl_client_id": "c"}
SCRAM = {"security_protocol": "SASL_SSL", "sasl_username": "u"}


@pytest.fixture
def token_server():
    with FakeTokenServer() as server:
        yield server


def make_endpoint(server, **options):
    return TokenEndpoint(server.url, "client 1", lambda: SECRET, **options)


@pytest.mark.parametrize(
    ("claims", "lifetimes", "expected"),
    [({"exp": 100}, [], 100), ({"exp": 100}, [30.0, 0.0, None], 30), ({"sub": "a"}, [None, 50.0], 50), (None, [20.0], 20)],
)
def test_token_expires_at_the_earliest_known_time(claims, lifetimes, expected):
    claims = claims and {name: time.time() + value if name == "exp" else value for name, value in claims.items()}
    token = make_token(make_unsigned_token(**claims) if claims else "opaque", "the source", lifetimes)
    assert expected - 2 < token.remaining_s <= expected
    assert token.text not in repr(token)


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("opaque", UsageError, "no known expiry"),
        (make_unsigned_token(sub="no-exp"), UsageError, "no known expiry"),
        (make_unsigned_token(exp=True), UsageError, "no known expiry"),
        (make_unsigned_token(exp=1), BusUnreachable, "has expired"),
        ("Bearer a-secret", UsageError, "did not give a token"),
        ('{"access_token": "a-secret"}', UsageError, "did not give a token"),
        ("a-secret\x01", UsageError, "did not give a token"),
        ("", UsageError, "did not give a token"),
    ],
)
def test_text_without_a_usable_token_is_refused(text, error, expected):
    with pytest.raises(error, match=expected) as caught:
        make_token(text, "the source", [])
    assert len(str(caught.value).splitlines()) == 3 and "a-secret" not in str(caught.value)


def test_command_runs_without_a_shell(tmp_path):
    script = tmp_path / "get token"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$1-$#"\n')
    script.chmod(0o700)
    assert TokenCommand([str(script), "abc", "$(touch x) > y"], 60.0).fetch().text == "abc-2"


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (["/no/such/program"], UsageError, "cannot be started\nNo such file"),
        (["sh", "-c", "echo a-secret; echo a-secret >&2; exit 7"], BusUnreachable, "failed\nit ended with exit code 7"),
        (["sh", "-c", "sleep 600 & wait"], BusUnreachable, "did not end within"),
        (["sh", "-c", "yes a-secret"], BusUnreachable, "printed more than 65536 bytes"),
        (["sh", "-c", "echo a secret"], UsageError, "did not give a token"),
    ],
)
def test_error_of_a_command_has_three_lines_and_no_output(capfd, monkeypatch, arguments, error, expected):
    monkeypatch.setattr(engine.bus.tokens, "_COMMAND_TIMEOUT_S", 0.2)
    with pytest.raises(error, match=expected) as caught:
        TokenCommand(arguments).fetch()
    assert len(str(caught.value).splitlines()) == 3
    assert "a-secret" not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("in_body", [False, True])
def test_endpoint_gets_the_credentials_scope_and_audience(token_server, monkeypatch, in_body):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy must not get the secret
    token_server.answer = 200, {"access_token": "opaque", "token_type": "bearer", "expires_in": "60"}, {}
    token = make_endpoint(token_server, scope="kafka.write", audience="broker", sends_secret_in_body=in_body).fetch()
    assert token.text == "opaque" and 50 < token.remaining_s <= 60
    credentials = {"client_id": "client 1", "client_secret": SECRET}
    form = {"grant_type": "client_credentials", "scope": "kafka.write", "audience": "broker"} | (credentials if in_body else {})
    assert token_server.requests == [(form, ("",) if in_body else ("client 1", SECRET))]


@pytest.mark.parametrize(
    ("answer", "error", "expected"),
    [
        (
            (401, {"error": "invalid_client", "error_description": f"not {SECRET}"}, {}),
            UsageError,
            "invalid_client: not \\*\\*\\*",
        ),
        ((400, {"error": "invalid_scope"}, {}), UsageError, "status 400: invalid_scope"),
        ((307, {}, {"Location": "http://127.0.0.1:9/"}), UsageError, "redirects"),
        ((503, b"<html>", {}), BusUnreachable, "status 503"),
        ((200, b"<html>", {}), UsageError, "did not return a bearer token"),
        ((200, b"[" * 100_000, {}), UsageError, "did not return a bearer token"),
        ((200, {"access_token": "a-secret", "token_type": "mac"}, {}), UsageError, "did not return a bearer token"),
        ((200, {"access_token": "a-secret", "token_type": "Bearer"}, {}), UsageError, "no known expiry"),
        ((200, b" " * 1_100_000, {}), BusUnreachable, "more than 1048576 bytes"),
    ],
)
def test_error_of_an_endpoint_has_three_lines_and_no_secret(token_server, answer, error, expected):
    token_server.answer = answer
    with pytest.raises(error, match=expected) as caught:
        make_endpoint(token_server).fetch()
    assert len(str(caught.value).splitlines()) == 3
    assert SECRET not in str(caught.value) and "a-secret" not in str(caught.value)


def test_certificate_of_the_endpoint_is_verified(tmp_path, monkeypatch):
    certificates = ClientCertificates(tmp_path)
    certificates.create()
    with FakeTokenServer(certificates.get_files("stranger")) as server:
        server.answer = 200, {"access_token": "opaque", "token_type": "Bearer", "expires_in": 60}, {}
        with pytest.raises(BusUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            make_endpoint(server).fetch()
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", certificates.get_files("stranger")[0])
        assert make_endpoint(server).fetch().text == "opaque"


def test_provider_replaces_tokens_and_reports_failures(token_server, monkeypatch, caplog):
    monkeypatch.setattr(engine.bus.tokens, "_RETRY_RANGE_S", (0.01, 0.01))
    monkeypatch.setattr(engine.bus.tokens, "_MIN_REFRESH_INTERVAL_S", 0.01)
    monkeypatch.setattr(engine.bus.tokens, "_REFRESH_SHARE", 0.001)
    TOKEN_STATISTICS.fetch_counts.clear()
    failure = 503, {"error": "temporarily_unavailable"}, {}

    def make_answer(text, lifetime_s):
        return 200, {"access_token": text, "token_type": "Bearer", "expires_in": lifetime_s}, {}

    def count_lines(text):
        return sum(text in record.getMessage() for record in caplog.records)

    token_server.answer = make_answer("first-a-secret", 60)
    provider = TokenProvider(make_endpoint(token_server), {"logicalCluster": "lkc-1"})
    provider.start()
    assert (provider.token(), provider.extensions()) == ("first-a-secret", {"logicalCluster": "lkc-1"})

    token_server.answer = failure
    wait_until(lambda: TOKEN_STATISTICS.fetch_counts["failure"] >= 5)
    assert provider.token() == "first-a-secret"
    assert (
        count_lines("status 503: temporarily_unavailable; the current token is valid for") == 1
    )  # not one line for each failure

    token_server.answer = make_answer("short-a-secret", 0.05)
    wait_until(lambda: count_lines("the Kafka token was replaced after"))
    token_server.answer = failure
    wait_until(lambda: count_lines("has expired"))
    with pytest.raises(BusUnreachable, match="status 503"):
        provider.token()
    samples = {(sample.name, *sample.labels): sample.value for sample in collect_token_metrics()}
    assert samples["charter_kafka_token_fetches_total", ("outcome", "success")] >= 2
    assert samples["charter_kafka_token_fetches_total", ("outcome", "failure")] >= 6
    assert samples[("charter_kafka_token_remaining_seconds",)] == 0

    token_server.answer = make_answer("last-a-secret", 60)
    wait_until(lambda: provider.remaining_s > 1)
    assert provider.token() == "last-a-secret"
    assert SECRET not in caplog.text and "a-secret" not in caplog.text
    provider.close()
    provider._thread.join()
    assert TOKEN_STATISTICS.get_remaining_s() is None


def test_close_ends_a_running_command():
    provider = TokenProvider(TokenCommand([sys.executable, "-c", "import time; time.sleep(600)"]))
    provider._thread.start()  # without a first token
    wait_until(lambda: provider.source.process is not None)
    provider.close()
    provider._thread.join()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ssl_cafile": "ca.pem"}, "bus.ssl_cafile would have no effect"),
        (
            {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "u", "ssl_check_hostname": False},
            "bus.ssl_check_hostname would",
        ),
        ({"sasl_username": "u"}, "bus.sasl_username would have no effect"),
        ({"sasl_mechanism": "OAUTHBEARER"}, "bus.sasl_mechanism would have no effect"),
        ({"security_protocol": "SSL", "sasl_token_command": ["t"]}, "bus.sasl_token_command would have no effect"),
        (SCRAM | {"sasl_token_url": "https://a/t"}, "bus.sasl_token_url would have no effect"),
        (SCRAM | {"sasl_scope": "s"}, "bus.sasl_scope would have no effect"),
        (SCRAM | {"sasl_extensions": ["a=b"]}, "bus.sasl_extensions would have no effect"),
        (COMMAND | {"sasl_username": "u"}, "bus.sasl_username would have no effect"),
        (COMMAND | {"sasl_password_file": "f"}, "bus.sasl_password_file would have no effect"),
        (COMMAND | {"sasl_token_url": "https://a/t"}, "bus.sasl_token_url would have no effect"),
        (COMMAND | {"sasl_audience": "a"}, "bus.sasl_audience would have no effect"),
        (COMMAND | {"sasl_client_auth": "client_secret_post"}, "bus.sasl_client_auth would have no effect"),
        (OAUTH, "no source of Kafka tokens"),
        (OAUTH | {"sasl_token_command": [""]}, "no program"),
        (ENDPOINT | {"sasl_client_id": ""}, "no client id"),
        (ENDPOINT | {"sasl_client_secret_env": "OTHER"}, "no secret for the client"),
        (ENDPOINT | {"sasl_client_secret_file": "/no/file"}, "no file /no/file"),
        (ENDPOINT | {"sasl_token_url": "http://login.example.com/t"}, "without encryption"),
        (ENDPOINT | {"sasl_token_url": "http://127.0.0.1.example.com/t"}, "without encryption"),
        (ENDPOINT | {"sasl_token_url": "https://u:a-secret@login.example.com"}, "must not contain a user"),
        (ENDPOINT | {"sasl_token_url": "login.example.com"}, "is not a URL"),
        (COMMAND | {"sasl_extensions": ["logicalCluster"]}, "NAME=VALUE"),
        (COMMAND | {"sasl_extensions": ["auth=x"]}, "NAME=VALUE"),
        (COMMAND | {"sasl_extensions": ["a=b\x01c=d"]}, "NAME=VALUE"),
        ({"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "AWS_MSK_IAM"}, "cannot be used with AWS_MSK_IAM"),
        (
            {"security_protocol": "SASL_SSL", "sasl_mechanism": "AWS_MSK_IAM", "sasl_username": "u"},
            "bus.sasl_username would have",
        ),
        ({"security_protocol": "SSL", "ssl_keyfile": __file__}, "bus.ssl_keyfile would have no effect"),
        ({"security_protocol": "SSL", "ssl_key_password_file": __file__}, "bus.ssl_key_password_file would have no effect"),
        ({"security_protocol": "SSL", "ssl_cafile": __file__}, "no certificates that can be read"),
        ({"security_protocol": "SSL", "ssl_certfile": __file__}, "cannot be used"),
    ],
)
def test_settings_that_do_not_match_are_refused(options, expected):
    environment = {"CHARTER_KAFKA_PASSWORD": "a-secret", "CHARTER_KAFKA_CLIENT_SECRET": "a-secret"}
    with pytest.raises(UsageError, match=expected) as caught:
        make_client_options(BusSettings(**options), environment)
    assert len(str(caught.value).splitlines()) == 3 and "a-secret" not in str(caught.value)


def test_client_secret_file_is_read_for_each_token(tmp_path, token_server):
    secret_file = tmp_path / "secret"
    secret_file.write_text("old\n")
    bus = BusSettings(**ENDPOINT | {"sasl_token_url": token_server.url, "sasl_client_secret_file": str(secret_file)})
    source = make_client_options(bus, {})["sasl_oauth_token_provider"].source
    token_server.answer = 200, {"access_token": "opaque", "token_type": "Bearer", "expires_in": 60}, {}
    source.fetch()
    secret_file.write_text("new\n")
    source.fetch()
    assert [login for _, login in token_server.requests] == [("c", "old"), ("c", "new")]


def test_missing_aws_configuration_is_reported(monkeypatch, tmp_path):
    """Only the checks before the first connection: there is no MSK cluster in the tests."""
    bus = BusSettings(security_protocol="SASL_SSL", sasl_mechanism="AWS_MSK_IAM")
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="needs the Python package botocore"):
        patch.setattr("engine.bus.security.find_spec", lambda name: None)
        make_client_options(bus, {})
    pytest.importorskip("botocore")
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UsageError, match="needs AWS region"):
        make_client_options(bus, {})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with pytest.raises(UsageError, match="needs AWS credentials"):
        make_client_options(bus, {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    assert make_client_options(bus, {})["sasl_mechanism"] == "AWS_MSK_IAM"


def test_server_that_never_answers_is_unreachable(monkeypatch):
    monkeypatch.setattr("engine.bus.login._LOGIN_TIMEOUT_MS", 100)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"kafka://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(BusUnreachable, match="accepts connections, but a login does not end within"):
            open_bus(address, options={"security_protocol": "SSL"})
