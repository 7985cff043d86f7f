"""`charter policy` and `charter batches` on the records of FAKE learners."""

import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.errors import CharterError, UsageError
from engine.policy import read_paused_phases, read_policy_updates
from engine.worker import to_producer_record
from schemas.codec import decode_record
from schemas.records import Incident
from tests.chaos.crash_points import FAKE_LEARNERS, make_settings
from tests.support.records import make_chain_end, make_preference
from trainer.loop import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a data folder after two SFT updates and one update of the reward model."""
    folder = tmp_path_factory.mktemp("trained") / "data"
    (folder / "base").mkdir(parents=True)
    settings = make_settings(folder)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    for turn in range(2):
        chains = [make_chain_end(f"{turn}{n}", f"chain {turn} {n}") for n in range(4)]
        labels = [make_preference(f"{turn}{n}", f"pair {turn} {n}", 0.8) for n in range(4)]
        bus.publish([to_producer_record(record) for record in (*chains, *labels)])
        sink_all(bus, store)
        trainer.update("sft")
    trainer.update("reward")
    sink_all(bus, store)
    trainer.close()
    bus.close()
    return folder


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


@pytest.fixture
def charter(trained):
    """Return a function that runs a command on the folder and raises Charter's errors."""

    def run(*arguments, **kwargs):
        options = [word for name, value in make_flags(trained).items() for word in ("--set", f"{name}={value}")]
        result = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False, **kwargs)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def make_flags(folder):
    return {"data.folder": str(folder), "models.policy": str(folder / "base"), "train.save_total_limit": "1"}


def list_policies(charter):
    return json.loads(charter("policy", "list", "--json"))


def test_restoring_a_policy_creates_a_version_with_the_old_weights(charter, trained):
    before = list_policies(charter)
    assert [(row["kind"], row["version"], row["phase"]) for row in before] == [
        ("policy", 0, ""), ("policy", 1, "sft"), ("policy", 2, "sft"), ("reward", 1, "reward"),
    ]  # fmt: skip
    assert before[1]["weights"] == "removed" and before[2]["role"] == "current, reference"
    with pytest.raises(UsageError, match="weights of policy 1 are missing"):
        charter("policy", "use", "1")
    with pytest.raises(UsageError, match="no policy 9"):
        charter("policy", "use", "9")
    assert "policy 3 is now the current policy, with the weights of policy 0" in charter(
        "policy", "use", "0", "--reason", "worse"
    )
    after = list_policies(charter)
    assert [(row["version"], row["weights_of"], row["role"]) for row in after if row["kind"] == "policy"][-1] == (
        3, 0, "current",
    )  # fmt: skip
    assert "policy 4 is now the current policy, with the weights of policy 2" in charter("policy", "use", "2")
    assert "already has the weights of policy 2" in charter("policy", "use", "4")
    bus = connect_bus(make_settings(trained))
    assert [update.version for update in read_policy_updates(bus) if update.restored_version is not None] == [3, 4]
    incidents = [decode_record(value, Incident) for value in read_values(bus, "incidents")]
    assert (incidents[0].title, incidents[0].detail) == ("policy 0 was restored manually", "worse")
    bus.close()


def test_pause_stops_the_trainer_and_resume_restarts_it(charter, trained):
    assert charter("policy", "pause", "ppo", "--reason", "look") == "ppo: paused\n"
    assert charter("policy", "pause", "ppo") == "ppo: was already paused\n"
    settings = make_settings(trained)
    bus = connect_bus(settings)
    trainer = Trainer(bus, open_store(settings), settings, trained / "base", learners=FAKE_LEARNERS)
    assert trainer.read_state().paused_phases == {"ppo": "look"} == read_paused_phases(bus)
    assert charter("policy", "resume") == "ppo: resumed\n"
    assert charter("policy", "resume") == charter("policy", "resume", "ppo") == "nothing to resume: no phase is paused\n"
    charter("policy", "pause", "dpo")
    assert charter("policy", "resume", "dpo", "ppo") == "dpo: resumed\nppo: was not paused\n"
    assert trainer.read_state().paused_phases == {} == read_paused_phases(bus)
    trainer.close()
    bus.close()


def test_export_contains_only_the_model_files(charter, tmp_path):
    assert charter("policy", "export", "2", str(tmp_path / "out")) == f"policy 2: {tmp_path / 'out'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fake.safetensors"]
    with pytest.raises(UsageError, match="already exists"):
        charter("policy", "export", "2", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="is not a policy version"):
        charter("policy", "export", "newest", str(tmp_path / "other"))


def test_batches_are_listed_shown_and_rebuilt(charter, trained):
    rows = json.loads(charter("batches", "--json"))
    assert [(row["batch_number"], row["phase"], row["rows"], row["outcome"]) for row in rows] == [
        (1, "sft", 4, "published policy 1"), (2, "sft", 4, "published policy 2"), (3, "reward", 8, "published reward 1"),
    ]  # fmt: skip
    batch = json.loads(charter("batches", "show", "3", "--json"))
    assert batch["mixture"] == {"test": 8} and len(batch["record_ids"]) == 8
    assert "rebuilt exactly: 8 records" in charter("batches", "rebuild", "3")
    rebuilt = json.loads(charter("batches", "rebuild", "3", "--json"))
    assert [row["record_id"] for row in rebuilt["rows"]] == batch["record_ids"] and rebuilt["content_hash"] == batch[
        "content_hash"
    ]
    with pytest.raises(UsageError, match="there is no batch 9"):
        charter("batches", "show", "9")
    store = open_store(make_settings(trained))
    with store.open_write_session() as connection:
        connection.execute("UPDATE raw.preferences SET p_a = 0.1 WHERE p_a = 0.8 AND record_id = ?", batch["record_ids"][:1])
    with pytest.raises(CharterError, match="batch 3"):
        charter("batches", "rebuild", "3")


def test_training_views(charter, trained):
    store = open_store(make_settings(trained))
    versions = store.query(
        "SELECT kind, version, weights_of, batch_number, trained_rows FROM policy_versions ORDER BY 1, 2"
    ).rows
    assert versions[:2] == [("POLICY", 1, 1, 1, 4), ("POLICY", 2, 2, 2, 4)] and versions[-1] == ("REWARD", 1, 1, 3, 8)
    assert store.query("SELECT count(*), count(DISTINCT row_id) FROM batch_rows WHERE trained").rows == [(16, 16)]
    steps = store.query("SELECT DISTINCT phase, metric FROM training_steps").rows
    assert {("sft", "loss"), ("loop", "duckdb_share"), ("loop", "alive_duckdb_share")} <= set(steps)


def test_chat_answers_one_message_or_a_conversation(trained):
    def run_chat(*words, text=""):
        flags_ = {"data.folder": str(trained), "models.policy": "scripted"}
        options = [word for name, value in flags_.items() for word in ("--set", f"{name}={value}")]
        return CliRunner().invoke(cli, ["chat", "--policy", "0", *words, *options], input=text, catch_exceptions=False)

    once = run_chat("--seed", "1", "--json", "-", text="Why is\nthe sky blue?")
    about = json.loads(once.stdout)
    assert (about["policy"], about["finish_reason"]) == (0, "stop") and about["response"]
    assert run_chat("--seed", "1", "Why is\nthe sky blue?").stdout == about["response"] + "\n"
    talk = run_chat("--seed", "1", text="one\n\n/new\ntwo\n").stdout.splitlines()
    assert len([line for line in talk if line]) == 2
    with pytest.raises(UsageError, match="no policy 9"):
        CliRunner().invoke(cli, ["chat", "--policy", "9", "x", "--data", str(trained)], catch_exceptions=False)


@pytest.mark.parametrize(
    "words", [("chat", "Hi"), ("policy", "pause"), ("policy", "resume"), ("policy", "use", "0"), ("train",)]
)
def test_commands_on_an_empty_folder_create_nothing(tmp_path, words):
    with pytest.raises(UsageError, match="there is no log in"):
        CliRunner().invoke(cli, [*words, "--data", str(tmp_path / "data")], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
