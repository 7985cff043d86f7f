"""`charter doctor` finds problems, prints what to type, and changes nothing."""

import json

import duckdb
import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.installation import get_install_command
from engine.bus import open_bus
from engine.errors import UsageError
from engine.store import Store
from schemas.topics import TOPICS
from tests.support.chat_server import FakeChatServer, make_script


@pytest.fixture
def doctor(tmp_path):
    """Return a function that runs the command on a folder and returns (exit code, findings by check)."""

    def run(**settings):
        flags = {"models.policy": "scripted"} | {name.replace("__", "."): value for name, value in settings.items()}
        options = [option for name, value in flags.items() for option in ("--set", f"{name}={value}")]
        done = CliRunner().invoke(cli, ["doctor", "--json", "--data", str(tmp_path / "data"), *options])
        return done.exit_code, {row["check"]: row for row in json.loads(done.stdout)}

    return run


def test_empty_folder_has_no_problems_and_is_not_changed(tmp_path, doctor):
    code, findings = doctor()
    assert code == 0 and {row["state"] for row in findings.values()} <= {"ok", "warn"}
    assert "does not exist yet" in findings["database"]["detail"] and "does not exist yet" in findings["log"]["detail"]
    assert not (tmp_path / "data").exists()


def test_findings_describe_an_existing_run(tmp_path, doctor, smollm2):
    bus = open_bus(str(tmp_path / "data"))
    bus.create_topics([spec for spec in TOPICS.values() if spec.name != "scores"])
    bus.close()
    Store(tmp_path / "data" / "charter.duckdb").create_schema()
    code, findings = doctor(models__judge="smollm2", models__policy=str(smollm2))
    assert code == 0
    assert "0 records" in findings["database"]["detail"] and findings["dead letters"]["detail"] == "none"
    assert (
        findings["log"]["state"] == "warn"
        and "scores" in findings["log"]["detail"]
        and "topics create" in findings["log"]["fix"]
    )
    assert "ready in the cache" in findings["model judge"]["detail"] and "1 safetensors" in findings["model policy"]["detail"]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"models__policy": "/nowhere/model"}, "model policy", "there is no model"),
        ({"models__judge": "http://127.0.0.1:9/v1#judge"}, "model judge", "not a reachable model server"),
        ({"run__constitution": "defualt"}, "constitution", "no constitution"),
        ({"bus__address": "kafka://127.0.0.1:9"}, "log", "refused"),
    ],
)
def test_problems_are_reported_with_a_remedy(doctor, settings, check, words):
    code, findings = doctor(**settings)
    assert code == 1
    assert findings[check]["state"] == "fail" and words in findings[check]["detail"] and findings[check]["fix"]
    assert [name for name, row in findings.items() if row["state"] == "fail"] == [check]


def test_database_of_another_version_or_locked_is_reported(tmp_path, doctor):
    store = Store(tmp_path / "data" / "charter.duckdb")
    store.create_schema()
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("UPDATE raw.sink_state SET version = 99")
    code, findings = doctor()
    assert code == 1 and "another version" in findings["database"]["detail"]


def test_models_of_a_server_are_listed_without_the_key(doctor, run_models_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url, seen = run_models_server
    code, findings = doctor(models__judge=f"{url}/v1#big", models__critic=f"{url}/v1#other")
    assert code == 1 and findings["model judge"]["state"] == "ok"
    assert "serves big: no prefills, 3 top log-probabilities, no token ids" in findings["model judge"]["detail"]
    assert "accepts prompts as messages" in findings["model judge"]["detail"]
    assert "serves big, not other" in findings["model critic"]["detail"] and "models.critic" in findings["model critic"]["fix"]
    assert set(seen) == {"Bearer sk-secret"} and "sk-secret" not in json.dumps(findings)
    code, findings = doctor(models__judge="http://host:port/v1#big", models__critic=url)
    assert (
        code == 1
        and "is invalid" in findings["model judge"]["detail"]
        and "names no model" in findings["model critic"]["detail"]
    )


@pytest.fixture
def run_models_server():
    """Run a strict loopback server with one model; return its address and the keys of its requests."""
    server = FakeChatServer(model_names=["big"])
    server.script = make_script()
    yield server.url.removesuffix("/v1"), server.authorizations
    server.close()


@pytest.mark.parametrize(
    ("direct_url", "command"),
    [
        (None, "pip install 'charter[train]'"),
        ('{"url": "file:///dist/charter-0.1.0-py3-none-any.whl", "archive_info": {}}', "pip install 'charter[train]'"),
        ('{"url": "file:///src/my%20charter", "dir_info": {}}', "pip install 'charter[train]'"),
        ('{"url": "file:///src/my%20charter", "dir_info": {"editable": true}}', "pip install -e '/src/my charter[train]'"),
    ],
)
def test_advice_fits_the_installation(direct_url, command, tmp_path, monkeypatch):
    info = tmp_path / "charter-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: charter\nVersion: 0.1.0\n")
    if direct_url:
        (info / "direct_url.json").write_text(direct_url)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_install_command("train") == command


def test_empty_file_of_a_log_is_not_changed(tmp_path, doctor):
    path = tmp_path / "data" / "log.sqlite"
    path.parent.mkdir()
    path.touch()
    code, findings = doctor()
    assert code == 0 and "does not exist yet" in findings["log"]["detail"] and path.stat().st_size == 0


@pytest.mark.parametrize(
    "command", ["tail prompts", "topics list", "topics lag", "batches show 1", "policy list", "replay --stage judge", "label"]
)
def test_command_that_only_reads_creates_no_log(tmp_path, command):
    with pytest.raises(UsageError, match=r"there is no (log|database)"):
        CliRunner().invoke(cli, [*command.split(), "--data", str(tmp_path / "typo")], catch_exceptions=False)
    assert not (tmp_path / "typo").exists()
