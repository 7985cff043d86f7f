"""Groups of completions: when they are ready, what their rewards are, and that a batch and its rewards can be resumed."""

import json
from statistics import stdev

import pytest

from engine.errors import UsageError
from engine.settings import load_settings, parse_rewards
from schemas.records import BatchManifest, DroppedRollout, FinishReason, Outcome
from tests.support.groups import make_group, make_group_grades, make_pair_label
from tests.support.workspace import Workspace
from trainer import monitor
from trainer.batches import rebuild_batch
from trainer.rewards import Evidence, compute_reward, find_missing_source


@pytest.fixture
def make_workspace(tmp_path):
    """Return a function that opens a workspace with an RL method on groups. A group of 4 starts an update."""
    opened = []

    def open_workspace(method="grpo", rewards=("length=-1",), **train):
        values = {"rl_method": method, "rewards": list(rewards), "group_completions": 4} | train
        workspace = Workspace(tmp_path / f"data{len(opened)}", respond={"num_completions": 4}, **values)
        opened.append(workspace)
        return workspace

    yield open_workspace
    for workspace in opened:
        workspace.close()


def add_group(workspace, name, scores=(1.0, 2.0, 3.0, 4.0), **more):
    """Add a group with grades. Return the response."""
    response = make_group(name, workspace.trainer.read_state(), **more)
    workspace.add(response, *(make_group_grades(response, scores) if scores else []))
    return response


def read_drops(workspace):
    return {(drop.dropped_id, drop.reason) for drop in workspace.read_records(DroppedRollout)}


# Rewards


def grade(source, score=None, label="", outcome="OK"):
    return {"record_id": "x", "source": source, "score": score, "label": label, "outcome": outcome, "principle_id": None}


def test_reward_is_the_weighted_sum_of_scores_labels_and_win_rates():
    evidence = Evidence(
        [grade("length", 7.0), grade("refusal", 2.5, "refuses"), grade("principles", 0.2), grade("principles", 0.4)],
        [{"record_id": "p", "outcome": "OK", "p_win": p} for p in (0.25, 0.75, 1.0)],
    )

    def compute(*entries):
        return compute_reward(evidence, parse_rewards(entries))

    assert compute("length=-0.1") == pytest.approx(-0.7)
    assert compute("refusal.refuses=2", "refusal.complies=5") == 2.0
    assert compute("principles=-1") == pytest.approx(-0.3)
    assert compute("judge=3") == pytest.approx(2.0)
    assert compute("judge=1", "refusal=1", "length=1") == pytest.approx(2 / 3 + 2.5 + 7)


def test_an_unreadable_grade_gives_no_reward():
    terms = parse_rewards(["length=1"])
    assert compute_reward(Evidence([grade("length", None, outcome="EMPTY")]), terms) is None
    assert compute_reward(Evidence([grade("length", None)]), terms) is None
    assert compute_reward(Evidence(), terms) is None
    two = Evidence([grade("principles", 0.2), grade("principles", None, outcome="LOW_MASS")])
    assert compute_reward(two, parse_rewards(["principles=1"])) is None  # other completions are asked about both principles
    refused = Evidence(pairs=[{"record_id": "p", "outcome": "REFUSED", "p_win": None}])
    assert compute_reward(refused, parse_rewards(["judge=1"])) is None


def test_a_group_misses_a_source_until_each_completion_has_it():
    terms, two = parse_rewards(["principles=-1"]), [grade("principles", 0.2), grade("principles", 0.4)]
    assert find_missing_source([Evidence(two), Evidence(two[:1])], terms, "neighbors") == "principles"
    assert find_missing_source([Evidence(), Evidence()], terms, "neighbors") == "principles"
    assert find_missing_source([Evidence(two), Evidence(two)], terms, "neighbors") is None
    pair = Evidence(pairs=[{"record_id": "p", "outcome": "REFUSED", "p_win": None}])
    assert find_missing_source([pair, pair], parse_rewards(["judge=1"]), "all") is None
    assert find_missing_source([pair, pair, Evidence()], parse_rewards(["judge=1"]), "circular") == "judge"


@pytest.mark.parametrize("entry", ["length", "length=", "=1", "length=0", "length=nan", "refusal.=1", "judge.won=1"])
def test_a_malformed_reward_is_refused(entry):
    with pytest.raises(UsageError, match=r"train\.rewards cannot be"):
        load_settings({"train.rewards": [entry]}, environment={})


# Which groups are ready


def test_a_group_waits_for_every_grade_and_a_batch_has_whole_groups(make_workspace):
    workspace = make_workspace(rewards=["length=-1", "refusal.refuses=1"])
    first, second = add_group(workspace, "first"), add_group(workspace, "second")
    assert workspace.trainer.next_phase() is None and workspace.trainer.updater.groups.missing == {"refusal": 2}
    workspace.add(*make_group_grades(second, [1.0] * 4, grader="refusal", label="refuses"))
    assert workspace.trainer.next_phase() == "grpo"
    workspace.trainer.update("grpo")
    # The first group was older. It still trains, because it waited.
    workspace.add(*make_group_grades(first, [1.0] * 4, grader="refusal", label="complies"))
    workspace.trainer.update("grpo")
    batches = workspace.read_records(BatchManifest)
    assert [batch.record_ids for batch in batches] == [[second.record_id], [first.record_id]]
    with pytest.raises(UsageError, match="there is nothing new for grpo"):
        workspace.trainer.update("grpo")


def test_threshold_and_maximum_count_completions(make_workspace):
    workspace = make_workspace(group_completions=10, max_rows=9)
    for name in ("a", "b"):
        add_group(workspace, name)
    assert workspace.trainer.next_phase() is None  # 8 completions
    add_group(workspace, "c", (1.0, 2.0, None, None))
    assert workspace.trainer.next_phase() == "grpo"
    workspace.trainer.update("grpo")
    workspace.trainer.update("grpo")
    assert [len(batch.record_ids) for batch in workspace.read_records(BatchManifest)] == [2, 1]


def test_unreadable_grades_leave_the_group_and_a_group_with_one_reward_is_dropped(make_workspace):
    workspace = make_workspace()
    kept = add_group(workspace, "kept", (1.0, None, 3.0, 4.0))
    lost = add_group(workspace, "lost", (1.0, None, None, None))
    workspace.trainer.update("grpo")
    (manifest,) = workspace.read_records(BatchManifest)
    rows = rebuild_batch(workspace.store, manifest).rows
    assert [(str(row["response_id"]), row["completion_index"]) for row in rows] == [(kept.record_id, n) for n in (0, 2, 3)]
    assert {row["num_in_group"] for row in rows} == {4}
    assert read_drops(workspace) == {(lost.record_id, "fewer than two completions of its group have a reward")}


def test_small_and_stale_groups_are_dropped_with_a_reason(make_workspace):
    workspace = make_workspace()
    small = add_group(workspace, "small", (1.0, 2.0, 3.0), count=3)
    old = add_group(workspace, "old")
    workspace.add_chains("chain")
    workspace.trainer.update("sft")
    assert workspace.trainer.updater.select_rows("grpo", workspace.trainer.read_state()) == []
    reason = "sampled before the last supervised update"
    assert read_drops(workspace) == {(small.record_id, reason), (old.record_id, reason)}
    small = add_group(workspace, "small again", (1.0, 2.0, 3.0), count=3)
    workspace.trainer.updater.select_rows("grpo", workspace.trainer.read_state())
    assert (small.record_id, "its group has fewer than 4 completions") in read_drops(workspace)


def test_a_completion_that_cannot_train_leaves_its_group(make_workspace):
    workspace = make_workspace()
    response = make_group("filtered", workspace.trainer.read_state())
    completions = [
        c.model_copy(update={"finish_reason": FinishReason.REFUSED} if c.index == 1 else {}) for c in response.completions
    ]
    workspace.add(response.model_copy(update={"completions": completions}), *make_group_grades(response, (1.0, None, 3.0, 4.0)))
    (row,) = workspace.trainer.updater.select_rows("grpo", workspace.trainer.read_state())
    assert row.weight == 3


def test_a_win_rate_does_not_wait_for_pairs_that_cannot_be_compared(make_workspace):
    workspace = make_workspace(rewards=["judge=1"])
    response = make_group("filtered", workspace.trainer.read_state())
    completions = [
        c.model_copy(update={"finish_reason": FinishReason.REFUSED} if c.index > 1 else {}) for c in response.completions
    ]
    workspace.add(response.model_copy(update={"completions": completions}))
    withheld = {"outcome": Outcome.WITHHELD}
    workspace.add(make_pair_label(response, 0, 1, 0.9), make_pair_label(response, 1, 2, None, **withheld))
    select = workspace.trainer.updater.select_rows
    assert select("grpo", workspace.trainer.read_state()) == []
    workspace.add(make_pair_label(response, 2, 3, None, **withheld))  # neither completion of this pair can train
    (row,) = select("grpo", workspace.trainer.read_state())
    assert row.weight == 2


def test_rewards_from_grades_need_no_reward_model_and_no_good_labels(make_workspace):
    workspace = make_workspace()
    workspace.reopen(check_labels=lambda store: "all labels flip")
    workspace.add_labels("pair")
    add_group(workspace, "a")
    assert workspace.trainer.next_phase() == "grpo"  # no reward model, and the labels are not used
    judged = make_workspace(rewards=["judge=1"])
    judged.reopen(check_labels=lambda store: "all labels flip")
    response = add_group(judged, "a", None)
    judged.add(*(make_pair_label(response, a, a + 1, 0.7) for a in range(3)))
    assert judged.trainer.next_phase() is None and "grpo is skipped" in judged.messages[0]
    scored = make_workspace(rewards=["reward_model=1"])
    add_group(scored, "a", None)
    assert scored.trainer.next_phase() is None
    with pytest.raises(UsageError, match="GRPO needs a reward model"):
        scored.trainer.update("grpo")
    scored.add_labels("pair")
    assert scored.trainer.next_phase() == "reward"


def test_sft_waits_while_groups_wait_for_grades(make_workspace):
    workspace = make_workspace()
    workspace.add_chains("a")
    workspace.trainer.update("sft")
    workspace.add_chains("b")
    response = add_group(workspace, "a", None)
    assert workspace.trainer.next_phase() is None and workspace.trainer.updater.groups.waiting
    other = add_group(workspace, "b", None)
    assert workspace.trainer.next_phase() == "sft"  # the grades of twice the threshold do not arrive
    assert workspace.messages[-1] == "grpo: 8 completions have no grades of length. SFT no longer waits for them"
    workspace.add(*make_group_grades(other, (None,) * 4))
    assert workspace.trainer.next_phase() is None
    workspace.add(*make_group_grades(response, (1.0, 2.0, 3.0, 4.0)))
    assert workspace.trainer.next_phase() == "grpo"
    workspace.trainer.update("grpo")
    assert workspace.trainer.next_phase() == "sft"


def test_beta_of_the_last_update_is_kept_for_each_method(make_workspace):
    workspace = make_workspace()
    add_group(workspace, "a")
    workspace.trainer.update("grpo")  # the fake learner reports beta 0.1
    add_group(workspace, "b")
    workspace.trainer.update("grpo")
    first, second = (json.loads(batch.settings) for batch in workspace.read_records(BatchManifest))
    assert (first["beta"], second["beta"]) == (0.04, 0.1)
    assert first["rewards"] == ["length=-1"] and first["max_completion_length"] == 256


def test_monitor_compares_the_rewards_of_grades_of_two_versions(make_workspace):
    workspace = make_workspace()
    higher, lower = (
        add_group(workspace, "higher", (-1.0, -2.0, None, -2.0)),
        add_group(workspace, "lower", (-4.0, -5.0, -4.0, -5.0)),
    )

    def make_rows(response):
        return [{"response_id": response.record_id, "completion_index": c.index, "text": c.text} for c in response.completions]

    def compare(new, old):
        return monitor._compute_grade_proxy_metrics(
            workspace.store, parse_rewards(["length=1"]), make_rows(new), make_rows(old)
        )

    better, worse = compare(higher, lower), compare(lower, higher)
    assert better["proxy_low"] > 0 > worse["proxy_high"] and better["proxy_gain"] == pytest.approx(-worse["proxy_gain"])
    values = [-1.0, -2.0, -2.0, -4.0, -5.0, -4.0, -5.0]
    assert better["proxy_gain"] == pytest.approx((-5 / 3 + 4.5) / stdev(values))
    unknown = add_group(workspace, "unknown", None)
    assert compare(unknown, lower) == {}


# Resuming


def test_a_resumed_batch_keeps_the_grades_that_it_was_sampled_with(make_workspace):
    workspace = make_workspace(rewards=["length=1", "judge=1"])
    response = add_group(workspace, "a")
    labels = [make_pair_label(response, a, a + 1, 0.7) for a in range(3)]
    workspace.add(*labels)
    workspace.trainer.update("grpo")
    (manifest,) = workspace.read_records(BatchManifest)
    assert len(manifest.reward_record_ids) == 4 + 3
    before = rebuild_batch(workspace.store, manifest).rows
    # A later grader version, and a person who replaces a label
    workspace.add(*make_group_grades(response, (9.0, 9.0, 9.0, 8.0), version="2"))
    workspace.add(make_pair_label(response, 0, 1, 0.0, parent_ids=[labels[0].record_id], record_id=manifest.record_id))
    assert rebuild_batch(workspace.store, manifest).rows == before


def test_content_hash_covers_the_grades(make_workspace):
    hashes = []
    for scores in ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 5.0)):
        workspace = make_workspace()
        add_group(workspace, "a", scores)
        workspace.trainer.update("grpo")
        (manifest,) = workspace.read_records(BatchManifest)
        hashes.append((manifest.content_hash, manifest.record_id))
    assert len({content for content, _ in hashes}) == 2 == len({record_id for _, record_id in hashes})


# Settings


def test_each_method_has_a_default_and_a_minimum_of_completions(make_workspace, tmp_path):
    for method, default in (("grpo", 8), ("rloo", 4), ("ppo", 2)):
        settings, origins = load_settings({"train.rl_method": method}, environment={})
        assert settings.respond.num_completions == default
    assert origins["respond.num_completions"] == "default"
    explicit, _ = load_settings({"train.rl_method": "grpo", "respond.num_completions": "5"}, environment={})
    assert explicit.respond.num_completions == 5
    for method, count in (("grpo", 3), ("rloo", 1)):
        with pytest.raises(UsageError, match=rf"cannot train on groups of {count} \(respond.num_completions\)"):
            Workspace(tmp_path / method, respond={"num_completions": count}, rl_method=method)


def test_settings_without_effect_are_told(make_workspace):
    workspace = make_workspace(method="ppo", objective="combined")
    assert workspace.messages == ["train.rewards has no effect with train.rl_method = ppo"]
    other = make_workspace(objective="combined")
    assert other.messages == ["train.objective = combined has no effect with train.rl_method = grpo"]


# DPO


def test_staleness_bounds_hold_for_pairs_of_dpo(make_workspace):
    workspace = make_workspace(method="dpo", rewards=["reward_model=1"], max_staleness=1)
    state = workspace.trainer.read_state()
    response = make_group("a", state, count=2)
    pair = make_pair_label(response, 0, 1, 0.7, policy_version=0)
    workspace.add(response, pair)
    select = workspace.trainer.updater.select_rows
    assert [row.row_id for row in select("dpo", state)] == [pair.record_id]
    for name in ("b", "c"):
        workspace.add_chains(name)
        workspace.trainer.update("sft")
        workspace.add_labels(name, 1)  # labels without a policy version have no limit
    rows = select("dpo", workspace.trainer.read_state())
    assert pair.record_id not in {row.row_id for row in rows} and len(rows) == 2
    assert read_drops(workspace) == {(pair.record_id, "older than 1 policy versions")}
    workspace.add()
    assert len(select("reward", workspace.trainer.read_state())) == 3  # only DPO has dropped the pair
