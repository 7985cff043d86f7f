"""The trainer's loop: cursors, versions, and a crash at every step that resumes with the identical batch."""

import shutil
import threading

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
from engine.settings import load_settings
from engine.worker import ModelExecutor, Worker
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record
from schemas.records import BatchManifest, DroppedRollout, PolicyKind, PolicyUpdate, Score
from trainer import loop, phases
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
    opened = connect_bus(settings)
    yield opened
    opened.close()


@pytest.fixture
def store(settings):
    return open_store(settings)


def stream(settings, bus, store, first, last):
    """Send shipped prompts through every stage until all of them are in the database."""
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), first_row=first, last_row=last)
    models, lane, constitution = (
        RoleModels(settings),
        ModelExecutor("tiny", downstream_wait_s=0.02),
        load_constitution("default"),
    )
    workers = [
        Worker(bus, make_stage(name, settings, models, constitution, bus), lane, run_id="live", instance="t") for name in STAGES
    ]
    with Host(workers, {"sink": Sink(bus, store, max_wait_s=0.05).run}) as host:
        sql = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
                 AND prompt_id IN (SELECT prompt_id FROM preferences)"""
        while store.query(sql, limit_s=10.0).rows[0][0] < last:
            host.raise_if_failed()
            host.failure_event.wait(0.05)


def sink_all(bus, store):
    sink = Sink(bus, store, max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()


@pytest.fixture
def trainer(settings, bus, store, tiny):
    made = Trainer(bus, store, settings, tiny)
    yield made
    made.close()


def manifests(bus):
    return [decode_record(value, BatchManifest) for value in read_values(bus, "batches")]


def updates(bus):
    return [decode_record(value, PolicyUpdate) for value in read_values(bus, "policies")]


def test_the_phases_alternate_and_rows_train_once(settings, bus, store, trainer):
    stream(settings, bus, store, 1, 8)
    assert trainer.next_phase() == "sft"
    assert trainer.update("sft").version == 1
    assert trainer.next_phase() == "reward"
    assert trainer.update("reward").kind is PolicyKind.REWARD
    sink_all(bus, store)
    assert trainer.next_phase() is None  # rollouts of the old policy, and prompts of the reward model, are not PPO's
    with pytest.raises(UsageError, match="nothing new"):
        trainer.update("ppo")
    with pytest.raises(UsageError, match="nothing new for sft"):
        trainer.update("sft")
    stream(settings, bus, store, 9, 16)
    assert trainer.next_phase() in ("sft", "reward", "ppo")
    versions = store.query("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1").rows
    assert versions == [(0, 8), (1, 8)]
    update = trainer.update("ppo")
    assert (update.version, update.phase, update.base_version) == (2, "ppo", 1)
    scores = [decode_record(value, Score) for value in read_values(bus, "scores")]
    assert len(scores) == 16 and {s.reward_version for s in scores} == {1}
    drops = [decode_record(value, DroppedRollout) for value in read_values(bus, "dropped-rollouts")]
    assert {d.reason for d in drops} == {"sampled before the last supervised update"} and len(drops) == 16
    assert [m.phase for m in manifests(bus)] == ["sft", "reward", "ppo"]
    assert manifests(bus)[2].reference_policy_version == 1
    kept = {(m.phase, i) for m in manifests(bus) for i in m.record_ids}
    assert len(kept) == sum(len(m.record_ids) for m in manifests(bus))
    for manifest in manifests(bus):
        assert {str(r[KEY_COLUMNS[manifest.phase]]) for r in rebuild_batch(store, manifest).rows} == set(manifest.record_ids)
    sink_all(bus, store)
    numbers = (
        "SELECT metric, batch_number, step FROM training_steps WHERE metric IN ('approx_kl', 'reward/accuracy', 'reward_mean')"
    )
    assert sorted(store.query(numbers).rows)[0] == ("approx_kl", 3, 1)  # of each step, and of no whole update
    assert {row for row in store.query(numbers).rows if row[2] is None} == {
        ("reward/accuracy", 2, None),
        ("reward_mean", 3, None),
    }


@pytest.mark.parametrize("crash_at", ["learn", "write", "publish"])
def test_a_crash_resumes_with_the_identical_batch(settings, bus, store, tiny, monkeypatch, crash_at):
    stream(settings, bus, store, 1, 4)
    trained = []
    real = phases.learn_sft

    def learn(trainer, batch):
        trained.append([str(row["record_id"]) for row in batch.rows])
        if crash_at == "learn" and len(trained) == 1:
            raise KeyboardInterrupt
        return real(trainer, batch)

    monkeypatch.setitem(loop.LEARNERS, "sft", learn)
    trainer = Trainer(bus, store, settings, tiny)
    if crash_at == "write":
        monkeypatch.setattr(loop, "write_checkpoint", interrupt)
    if crash_at == "publish":
        publish = trainer.publish
        trainer.publish = lambda records: interrupt() if isinstance(records[0], PolicyUpdate) else publish(records)
    with pytest.raises(KeyboardInterrupt):
        trainer.update("sft")
    assert updates(bus) == [] and len(manifests(bus)) == 1
    if crash_at == "write":
        monkeypatch.setattr(loop, "write_checkpoint", checkpoints.write_checkpoint)
    again = Trainer(bus, store, settings, tiny)
    update = again.resume()
    assert update.version == 1 and update.batch_id == manifests(bus)[0].record_id and len(manifests(bus)) == 1
    assert len({tuple(rows) for rows in trained}) == 1
    assert len(trained) == (1 if crash_at == "publish" else 2)  # a finished checkpoint is not trained again
    assert again.resume() is None
    with pytest.raises(WriterFenced):
        trainer.writer.commit([])
    again.close()


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_is_not_trained_from(settings, bus, store, trainer):
    stream(settings, bus, store, 1, 4)
    update = trainer.update("sft")
    sink_all(bus, store)
    weights = next((settings.folder / "checkpoints" / "policy-000001").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CharterError, match="damaged"):
        trainer.get_policy_folder(update.version)


def test_ppo_needs_a_reward_model_and_rows(settings, bus, store, trainer):
    stream(settings, bus, store, 1, 2)
    with pytest.raises(UsageError, match="needs a reward model"):
        trainer.update("ppo")
    assert trainer.next_phase() is None  # two rows are below every threshold


def test_a_batch_whose_rows_have_changed_is_not_rebuilt(settings, bus, store, trainer):
    stream(settings, bus, store, 1, 4)
    trainer.update("sft")
    manifest = manifests(bus)[0]
    assert len(rebuild_batch(store, manifest).rows) == len(manifest.record_ids)
    with store.open_write_session() as connection:
        connection.execute("UPDATE raw.critiques SET final_response = 'changed'")
        connection.execute("UPDATE raw.revisions SET final_response = 'changed'")
    with pytest.raises(CharterError, match="cannot be rebuilt"):
        rebuild_batch(store, manifest)


def test_the_combined_objective_has_its_chains_in_the_manifest(settings, bus, store, tiny):
    combined = settings.model_copy(
        update={"train": settings.train.model_copy(update={"objective": "combined", "allow_overlap": True})}
    )
    stream(combined, bus, store, 1, 6)
    trainer = Trainer(bus, store, combined, tiny)
    trainer.update("reward")
    sink_all(bus, store)
    update = trainer.update("ppo")
    assert manifests(bus)[-1].sl_record_ids and "sl_loss" in update.metrics
    trainer.close()


def test_dpo_takes_the_place_of_reward_model_and_ppo(settings, bus, store, tiny):
    chosen = settings.model_copy(update={"train": settings.train.model_copy(update={"rl_method": "dpo"})})
    stream(chosen, bus, store, 1, 6)
    trainer = Trainer(bus, store, chosen, tiny)
    assert trainer.next_phase() == "sft" and trainer.update("sft").version == 1
    sink_all(bus, store)
    assert trainer.next_phase() == "dpo"
    update = trainer.update("dpo")
    assert (update.kind, update.version, update.base_version) == (PolicyKind.POLICY, 2, 1)
    assert manifests(bus)[-1].reference_policy_version == 1 and "rewards/margins" in update.metrics
    assert len(rebuild_batch(store, manifests(bus)[-1]).rows) == 6
    sink_all(bus, store)
    assert trainer.next_phase() is None
    trainer.close()


def test_checkpoints_are_named_by_version_and_hold_no_pickles(settings, bus, store, trainer):
    stream(settings, bus, store, 1, 4)
    trainer.update("sft")
    folder = settings.folder / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["policy-000001"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    shutil.rmtree(folder)


def test_the_loop_waits_for_a_log_that_is_away_and_settles_a_commit_in_doubt(settings, bus, store, tiny, monkeypatch):
    """The update's publication is in doubt although it landed: it is not published again, nor is its batch trained again."""
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.02))
    stream(settings, bus, store, 1, 4)
    trained = []

    def learn(_, batch):
        trained.append(batch.manifest.record_id)
        return (lambda folder: (folder / "fake.txt").write_text("fake")), {"mean_loss": 0.0}

    trainer = Trainer(bus, store, settings, tiny, learners=dict.fromkeys(loop.PHASES, learn))
    stop, troubles = threading.Event(), [BusUnreachable("away"), None]
    real_due, real_commit = trainer.next_phase, trainer.writer.commit

    def due():
        if troubles and (trouble := troubles.pop(0)):
            raise trouble
        if updates(bus):
            stop.set()
            return None
        return real_due()

    def commit(outputs, *arguments, **more):
        real_commit(outputs, *arguments, **more)
        if any(message.topic == PolicyUpdate.topic for message in outputs):
            raise CommitUncertain("the answer was lost")

    monkeypatch.setattr(trainer, "next_phase", due)
    trainer.writer.commit = commit
    trainer.run_loop(stop)
    trainer.close()
    assert len(trained) == len(updates(bus)) == len(manifests(bus)) == 1
