"""The doctor finds what is wrong, says what to type, and leaves everything as it was."""

import json

import duckdb
import pytest
from click.testing import CliRunner

from charter.cli import cli
from engine.bus import open_bus
from engine.store import Store
from schemas.topics import TOPICS
from tests.support.chat_server import FakeChatServer, make_script


@pytest.fixture
def doctor(tmp_path):
    """Runs it on a folder; returns (exit code, findings by check)."""

    def run(**settings):
        chosen = {"models.policy": "scripted"} | {name.replace("__", "."): value for name, value in settings.items()}
        flags = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
        done = CliRunner().invoke(cli, ["doctor", "--json", "--data", str(tmp_path / "data"), *flags])
        return done.exit_code, {row["check"]: row for row in json.loads(done.stdout)}

    return run


def test_a_fresh_folder_is_well_and_stays_untouched(tmp_path, doctor):
    code, found = doctor()
    assert code == 0 and {row["state"] for row in found.values()} <= {"ok", "warn"}
    assert "does not exist yet" in found["database"]["detail"] and "does not exist yet" in found["log"]["detail"]
    assert not (tmp_path / "data").exists()


def test_what_is_there_is_described(tmp_path, doctor, smollm2):
    bus = open_bus(str(tmp_path / "data"))
    bus.create_topics([spec for spec in TOPICS.values() if spec.name != "scores"])
    bus.close()
    Store(tmp_path / "data" / "charter.duckdb").create_schema()
    code, found = doctor(models__judge="smollm2", models__policy=str(smollm2))
    assert code == 0
    assert "0 records" in found["database"]["detail"] and found["dead letters"]["detail"] == "none"
    assert found["log"]["state"] == "warn" and "scores" in found["log"]["detail"] and "topics create" in found["log"]["fix"]
    assert "ready in the cache" in found["model judge"]["detail"] and "1 safetensors" in found["model policy"]["detail"]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"models__policy": "/nowhere/model"}, "model policy", "there is no model"),
        ({"models__judge": "http://127.0.0.1:9/v1#judge"}, "model judge", "not a reachable model server"),
        ({"run__constitution": "defualt"}, "constitution", "no constitution"),
        ({"bus__address": "kafka://127.0.0.1:9"}, "log", "refused"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(doctor, settings, check, words):
    code, found = doctor(**settings)
    assert code == 1
    assert found[check]["state"] == "fail" and words in found[check]["detail"] and found[check]["fix"]
    assert [name for name, row in found.items() if row["state"] == "fail"] == [check]


def test_a_database_of_another_version_or_held_by_another_is_found(tmp_path, doctor):
    store = Store(tmp_path / "data" / "charter.duckdb")
    store.create_schema()
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("UPDATE raw.sink_state SET version = 99")
    code, found = doctor()
    assert code == 1 and "another version" in found["database"]["detail"]


def test_a_model_server_is_asked_what_it_serves_and_no_key_is_shown(doctor, tests_models_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url, seen = tests_models_server
    code, found = doctor(models__judge=f"{url}/v1#big", models__critic=f"{url}/v1#other")
    assert code == 1 and found["model judge"]["state"] == "ok"
    assert "serves big: no prefills, 3 top log-probabilities, no token ids" in found["model judge"]["detail"]
    assert "serves big, not other" in found["model critic"]["detail"] and "models.critic" in found["model critic"]["fix"]
    assert set(seen) == {"Bearer sk-secret"} and "sk-secret" not in json.dumps(found)
    code, found = doctor(models__judge="http://host:port/v1#big", models__critic=url)
    assert code == 1 and "is invalid" in found["model judge"]["detail"] and "names no model" in found["model critic"]["detail"]


@pytest.fixture
def tests_models_server():
    """A loopback server that lists one model and answers as a strict one; returns its address and the keys it was sent."""
    server = FakeChatServer(model_names=["big"])
    server.script = make_script()
    yield server.url.removesuffix("/v1"), server.authorizations
    server.close()
