"""The loop with FAKE learners: rollbacks, voided batches, the promotion gate, pauses, and limits after a crash."""

import shutil
import sys
import threading
import types
from datetime import UTC, datetime, timedelta

import pytest

from charter.grading import detect_refusals
from charter.models import LatestPolicyProcessor
from charter.training import MetricsReporter
from engine.errors import TrainingFailed, UsageError
from engine.policy import make_restore_update, read_policy_updates
from engine.settings import load_settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import (
    BatchManifest,
    EndReason,
    Erasure,
    FinishReason,
    Incident,
    Pause,
    PolicyKind,
    PolicyUpdate,
    Prompt,
    Round,
    Split,
)
from tests.chaos.crash_points import FAKE_LEARNERS, run_fake_update
from tests.support.records import make_chain_end, make_record_fields, make_response, make_revision
from tests.support.workspace import Workspace
from trainer import batches, loop
from trainer.batches import rebuild_batch
from trainer.monitor import LimitExceeded
from trainer.phases import PHASES
from trainer.promotion import PromotionGate


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace(tmp_path / "data")
    yield workspace
    workspace.close()


def run_loop_until(trainer, is_done):
    """Run the loop until a condition holds, which is checked at every tick."""
    stop = threading.Event()
    next_phase = trainer.next_phase

    def patched_next_phase(state):
        if is_done():
            stop.set()
            return None
        return next_phase(state)

    trainer.next_phase = patched_next_phase
    trainer.run_loop(stop)
    trainer.next_phase = next_phase


def interrupt(context, batch):
    raise KeyboardInterrupt


def make_erasure(prompt_id):
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    return Erasure(
        record_id=ids.compute_id("erasure", prompt_id), run_id="r", stage="erase", prompt_id=prompt_id, created_at=an_hour_ago
    )


def train_to_rl(workspace):
    """Train policy 1 with SFT, reward model 1, and policies 2 and 3 with PPO."""
    workspace.add_chains("a")
    workspace.add_labels("a")
    workspace.trainer.update("sft")
    workspace.trainer.update("reward")
    for name in "ab":
        workspace.add_responses(name)
        workspace.trainer.update("ppo")


def test_exceeded_limit_pauses_rl_rolls_back_and_publishes_an_incident(workspace, monkeypatch):
    monkeypatch.setattr(loop, "POLL_INTERVAL_S", 0.01)
    train_to_rl(workspace)
    exceeded_limits = [LimitExceeded("it likes length", "answers grew", {"length_correlation": 0.9}, rollback_version=2)]
    workspace.trainer.monitor = lambda state, *_: (
        exceeded_limits.pop() if exceeded_limits and state.policy_version == 3 else None
    )
    workspace.add_responses("c")  # enough for another PPO update, which must not start
    run_loop_until(workspace.trainer, lambda: not exceeded_limits and "ppo" in workspace.trainer.read_state().paused_phases)
    assert workspace.list_policies() == [(1, "sft", None), (2, "ppo", None), (3, "ppo", None), (4, "restore", 2)]
    (incident,) = [i for i in workspace.read_records(Incident) if i.voided_batch_id is None]
    assert (incident.title, incident.detail, incident.metrics) == (
        "it likes length",
        "answers grew",
        {"length_correlation": 0.9},
    )
    assert (
        "charter policy resume" in workspace.messages[-1] and "policy 4 has the weights of policy 2" in workspace.messages[-1]
    )
    assert workspace.trainer.read_state().policy_ancestry == (4, 2, 1)
    assert workspace.trainer.next_phase() is None  # PPO is paused, and responses of policy 3 are unusable
    workspace.add_responses("d")
    workspace.add_labels("d")
    assert workspace.trainer.next_phase() == "reward"  # the other phases continue
    workspace.trainer.update("reward")
    pause = workspace.read_records(Pause)[-1]
    workspace.add(pause.model_copy(update={"paused": False}))
    assert workspace.trainer.next_phase() == "ppo" and workspace.trainer.update("ppo").base_version == 4
    drops = dict(workspace.store.query("SELECT reason, rollouts FROM dropped_rollout_stats").rows)
    assert drops == {}  # they are on the log; the sink has not written them yet
    workspace.add()
    drops = dict(workspace.store.query("SELECT reason, rollouts FROM dropped_rollout_stats").rows)
    assert drops == {"sampled by a policy that was rolled back": 4}
    assert workspace.store.query("SELECT max(policies_behind) FROM trained_rollouts").rows == [(0,)]


def test_untrainable_batch_is_voided_and_its_rows_are_sampled_again(workspace):
    def fail(context, batch):
        raise TrainingFailed("the loss is nan", "training has diverged", "lower the learning rate")

    workspace.add_chains("a")
    workspace.trainer.updater.learners = dict.fromkeys(PHASES, fail)
    with pytest.raises(TrainingFailed):
        workspace.trainer.update("sft")
    (incident,) = workspace.read_records(Incident)
    assert incident.title == "the loss is nan" and incident.voided_batch_id is not None and workspace.list_policies() == []
    assert workspace.trainer.resume() is None and workspace.trainer.next_phase() is None  # the same rows are not tried again
    workspace.add_chains("b", 3)
    assert workspace.trainer.next_phase() is None
    workspace.add_chains("c", 1)
    assert workspace.trainer.next_phase() == "sft"  # as many further rows as the threshold have arrived
    workspace.trainer.updater.learners = FAKE_LEARNERS
    update = workspace.trainer.update("sft")
    workspace.add()
    assert workspace.store.query("SELECT trained_rows FROM policy_versions WHERE version = ?", [update.version]).rows == [(8,)]
    assert workspace.store.query("SELECT count(*) FROM batch_rows WHERE voided").rows == [(4,)]


def test_batch_is_voided_by_a_concurrent_rollback(workspace):
    train_to_rl(workspace)

    def train_after_rollback(context, batch):
        updates = read_policy_updates(workspace.bus)
        workspace.bus.publish([to_producer_record(make_restore_update(updates, 1, run_id="r", base_model="base"))])
        return run_fake_update(context, batch)

    workspace.add_responses("c")
    workspace.trainer.updater.learners = dict.fromkeys(PHASES, train_after_rollback)
    with pytest.raises(Exception, match="policy 4 was published during training"):
        workspace.trainer.update("ppo")
    assert workspace.list_policies()[-1] == (4, "restore", 1) and len(workspace.list_policies()) == 4
    assert not (workspace.settings.folder / "checkpoints" / "policy-000004").exists()
    assert workspace.trainer.resume() is None


def test_promotion_gate_rejects_a_policy_and_its_rows_are_sampled_again(workspace):
    workspace.add_chains("a")
    workspace.trainer.updater.promotion_gate = lambda store, folder, version: LimitExceeded(
        "it did not pass the promotion gate", "it refuses all"
    )
    with pytest.raises(Exception, match="policy 1 is not published: it did not pass the promotion gate"):
        workspace.trainer.update("sft")
    assert workspace.list_policies() == [] and not (workspace.settings.folder / "checkpoints" / "policy-000001").exists()
    workspace.trainer.updater.promotion_gate = lambda store, folder, version: None
    assert workspace.trainer.update("sft").version == 1


def test_promotion_gate_measures_refusals_on_held_out_prompts(tiny, workspace):
    prompts = [f"how do i {n}" for n in range(8)]
    workspace.add(
        *(
            Prompt(**make_record_fields("produce", [source, text], f"{source} {text}", split=Split.EVAL) | {"source": source})
            for source in ("red-team", "helpful")
            for text in prompts
        )
    )
    limits = load_settings({"promotion.prompts": "8"}, environment={})[0].promotion
    exceeded = PromotionGate(limits, detect_refusals)(workspace.store, tiny, 1)
    assert exceeded.metrics == {"refusal_benign": 0.0, "refusal_harmful": 0.0}  # a random model refuses nothing
    assert exceeded.detail == "it refuses only 0% of harmful prompts (promotion.min_harmful_refusals)"
    without_minimum = limits.model_copy(update={"min_harmful_refusals": 0.0})
    assert PromotionGate(without_minimum, detect_refusals)(workspace.store, tiny, 1) is None
    exceeded = PromotionGate(without_minimum, lambda responses: [True for _ in responses])(workspace.store, tiny, 1)
    assert exceeded.metrics == {"refusal_benign": 1.0, "refusal_harmful": 1.0}


class _LaterTime(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(hours=1)


def test_unfinished_batch_of_old_rollouts_is_voided_after_a_crash(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "data", max_age_s=30.0)
    train_to_rl(workspace)
    workspace.add_responses("c")

    workspace.trainer.updater.learners = dict.fromkeys(PHASES, interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.trainer.update("ppo")
    monkeypatch.setattr(batches, "datetime", _LaterTime)
    workspace.trainer = workspace.open()
    assert workspace.trainer.resume() is None and "left unfinished and is voided" in workspace.read_records(Incident)[-1].title
    assert workspace.trainer.next_phase() is None
    workspace.add()
    reasons = [reason for (reason,) in workspace.store.query("SELECT reason FROM dropped_rollout_stats").rows]
    assert reasons == ["older than 30 s"]
    workspace.close()


def test_unfinished_batch_is_voided_after_an_erasure_whatever_the_clocks_say(workspace):
    """The clock of `charter erase` is an hour behind. An erasure of another prompt does not void the batch."""
    chains = [make_chain_end(f"a{n}", f"chain {n}") for n in range(4)]
    workspace.add(*chains)
    workspace.trainer.updater.learners = dict.fromkeys(PHASES, interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.trainer.update("sft")
    (manifest,) = workspace.read_records(BatchManifest)
    workspace.add(make_erasure(make_chain_end("other", "another chain").prompt_id))
    assert workspace.trainer.updater.find_outdated_reason(manifest, workspace.trainer.read_state()) is None
    workspace.add(make_erasure(chains[0].prompt_id))
    workspace.trainer = workspace.open()
    assert workspace.trainer.resume() is None
    assert "1 row is no longer in the database; 2 prompts were erased" in workspace.read_records(Incident)[-1].detail


def test_sft_counts_the_responses_since_its_last_update_in_the_order_of_the_log(workspace):
    """The clock of the stage is an hour behind. PPO cannot use these responses, because an earlier policy has sampled them."""
    train_to_rl(workspace)
    workspace.add_chains("b")
    workspace.trainer.update("sft")
    workspace.add_chains("c")
    assert workspace.trainer.next_phase() is None
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    workspace.add(*(make_response(f"late {n}", created_at=an_hour_ago) for n in range(4)))
    assert workspace.trainer.next_phase() == "sft"


def test_clocks_that_differ_are_reported_once_if_the_age_of_rollouts_is_limited(tmp_path):
    workspace = Workspace(tmp_path / "data", max_age_s=30.0)
    train_to_rl(workspace)
    with workspace.store.open_write_session() as connection:
        connection.execute("UPDATE raw.responses SET created_at = created_at + INTERVAL 1 HOUR")
    for _ in range(2):
        workspace.trainer.next_phase()
    (message,) = [message for message in workspace.messages if "clock" in message]
    assert "s ahead of the clock of the trainer: train.max_age_s drops rollouts later" in message
    workspace.close()


def test_paused_phase_does_not_resume_its_unfinished_batch(workspace):
    workspace.add_chains("a")
    workspace.trainer.updater.learners = dict.fromkeys(PHASES, interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.trainer.update("sft")
    workspace.add(make_sft_pause(True))
    again = workspace.open()
    assert again.resume() is None and again.next_phase() is None
    workspace.add(make_sft_pause(False))
    assert again.resume().version == 1
    again.close()


def test_loop_resumes_the_unfinished_batches_of_several_phases(workspace, monkeypatch):
    """Killed in SFT, which is then paused; killed again in the reward phase; SFT is resumed while the loop runs."""
    monkeypatch.setattr(loop, "POLL_INTERVAL_S", 0.01)
    workspace.add_chains("a")
    workspace.add_labels("a")

    workspace.trainer.updater.learners = dict.fromkeys(PHASES, interrupt)
    for phase in ("sft", "reward"):
        with pytest.raises(KeyboardInterrupt):
            workspace.trainer.update(phase)
    sft_batch, reward_batch = workspace.read_records(BatchManifest)
    workspace.add(make_sft_pause(True))
    workspace.trainer = workspace.open()
    assert workspace.trainer.resume().batch_id == reward_batch.record_id
    workspace.add_chains("b")  # rows that a new batch could also take
    pending = [make_sft_pause(False)]

    def is_done():
        if pending:
            workspace.bus.publish([to_producer_record(pending.pop())])
        return workspace.list_policies() != []

    run_loop_until(workspace.trainer, is_done)
    assert [update.batch_id for update in read_policy_updates(workspace.bus)] == [reward_batch.record_id, sft_batch.record_id]


def make_sft_pause(paused):
    from engine.policy import make_pause

    return make_pause("sft", "inspection", run_id="r", paused=paused)


def test_referenced_checkpoints_are_kept(workspace):
    train_to_rl(workspace)
    for name in "cd":
        workspace.add_responses(name)
        workspace.trainer.update("ppo")
    names = sorted(path.name for path in (workspace.settings.folder / "checkpoints").iterdir())
    # The reference, the newest policy (train.save_total_limit = 1), the policy before it, and the reward model.
    assert names == ["policy-000001", "policy-000004", "policy-000005", "reward-000001"]


def test_rollback_to_a_removed_checkpoint_restores_the_reference(workspace):
    train_to_rl(workspace)
    shutil.rmtree(workspace.settings.folder / "checkpoints" / "policy-000002")
    assert workspace.trainer.trigger_rollback(LimitExceeded("it flatters", "", rollback_version=2)).restored_version == 1


def test_latest_policy_processor_uses_the_newest_model_for_each_batch():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Work:
        model: str

        def __call__(self, records):
            return [[self.model] for _ in records]

    versions = iter([("first", 0), ("second", 1)])
    processor = LatestPolicyProcessor(Work("pinned"), lambda: next(versions))
    assert processor([1, 2]) == [["first"], ["first"]] and processor([3]) == [["second"]]


def test_metrics_go_to_the_configured_tracker(monkeypatch, capsys):
    logged = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **init_arguments: logged.append(init_arguments) or run)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    reporter = MetricsReporter(load_settings({"train.report_to": "trackio"}, environment={})[0])
    reporter.report_step("reward", 3, {"loss": 0.25, "epoch": 1.0})
    update = PolicyUpdate(
        record_id=ids.compute_record_id("train", [], "1"), run_id="live", stage="train", kind=PolicyKind.REWARD, version=1,
        phase="reward", uri="/x", content_hash="", base_version=0, batch_id=ids.compute_record_id("batch", [], "1"),
        metrics={"loss": 0.25, "reward/accuracy": 0.75, "wall_s": 2.0},
    )  # fmt: skip
    reporter.report_update(update)
    reporter.close()
    init_arguments, step = {"project": "charter", "name": "live"}, {"reward/loss": 0.25, "reward/epoch": 1.0}
    assert logged == [init_arguments, step, {"reward/accuracy": 0.75, "reward/wall_s": 2.0}, "finished"]
    assert capsys.readouterr().out.splitlines() == [
        "phase=reward step=3 loss=0.25",
        "reward 1 from reward: /x",
        "phase=reward version=1 reward/accuracy=0.75 wall_s=2",
    ]
    with pytest.raises(UsageError, match="needs wandb"):
        MetricsReporter(load_settings({"train.report_to": "wandb"}, environment={})[0])


def test_sft_trains_on_the_selected_rounds(workspace):
    def add_chain(name, end_reason, last, **more):
        """Add a chain with the revisions r1 ... r`last`."""
        texts = [f"{name} r{n + 1}" for n in range(last)]
        rounds = [Round(round=n + 1, principle_id="p", critique="c", revision=text) for n, text in enumerate(texts)]
        chain_id = {"response_id": ids.compute_id("response", name)}
        for n, text in enumerate(texts):
            workspace.add(
                make_revision(name, name, "f", text, 0.5, round=n + 1).model_copy(
                    update={"finish_reason": FinishReason.STOP if n else FinishReason.LENGTH}
                )
            )
        workspace.add(
            make_chain_end(name, name).model_copy(
                update=chain_id | {"rounds": rounds, "round": last, "end_reason": end_reason} | more
            )
        )

    add_chain("done", EndReason.LAST_ROUND, 3, final_response="done r3", final_finish_reason=FinishReason.STOP)
    add_chain("lost", EndReason.LOST, 2, final_response="lost r1")
    add_chain("clean", EndReason.SATISFIED, 0, final_response="clean f", final_finish_reason=FinishReason.STOP)
    sft_settings = workspace.settings.sft.model_copy(update={"rounds": [1, 2]})
    workspace.settings = workspace.settings.model_copy(update={"sft": sft_settings})
    workspace.reopen()
    workspace.trainer.update("sft")
    (manifest,) = workspace.read_records(BatchManifest)
    rows = rebuild_batch(workspace.store, manifest).rows
    assert sorted((row["completion"], row["finish_reason"]) for row in rows) == [
        ("clean f", "STOP"),
        ("done r1", "UNKNOWN"),
        ("done r2", "STOP"),
        ("lost r1", "UNKNOWN"),  # its second revision lost against the first
    ]
    assert [row["completion"] for row in rows if row["completion"].startswith("done")] == ["done r1", "done r2"]
    assert len(manifest.record_ids) == 3 and manifest.mixture == {"test": 4}


def set_replay_ratio(workspace, ratio, **train):
    """Reopen the trainer with this share of replayed labels."""
    changed = {
        "reward": workspace.settings.reward.model_copy(update={"replay_ratio": ratio}),
        "train": workspace.settings.train.model_copy(update=train),
    }
    workspace.settings = workspace.settings.model_copy(update=changed)
    workspace.reopen()


def test_reward_model_replays_earlier_labels(workspace):
    """The manifest names them; they move no cursor, and are sampled again for each batch."""
    set_replay_ratio(workspace, 1.0)
    for name in ("first", "second", "third"):
        workspace.add_labels(name)
        workspace.trainer.update("reward")
    first, second, third = workspace.read_records(BatchManifest)
    assert first.replayed_record_ids == [] and set(second.replayed_record_ids) == set(first.record_ids)
    new = [set(m.record_ids) - set(m.replayed_record_ids) for m in (first, second, third)]
    assert [len(rows) for rows in new] == [4, 4, 4] and len(set.union(*new)) == 12
    assert set(third.replayed_record_ids) < new[0] | new[1] and len(third.record_ids) == 8
    assert first.commit_seq_to < second.commit_seq_from <= second.commit_seq_to < third.commit_seq_from
    assert rebuild_batch(workspace.store, third).manifest == third
    workspace.add()
    counts = "SELECT batch_number, count(*), count(*) FILTER (replayed) FROM batch_rows GROUP BY 1 ORDER BY 1"
    assert workspace.store.query(counts).rows == [(1, 4, 0), (2, 8, 4), (3, 8, 4)]


def test_replay_ratio_is_limited_by_the_largest_batch(workspace):
    workspace.add_labels("first", 8)
    workspace.trainer.update("reward")
    set_replay_ratio(workspace, 0.5)
    for name in ("second", "third"):
        workspace.add_labels(name)
        workspace.trainer.update("reward")
    _, second, third = workspace.read_records(BatchManifest)
    assert [len(m.replayed_record_ids) for m in (second, third)] == [2, 2]
    set_replay_ratio(workspace, 1.0, max_rows=5)
    workspace.add_labels("fourth")
    workspace.trainer.update("reward")
    *_, fourth = workspace.read_records(BatchManifest)
    assert len(fourth.record_ids) == 5 and len(fourth.replayed_record_ids) == 1
