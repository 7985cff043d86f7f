"""The loop of the trainer: cursors, versions, and a crash at every step that resumes with the identical batch."""

import shutil
import threading
from collections import Counter

import pytest

from charter.connect import connect_bus, open_store
from charter.models import RoleModels
from charter.pipeline import STAGES, make_stage
from constitutions.loader import load_constitution as load_constitution
from consumers.sink import Sink
from engine import checkpoints
from engine.bus.read import read_values
from engine.errors import BusUnreachable, CharterError, CommitUncertain, UsageError, WriterFenced
from engine.host import Host
from engine.remote_checkpoints import fetch_checkpoint
from engine.settings import load_settings
from engine.worker import ModelExecutor, Worker
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record
from schemas.records import BatchManifest, DroppedRollout, PolicyKind, PolicyUpdate, Score
from tests.support.records import copy_empty_database
from tests.support.waiting import HANG_S, wait_until
from trainer import phases
from trainer import update as update_module
from trainer.batches import KEY_COLUMNS, rebuild_batch
from trainer.loop import Trainer


@pytest.fixture
def settings(tiny, tmp_path):
    flags = {
        "data.folder": str(tmp_path / "data"), "models.policy": str(tiny), "prompts.eval_fraction": "0", "respond.max_tokens": "8",
        "critique.rounds": "1", "critique.max_tokens": "8", "critique.few_shot": "false", "revise.max_tokens": "8",
        "critique.min_option_mass": "0", "judge.min_option_mass": "0", "sft.learning_rate": "1e-3", "reward.learning_rate": "1e-2",
        "ppo.learning_rate": "1e-3", "ppo.epochs": "1", "train.sft_rows": "4", "train.reward_rows": "4", "train.ppo_rows": "4",
    }  # fmt: skip
    return load_settings(flags, environment={})[0]


@pytest.fixture
def bus(settings):
    bus = connect_bus(settings)
    yield bus
    bus.close()


@pytest.fixture
def store(settings):
    copy_empty_database(settings.folder / "charter.duckdb")
    return open_store(settings)


def run_stages(settings, bus, store, first, last):
    """Send shipped prompts through every stage and wait until all of them are in the database."""
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), first_row=first, last_row=last)
    models, constitution = RoleModels(settings), load_constitution("default")
    executor = ModelExecutor("tiny", downstream_wait_s=0.02)
    workers = [
        Worker(bus, make_stage(name, settings, models, constitution, bus), executor, run_id="live", instance="t")
        for name in STAGES
    ]
    with Host(workers, {"sink": Sink(bus, store, max_wait_s=0.05).run}) as host:
        sql = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
                 AND prompt_id IN (SELECT prompt_id FROM preferences)"""
        wait_until(lambda: store.query(sql, limit_s=HANG_S).rows[0][0] >= last, host)


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


@pytest.fixture
def trainer(settings, bus, store, tiny):
    trainer = Trainer(bus, store, settings, tiny)
    yield trainer
    trainer.close()


def read_manifests(bus):
    return [decode_record(value, BatchManifest) for value in read_values(bus, "batches")]


def read_updates(bus):
    return [decode_record(value, PolicyUpdate) for value in read_values(bus, "policies")]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_groups_of_the_stream_train_a_policy_with_their_grades(settings, bus, store, tiny, method):
    """The stages respond, judge and grade make groups, labels and grades; the real learner trains on their rewards."""
    train = {"rl_method": method, "rewards": ["length=-1", "judge=1"], "group_completions": 16}
    update = {
        "train": settings.train.model_copy(update=train), "respond": settings.respond.model_copy(update={"num_completions": 4}),
        "judge": settings.judge.model_copy(update={"pairing": "circular"}),
        "grade": settings.grade.model_copy(update={"graders": ["length"]}),
    }  # fmt: skip
    settings = settings.model_copy(update=update)
    run_stages(settings, bus, store, 1, 5)
    wait_until(lambda: sink_all(bus, store) or store.query("SELECT count(*) FROM grades").rows[0][0] == 20)
    trainer = Trainer(bus, store, settings, tiny)
    update = trainer.update(method)
    (manifest,) = [m for m in read_manifests(bus) if m.phase == method]
    rows = rebuild_batch(store, manifest).rows
    # Each completion has one grade and is in two pairs of a circle.
    assert {(len(row["reward_grades"]), len(row["reward_pairs"])) for row in rows} == {(1, 2)}
    assert len(manifest.reward_record_ids) == 20 + 20
    # A completion whose pairs have no label, because the text is empty, has no reward.
    assert update.metrics["rollouts"] == len(rows) == 20 - update.metrics["completions_without_reward"] > 10
    assert update.metrics["groups"] == len(manifest.record_ids) == 5
    words = [row["reward_grades"][0]["score"] for row in rows]
    assert update.metrics["rewards/length"] == pytest.approx(sum(words) / len(words))
    wins = [[pair["p_win"] for pair in row["reward_pairs"] if pair["outcome"] == "OK"] for row in rows]
    assert update.metrics["rewards/judge"] == pytest.approx(sum(sum(w) / len(w) for w in wins) / len(wins))
    expected = update.metrics["rewards/judge"] - update.metrics["rewards/length"]
    assert update.metrics["reward_mean"] == pytest.approx(expected, abs=1e-5)
    trainer.close()
    sink_all(bus, store)
    (kl,) = store.query("SELECT count(*) FROM monitor_kl").rows[0]
    (rollouts,) = store.query("SELECT count(*) FROM trained_rollouts").rows[0]
    assert (kl, rollouts) == (1, 5)  # the views of the monitor and of staleness include this method


def test_phases_alternate_and_rows_train_once(settings, bus, store, trainer):
    run_stages(settings, bus, store, 1, 8)
    assert trainer.next_phase() == "sft"
    assert trainer.update("sft").version == 1
    assert trainer.next_phase() == "reward"
    assert trainer.update("reward").kind is PolicyKind.REWARD
    sink_all(bus, store)
    assert trainer.next_phase() is None  # PPO uses neither rollouts of the old policy nor prompts of the reward model
    with pytest.raises(UsageError, match="nothing new"):
        trainer.update("ppo")
    with pytest.raises(UsageError, match="nothing new for sft"):
        trainer.update("sft")
    run_stages(settings, bus, store, 9, 16)
    assert trainer.next_phase() in ("sft", "reward", "ppo")
    versions = store.query("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1").rows
    assert versions == [(0, 8), (1, 8)]
    update = trainer.update("ppo")
    assert (update.version, update.phase, update.base_version) == (2, "ppo", 1)
    scores = [decode_record(value, Score) for value in read_values(bus, "scores")]
    assert len(scores) == 16 and {s.reward_version for s in scores} == {1}
    drops = [decode_record(value, DroppedRollout) for value in read_values(bus, "dropped-rollouts")]
    assert {d.reason for d in drops} == {"sampled before the last supervised update"} and len(drops) == 16
    assert [m.phase for m in read_manifests(bus)] == ["sft", "reward", "ppo"]
    assert read_manifests(bus)[2].reference_policy_version == 1
    trained_rows = {(m.phase, i) for m in read_manifests(bus) for i in m.record_ids}
    assert len(trained_rows) == sum(len(m.record_ids) for m in read_manifests(bus))
    for manifest in read_manifests(bus):
        assert {str(r[KEY_COLUMNS[manifest.phase]]) for r in rebuild_batch(store, manifest).rows} == set(manifest.record_ids)
    sink_all(bus, store)
    sql = (
        "SELECT metric, batch_number, step FROM training_steps WHERE metric IN ('approx_kl', 'reward/accuracy', 'reward_mean')"
    )
    assert sorted(store.query(sql).rows)[0] == ("approx_kl", 3, 1)  # of a step
    assert {row for row in store.query(sql).rows if row[2] is None} == {
        ("reward/accuracy", 2, None),
        ("reward_mean", 3, None),
    }


@pytest.mark.parametrize("crash_at", ["learn", "write", "publish"])
def test_resume_after_a_crash_trains_the_identical_batch(settings, bus, store, tiny, monkeypatch, crash_at):
    run_stages(settings, bus, store, 1, 4)
    trained_batches = []
    learn_sft = phases.learn_sft

    def learn(context, batch):
        trained_batches.append([str(row["record_id"]) for row in batch.rows])
        if crash_at == "learn" and len(trained_batches) == 1:
            raise KeyboardInterrupt
        return learn_sft(context, batch)

    monkeypatch.setitem(phases.LEARNERS, "sft", learn)
    trainer = Trainer(bus, store, settings, tiny)
    if crash_at == "write":
        monkeypatch.setattr(update_module, "write_checkpoint", interrupt)
    if crash_at == "publish":
        publish = trainer.log.publish
        trainer.log.publish = lambda records: interrupt() if isinstance(records[0], PolicyUpdate) else publish(records)
    with pytest.raises(KeyboardInterrupt):
        trainer.update("sft")
    assert read_updates(bus) == [] and len(read_manifests(bus)) == 1
    if crash_at == "write":
        monkeypatch.setattr(update_module, "write_checkpoint", checkpoints.write_checkpoint)
    again = Trainer(bus, store, settings, tiny)
    update = again.resume()
    assert update.version == 1 and update.batch_id == read_manifests(bus)[0].record_id and len(read_manifests(bus)) == 1
    assert len({tuple(rows) for rows in trained_batches}) == 1
    assert len(trained_batches) == (1 if crash_at == "publish" else 2)  # a finished checkpoint is not trained again
    assert again.resume() is None
    with pytest.raises(WriterFenced):
        trainer.log.writer.commit([])
    again.close()


def interrupt(*_):
    raise KeyboardInterrupt


def test_damaged_checkpoint_raises(settings, bus, store, trainer):
    run_stages(settings, bus, store, 1, 4)
    update = trainer.update("sft")
    sink_all(bus, store)
    weights = next((settings.folder / "checkpoints" / "policy-000001").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CharterError, match="damaged"):
        trainer.updater.get_folders(trainer.read_state()).get_policy_folder(update.version)


def test_ppo_needs_a_reward_model_and_rows(settings, bus, store, trainer):
    run_stages(settings, bus, store, 1, 2)
    with pytest.raises(UsageError, match="needs a reward model"):
        trainer.update("ppo")
    assert trainer.next_phase() is None  # two rows are below every threshold


def test_batch_with_changed_rows_cannot_be_rebuilt(settings, bus, store, trainer):
    run_stages(settings, bus, store, 1, 4)
    trainer.update("sft")
    manifest = read_manifests(bus)[0]
    assert len(rebuild_batch(store, manifest).rows) == len(manifest.record_ids)
    with store.open_write_session() as connection:
        connection.execute("UPDATE raw.critiques SET final_response = 'changed'")
        connection.execute("UPDATE raw.revisions SET final_response = 'changed'")
    with pytest.raises(CharterError, match="cannot be rebuilt"):
        rebuild_batch(store, manifest)


def test_combined_objective_records_its_chains_in_the_manifest(settings, bus, store, tiny):
    combined = settings.model_copy(
        update={"train": settings.train.model_copy(update={"objective": "combined", "allow_overlap": True})}
    )
    run_stages(combined, bus, store, 1, 6)
    trainer = Trainer(bus, store, combined, tiny)
    trainer.update("reward")
    sink_all(bus, store)
    update = trainer.update("ppo")
    assert read_manifests(bus)[-1].sl_record_ids and "sl_loss" in update.metrics
    trainer.close()


def test_dpo_replaces_reward_model_and_ppo(settings, bus, store, tiny):
    dpo_settings = settings.model_copy(update={"train": settings.train.model_copy(update={"rl_method": "dpo"})})
    run_stages(dpo_settings, bus, store, 1, 6)
    trainer = Trainer(bus, store, dpo_settings, tiny)
    assert trainer.next_phase() == "sft" and trainer.update("sft").version == 1
    sink_all(bus, store)
    assert trainer.next_phase() == "dpo"
    update = trainer.update("dpo")
    assert (update.kind, update.version, update.base_version) == (PolicyKind.POLICY, 2, 1)
    assert read_manifests(bus)[-1].reference_policy_version == 1 and "rewards/margins" in update.metrics
    assert len(rebuild_batch(store, read_manifests(bus)[-1]).rows) == 6
    sink_all(bus, store)
    assert trainer.next_phase() is None
    trainer.close()


def test_checkpoints_are_named_by_version_and_contain_no_pickles(settings, bus, store, trainer):
    run_stages(settings, bus, store, 1, 4)
    trainer.update("sft")
    folder = settings.folder / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["policy-000001"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    shutil.rmtree(folder)


def test_checkpoint_is_copied_to_a_url_before_the_policy_is_published(settings, bus, store, tiny, tmp_path):
    url = f"memory://{tmp_path.name}/copies"
    copied = settings.model_copy(update={"train": settings.train.model_copy(update={"checkpoint_url": url})})
    run_stages(copied, bus, store, 1, 4)
    trainer = Trainer(bus, store, copied, tiny)
    update = trainer.update("sft")
    trainer.close()
    assert update.uri == f"{url}/policy-000001"
    fetched = fetch_checkpoint(update.uri, tmp_path / "responder" / "checkpoints", update.content_hash)
    assert fetched.folder.is_relative_to(tmp_path / "responder") and fetched.manifest["batch_id"] == update.batch_id


def test_loop_waits_for_an_unreachable_log_and_resolves_an_uncertain_commit(settings, bus, store, tiny, monkeypatch):
    """The commit of an update is uncertain but succeeded: the update is not published again, nor its batch trained again."""
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.02))
    run_stages(settings, bus, store, 1, 4)
    trained_batches = []

    def learn(_, batch):
        trained_batches.append(batch.manifest.record_id)
        return (lambda folder: (folder / "fake.txt").write_text("fake")), {"mean_loss": 0.0}

    trainer = Trainer(bus, store, settings, tiny, learners=dict.fromkeys(phases.PHASES, learn))
    stop, errors = threading.Event(), [BusUnreachable("the log is unreachable"), None]
    next_phase, commit = trainer.next_phase, trainer.log.writer.commit

    def patched_next_phase(state):
        if errors and (error := errors.pop(0)):
            raise error
        if read_updates(bus):
            stop.set()
            return None
        return next_phase(state)

    def patched_commit(outputs, *arguments, **more):
        commit(outputs, *arguments, **more)
        if any(message.topic == PolicyUpdate.topic for message in outputs):
            raise CommitUncertain("the response was lost")

    monkeypatch.setattr(trainer, "next_phase", patched_next_phase)
    trainer.log.writer.commit = patched_commit
    trainer.run_loop(stop)
    trainer.close()
    assert len(trained_batches) == len(read_updates(bus)) == len(read_manifests(bus)) == 1


class CountingBus:
    """Counts the calls that reach a bus."""

    def __init__(self, bus):
        self.bus, self.calls = bus, Counter()

    def __getattr__(self, name):
        method = getattr(self.bus, name)

        def count_call(*arguments, **keywords):
            self.calls[name] += 1
            return method(*arguments, **keywords)

        return count_call


def test_idle_tick_asks_the_log_once(settings, bus, store, tiny):
    run_stages(settings, bus, store, 1, 8)
    trainer = Trainer(bus, store, settings, tiny, monitor=lambda *_: None)
    trainer.update("sft")
    trainer.update("reward")
    sink_all(bus, store)
    trainer.run_tick()
    trainer.log.tail.bus = counting = CountingBus(bus)
    trainer.next_monitor_at = 0.0
    assert not trainer.run_tick()
    assert counting.calls == {"end_offsets": 1}
    assert trainer.read_state() is trainer.read_state()  # computed again only when the log has grown
    trainer.close()
