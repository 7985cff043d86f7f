"""The loop with FAKE learners: trips and going back, batches that are given up, the gate, pauses, bounds after a crash."""

import shutil
import sys
import threading
import types

import pytest

from charter.connect import connect_bus, open_store
from charter.models import LatestPolicyProcessor
from charter.training import MetricsReporter
from consumers.sink import Sink
from engine.bus.read import read_values
from engine.errors import TrainingFailed, UsageError
from engine.policy import make_restore_update, read_policy_updates
from engine.settings import load_settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import (
    BatchManifest,
    EndReason,
    FinishReason,
    Incident,
    ModelRef,
    Pause,
    PolicyKind,
    PolicyUpdate,
    Prompt,
    Round,
    Split,
)
from tests.chaos.crash_points import FAKE_LEARNERS, make_settings, run_fake_update
from tests.support.records import make_chain_end, make_preference, make_record_fields, make_response, make_revision
from trainer import loop
from trainer.batches import rebuild_batch
from trainer.loop import Trainer
from trainer.monitor import LimitExceeded
from trainer.promotion import PromotionGate


class Place:
    """A data folder with a trainer; what is added is in the database at once."""

    def __init__(self, folder, **more):
        (folder / "base").mkdir(parents=True)
        settings = make_settings(folder)
        train = settings.train.model_copy(update={"sft_mixture": [], "reward_mixture": []} | more)
        self.settings = settings.model_copy(update={"train": train})
        self.bus, self.store, self.said = connect_bus(self.settings), open_store(self.settings), []
        self.trainer = self.open()

    def open(self, **more):
        base_folder = self.settings.folder / "base"
        values = {"learners": FAKE_LEARNERS, "notify": self.said.append} | more
        return Trainer(self.bus, self.store, self.settings, base_folder, **values)

    def add(self, *records):
        self.bus.publish([to_producer_record(record) for record in records])
        sink = Sink(self.bus, self.store, max_wait_s=0.05)
        while sink.step():
            pass
        sink.close()

    def chains(self, name, count=4):
        self.add(*(make_chain_end(f"{name}{n}", f"chain {name} {n}") for n in range(count)))

    def labels(self, name, count=4):
        self.add(*(make_preference(f"{name}{n}", f"pair {name} {n}", 0.7) for n in range(count)))

    def answers(self, name, count=4):
        """Answers of the present policy."""
        standing = self.trainer.read_state()
        version = standing.policy_version
        about = {"model": ModelRef(id="policy", revision=standing.model_revisions[version]), "policy_version": version}
        made = [make_response(f"answer {name} {n}") for n in range(count)]
        first = {"policy_version": version}
        self.add(*(r.model_copy(update=about | {"completions": [r.completions[0].model_copy(update=first)]}) for r in made))

    def records(self, record):
        return [decode_record(value, record) for value in read_values(self.bus, record.topic)]

    def policies(self):
        return [(u.version, u.phase, u.restored_version) for u in read_policy_updates(self.bus) if u.kind.value == "POLICY"]

    def close(self):
        self.trainer.close()
        self.bus.close()


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path / "data")
    yield made
    made.close()


def until(trainer, done):
    """Run the loop until something holds; it looks every moment."""
    stop = threading.Event()
    real = trainer.next_phase

    def due():
        if done():
            stop.set()
            return None
        return real()

    trainer.next_phase = due
    trainer.run_loop(stop)
    trainer.next_phase = real


def at_rl(place):
    """Policy 1 from SFT, reward model 1, policies 2 and 3 from PPO."""
    place.chains("a")
    place.labels("a")
    place.trainer.update("sft")
    place.trainer.update("reward")
    for name in "ab":
        place.answers(name)
        place.trainer.update("ppo")


def test_a_trip_pauses_rl_goes_back_and_writes_an_incident(place, monkeypatch):
    monkeypatch.setattr(loop, "POLL_INTERVAL_S", 0.01)
    at_rl(place)
    trips = [LimitExceeded("it likes length", "answers grew", {"length_correlation": 0.9}, rollback_version=2)]
    place.trainer.monitor = lambda trainer: trips.pop() if trips and trainer.read_state().policy_version == 3 else None
    place.answers("c")  # enough for another PPO, which must not come
    until(place.trainer, lambda: not trips and "ppo" in place.trainer.get_paused_phases())
    assert place.policies() == [(1, "sft", None), (2, "ppo", None), (3, "ppo", None), (4, "restore", 2)]
    (incident,) = [i for i in place.records(Incident) if i.voided_batch_id is None]
    assert (incident.title, incident.detail, incident.metrics) == (
        "it likes length",
        "answers grew",
        {"length_correlation": 0.9},
    )
    assert "charter policy resume" in place.said[-1] and "policy 4 has the weights of policy 2" in place.said[-1]
    assert place.trainer.read_state().policy_ancestry == (4, 2, 1)
    assert place.trainer.next_phase() is None  # PPO is paused, and answers of policy 3 are of no use
    place.answers("d")
    place.labels("d")
    assert place.trainer.next_phase() == "reward"  # the other phases go on
    place.trainer.update("reward")
    pause = place.records(Pause)[-1]
    place.add(pause.model_copy(update={"paused": False}))
    assert place.trainer.next_phase() == "ppo" and place.trainer.update("ppo").base_version == 4
    drops = dict(place.store.query("SELECT reason, rollouts FROM dropped_rollout_stats").rows)
    assert drops == {}  # they are on the log, and in the database a moment later
    place.add()
    drops = dict(place.store.query("SELECT reason, rollouts FROM dropped_rollout_stats").rows)
    assert drops == {"sampled by a policy that was rolled back": 4}
    assert place.store.query("SELECT max(policies_behind) FROM trained_rollouts").rows == [(0,)]


def test_a_batch_that_cannot_be_trained_on_is_given_up_and_its_rows_are_free(place):
    def fail(trainer, batch):
        raise TrainingFailed("the loss is nan", "it ran away", "lower it")

    place.chains("a")
    place.trainer.learners = dict.fromkeys(loop.PHASES, fail)
    with pytest.raises(TrainingFailed):
        place.trainer.update("sft")
    (incident,) = place.records(Incident)
    assert incident.title == "the loss is nan" and incident.voided_batch_id is not None and place.policies() == []
    assert place.trainer.resume() is None and place.trainer.next_phase() is None  # it does not spin
    place.chains("b", 3)
    assert place.trainer.next_phase() is None
    place.chains("c", 1)
    assert place.trainer.next_phase() == "sft"  # a threshold of further rows has come
    place.trainer.learners = FAKE_LEARNERS
    update = place.trainer.update("sft")
    place.add()
    assert place.store.query("SELECT trained_rows FROM policy_versions WHERE version = ?", [update.version]).rows == [(8,)]
    assert place.store.query("SELECT count(*) FROM batch_rows WHERE given_up").rows == [(4,)]


def test_a_batch_is_given_up_when_someone_goes_back_meanwhile(place):
    at_rl(place)

    def overtaken(trainer, batch):
        known = read_policy_updates(place.bus)
        place.bus.publish([to_producer_record(make_restore_update(known, 1, run_id="r", base_model="base"))])
        return run_fake_update(trainer, batch)

    place.answers("c")
    place.trainer.learners = dict.fromkeys(loop.PHASES, overtaken)
    with pytest.raises(Exception, match="policy 4 was published meanwhile"):
        place.trainer.update("ppo")
    assert place.policies()[-1] == (4, "restore", 1) and len(place.policies()) == 4
    assert not (place.settings.folder / "checkpoints" / "policy-000004").exists()
    assert place.trainer.resume() is None


def test_the_gate_keeps_a_policy_back_and_frees_its_batch(place):
    place.chains("a")
    place.trainer.promotion_gate = lambda store, folder, version: LimitExceeded("it did not pass the gate", "it refuses all")
    with pytest.raises(Exception, match="policy 1 is not published: it did not pass the gate"):
        place.trainer.update("sft")
    assert place.policies() == [] and not (place.settings.folder / "checkpoints" / "policy-000001").exists()
    place.trainer.promotion_gate = lambda store, folder, version: None
    assert place.trainer.update("sft").version == 1


def test_the_gate_asks_held_out_prompts_of_the_new_policy(tiny, place):
    asked = [f"how do i {n}" for n in range(8)]
    place.add(
        *(
            Prompt(**make_record_fields("produce", [source, text], f"{source} {text}", split=Split.EVAL) | {"source": source})
            for source in ("red-team", "helpful")
            for text in asked
        )
    )
    limits = load_settings({"promotion.prompts": "8"}, environment={})[0].promotion
    trip = PromotionGate(limits)(place.store, tiny, 1)
    assert trip.metrics == {"refusal_benign": 0.0, "refusal_harmful": 0.0}  # a random model refuses nothing
    assert trip.detail == "it refuses only 0% of harmful prompts (promotion.min_harmful_refusals)"
    assert PromotionGate(limits.model_copy(update={"min_harmful_refusals": 0.0}))(place.store, tiny, 1) is None


def test_an_unfinished_batch_of_old_rollouts_is_given_up_after_a_crash(tmp_path):
    place = Place(tmp_path / "data", max_age_s=30.0)
    at_rl(place)
    place.answers("c")

    def die(trainer, batch):
        raise KeyboardInterrupt

    place.trainer.learners = dict.fromkeys(loop.PHASES, die)
    with pytest.raises(KeyboardInterrupt):
        place.trainer.update("ppo")
    with place.store.open_write_session() as connection:  # as if an hour had passed
        connection.execute("UPDATE raw.responses SET created_at = created_at - INTERVAL 1 HOUR")
    place.trainer = place.open()
    assert place.trainer.resume() is None and "left unfinished and is given up" in place.records(Incident)[-1].title
    assert place.trainer.next_phase() is None
    place.add()
    reasons = [reason for (reason,) in place.store.query("SELECT reason FROM dropped_rollout_stats").rows]
    assert reasons == ["older than 30 s"]
    place.close()


def test_pauses_hold_an_unfinished_batch_too(place):
    place.chains("a")
    place.trainer.learners = dict.fromkeys(loop.PHASES, lambda trainer, batch: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        place.trainer.update("sft")
    place.add(made_pause(True))
    again = place.open()
    assert again.resume() is None and again.next_phase() is None
    place.add(made_pause(False))
    assert again.resume().version == 1
    again.close()


def test_a_batch_left_by_a_paused_phase_does_not_hide_another_one_nor_is_it_forgotten(place, monkeypatch):
    """Killed in SFT, which is then paused; killed again in the reward phase; SFT goes on while the loop runs."""
    monkeypatch.setattr(loop, "POLL_INTERVAL_S", 0.01)
    place.chains("a")
    place.labels("a")

    def die(trainer, batch):
        raise KeyboardInterrupt

    place.trainer.learners = dict.fromkeys(loop.PHASES, die)
    for phase in ("sft", "reward"):
        with pytest.raises(KeyboardInterrupt):
            place.trainer.update(phase)
    of_sft, of_reward = place.records(BatchManifest)
    place.add(made_pause(True))
    place.trainer = place.open()
    assert place.trainer.resume().batch_id == of_reward.record_id
    place.chains("b")  # rows that a new batch would take too
    paused = iter([made_pause(False)])
    until(
        place.trainer, lambda: [place.bus.publish([to_producer_record(one)]) for one in paused] == [] and place.policies() != []
    )
    assert [update.batch_id for update in read_policy_updates(place.bus)] == [of_reward.record_id, of_sft.record_id]


def made_pause(on):
    from engine.policy import make_pause

    return make_pause("sft", "looking", run_id="r", paused=on)


def test_checkpoints_in_use_outlive_the_others(place):
    at_rl(place)
    for name in "cd":
        place.answers(name)
        place.trainer.update("ppo")
    kept = sorted(path.name for path in (place.settings.folder / "checkpoints").iterdir())
    # The reference, the newest (train.save_total_limit = 1) and where a rollback leads to, the reward model.
    assert kept == ["policy-000001", "policy-000004", "policy-000005", "reward-000001"]


def test_a_trip_whose_good_policy_is_gone_goes_back_to_the_reference(place):
    at_rl(place)
    shutil.rmtree(place.settings.folder / "checkpoints" / "policy-000002")
    assert place.trainer.trigger_rollback(LimitExceeded("it flatters", "", rollback_version=2)).restored_version == 1


def test_a_role_that_follows_takes_the_newest_model_at_each_batch():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Work:
        model: str

        def __call__(self, records):
            return [[self.model] for _ in records]

    versions = iter([("first", 0), ("second", 1)])
    following = LatestPolicyProcessor(Work("pinned"), lambda: next(versions))
    assert following([1, 2]) == [["first"], ["first"]] and following([3]) == [["second"]]


def test_numbers_go_to_the_tracker_that_is_asked_for(monkeypatch, capsys):
    logged = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **about: logged.append(about) or run)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    numbers = MetricsReporter(load_settings({"train.report_to": "trackio"}, environment={})[0])
    numbers.report_step("reward", 3, {"loss": 0.25, "epoch": 1.0})
    made = PolicyUpdate(
        record_id=ids.compute_record_id("train", [], "1"), run_id="live", stage="train", kind=PolicyKind.REWARD, version=1,
        phase="reward", uri="/x", content_hash="", base_version=0, batch_id=ids.compute_record_id("batch", [], "1"),
        metrics={"loss": 0.25, "reward/accuracy": 0.75, "wall_s": 2.0},
    )  # fmt: skip
    numbers.report_update(made)
    numbers.close()
    about, step = {"project": "charter", "name": "live"}, {"reward/loss": 0.25, "reward/epoch": 1.0}
    assert logged == [about, step, {"reward/accuracy": 0.75, "reward/wall_s": 2.0}, "finished"]
    assert capsys.readouterr().out.splitlines() == [
        "phase=reward step=3 loss=0.25",
        "reward 1 from reward: /x",
        "phase=reward version=1 reward/accuracy=0.75 wall_s=2",
    ]
    with pytest.raises(UsageError, match="needs wandb"):
        MetricsReporter(load_settings({"train.report_to": "wandb"}, environment={})[0])


def test_sft_learns_the_rounds_that_are_chosen(place):
    def chain(name, ended, last, **more):
        """A chain whose revisions were r1 ... r`last`."""
        texts = [f"{name} r{n + 1}" for n in range(last)]
        rounds = [Round(round=n + 1, principle_id="p", critique="c", revision=text) for n, text in enumerate(texts)]
        chain_of = {"response_id": ids.compute_id("response", name)}
        for n, text in enumerate(texts):
            place.add(
                make_revision(name, name, "f", text, 0.5, round=n + 1).model_copy(
                    update={"finish_reason": FinishReason.STOP if n else FinishReason.LENGTH}
                )
            )
        place.add(
            make_chain_end(name, name).model_copy(
                update=chain_of | {"rounds": rounds, "round": last, "end_reason": ended} | more
            )
        )

    chain("done", EndReason.LAST_ROUND, 3, final_response="done r3", final_finish_reason=FinishReason.STOP)
    chain("lost", EndReason.LOST, 2, final_response="lost r1")
    chain("clean", EndReason.SATISFIED, 0, final_response="clean f", final_finish_reason=FinishReason.STOP)
    chosen = place.settings.sft.model_copy(update={"rounds": [1, 2]})
    place.trainer.settings = place.settings.model_copy(update={"sft": chosen})
    place.trainer.update("sft")
    (manifest,) = place.records(BatchManifest)
    rows = rebuild_batch(place.store, manifest).rows
    assert sorted((row["completion"], row["finish_reason"]) for row in rows) == [
        ("clean f", "STOP"),
        ("done r1", "UNKNOWN"),
        ("done r2", "STOP"),
        ("lost r1", "UNKNOWN"),  # its second revision lost against the first
    ]
    assert [row["completion"] for row in rows if row["completion"].startswith("done")] == ["done r1", "done r2"]
    assert len(manifest.record_ids) == 3 and manifest.mixture == {"test": 4}


def replays(place, share, **train):
    """Let the trainer replay this share of earlier labels from here on."""
    changed = {
        "reward": place.settings.reward.model_copy(update={"replay_ratio": share}),
        "train": place.settings.train.model_copy(update=train),
    }
    place.trainer.settings = place.settings.model_copy(update=changed)


def test_a_reward_model_trains_on_earlier_labels_again_beside_the_new_ones(place):
    """They are named in the manifest, move no cursor, and are drawn afresh for each batch."""
    replays(place, 1.0)
    for name in ("first", "second", "third"):
        place.labels(name)
        place.trainer.update("reward")
    first, second, third = place.records(BatchManifest)
    assert first.replayed_record_ids == [] and set(second.replayed_record_ids) == set(first.record_ids)
    new = [set(m.record_ids) - set(m.replayed_record_ids) for m in (first, second, third)]
    assert [len(rows) for rows in new] == [4, 4, 4] and len(set.union(*new)) == 12
    assert set(third.replayed_record_ids) < new[0] | new[1] and len(third.record_ids) == 8
    assert first.commit_seq_to < second.commit_seq_from <= second.commit_seq_to < third.commit_seq_from
    assert rebuild_batch(place.store, third).manifest == third
    place.add()
    counts = "SELECT batch_number, count(*), count(*) FILTER (replayed) FROM batch_rows GROUP BY 1 ORDER BY 1"
    assert place.store.query(counts).rows == [(1, 4, 0), (2, 8, 4), (3, 8, 4)]


def test_earlier_labels_are_a_share_of_the_new_ones_within_the_largest_batch(place):
    place.labels("first", 8)
    place.trainer.update("reward")
    replays(place, 0.5)
    for name in ("second", "third"):
        place.labels(name)
        place.trainer.update("reward")
    _, second, third = place.records(BatchManifest)
    assert [len(m.replayed_record_ids) for m in (second, third)] == [2, 2]
    replays(place, 1.0, max_rows=5)
    place.labels("fourth")
    place.trainer.update("reward")
    *_, fourth = place.records(BatchManifest)
    assert len(fourth.record_ids) == 5 and len(fourth.replayed_record_ids) == 1
