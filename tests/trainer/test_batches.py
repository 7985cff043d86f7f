"""What a batch is drawn from: mixes by hand, length buckets, and every reason why a rollout is too stale."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.settings import load_settings, parse_mixture
from schemas.records import BatchManifest, PolicyKind, PolicyUpdate
from trainer.batches import (
    RowRef,
    StalenessLimits,
    TrainingState,
    compute_exact_mixture_size,
    compute_training_state,
    describe_mixture_shortfall,
    find_staleness_reason,
    group_by_length,
    is_superseded,
    sample_mixture,
)

SFT = {"*": 0.73, "helpful": 0.27}


def rows(**counts):
    """Rows of these sources, their commits mixed."""
    made = [(n / count, source) for source, count in counts.items() for n in range(count)]
    return [RowRef(str(n), source, n, length=n % 7) for n, (_, source) in enumerate(sorted(made))]


def sources(chosen):
    found = [row.source for row in chosen]
    return {source: found.count(source) for source in sorted(set(found))}


@pytest.mark.parametrize(
    ("waiting", "least", "most", "drawn"),
    [
        ({"red": 730, "helpful": 270}, 10, 4096, {"helpful": 270, "red": 730}),  # exactly the mix
        ({"red": 730, "helpful": 1000}, 10, 4096, {"helpful": 270, "red": 730}),  # the rest waits
        ({"red": 5000, "helpful": 5000}, 10, 100, {"helpful": 27, "red": 73}),  # the largest that is allowed
        ({"red": 100}, 10, 4096, {"red": 100}),  # a source is missing: the others grow
        ({"red": 100, "helpful": 1}, 50, 4096, {"helpful": 1, "red": 49}),  # scarce: filled up to the least
        ({"red": 40, "blue": 33, "helpful": 27}, 10, 100, {"blue": 33, "helpful": 27, "red": 40}),  # * is all others
    ],
)
def test_a_mix_is_the_largest_batch_that_has_its_shares(waiting, least, most, drawn):
    chosen = sample_mixture(rows(**waiting), SFT, min_size=least, max_size=most)
    assert sources(chosen) == drawn
    assert [row.commit_seq for row in chosen] == sorted(row.commit_seq for row in chosen)
    for source, count in drawn.items():  # the oldest of each source
        assert [r for r in chosen if r.source == source] == [r for r in rows(**waiting) if r.source == source][:count]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), st.integers(40, 120))
def test_no_row_is_drawn_twice_and_the_least_is_kept_where_it_can_be(red, blue, helpful, least, most):
    waiting = rows(red=red, blue=blue, helpful=helpful)
    chosen = sample_mixture(waiting, SFT, min_size=least, max_size=most)
    assert len({row.row_id for row in chosen}) == len(chosen) <= most
    assert len(chosen) >= min(len(waiting), least, most)
    assert compute_exact_mixture_size(waiting, SFT) <= len(waiting)


def test_a_mix_that_is_not_met_is_told_with_what_is_missing():
    assert describe_mixture_shortfall(rows(red=73, helpful=27), SFT) is None
    words = describe_mixture_shortfall(rows(red=100), SFT)
    assert words == ("the mix of this batch is * 100% (wanted 73%), helpful 0% (wanted 27%); nothing new is there of helpful")


def test_the_shipped_mixes_are_those_of_the_recipe_and_a_bad_one_is_refused():
    train = load_settings({}, environment={})[0].train
    assert parse_mixture(train.sft_mixture) == SFT and parse_mixture(train.reward_mixture) == {"helpful": 0.43, "*": 0.57}
    for bad in ('["helpful=0.3"]', '["helpful"]', '["*=0"]'):
        with pytest.raises(UsageError, match=r"train.sft_mixture cannot be"):
            load_settings({"train.sft_mixture": bad}, environment={})


def test_rows_of_one_step_are_of_similar_length_and_the_order_follows_from_the_seed():
    waiting = [RowRef(str(n), "s", n, length=(n * 37) % 101) for n in range(100)]
    order = group_by_length(waiting, 8, seed=3)
    assert sorted(row.row_id for row in order) == sorted(row.row_id for row in waiting) and order == group_by_length(
        waiting, 8, seed=3
    )
    assert order != group_by_length(waiting, 8, seed=4)
    spans = [max(r.length for r in step) - min(r.length for r in step) for step in steps(order, 8)]
    shuffled = [max(r.length for r in step) - min(r.length for r in step) for step in steps(waiting, 8)]
    assert sum(spans) < sum(shuffled) / 3 and len(list(steps(order, 8))[-1]) == 4  # the short step stays the last


def steps(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def ago(seconds: float) -> datetime:
    return datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("version", "age_s", "reason"),
    [
        (7, 0, None),
        (5, 0, None),
        (4, 0, "older than 2 policy versions"),
        (2, 0, "sampled before the last supervised update"),
        (6, 0, "sampled by a policy that was rolled back"),
        (3, 0, "older than 2 policy versions"),
        (5, 61, "older than 60 s"),
    ],
)
def test_every_bound_has_its_reason(version, age_s, reason):
    standing = TrainingState(7, 3, policy_ancestry=(7, 5, 4, 3), reward_version_by_policy={3: 0, 4: 1, 5: 2, 7: 3})
    row = {"policy_version": version, "created_at": ago(age_s)}
    assert (
        find_staleness_reason(row, standing, StalenessLimits(max_staleness=2, max_reward_staleness=2, max_age_s=60)) == reason
    )


def test_reward_models_published_since_are_a_bound_of_their_own():
    standing = TrainingState(5, 6, policy_ancestry=(5, 4), reward_version_by_policy={4: 2, 5: 3})
    row = {"policy_version": 4, "created_at": ago(0)}
    assert find_staleness_reason(row, standing, StalenessLimits(max_reward_staleness=3)) == "older than 3 reward-model versions"
    assert find_staleness_reason(row, standing, StalenessLimits(max_reward_staleness=4)) is None


def update(kind, version, phase, base, *, restored_version=None, batch=None):
    return PolicyUpdate.model_construct(
        kind=kind,
        version=version,
        phase=phase,
        base_version=base,
        restored_version=restored_version,
        batch_id=batch,
        model=None,
    )


def test_where_training_stands_follows_from_the_log_after_going_back_too():
    policy, reward = PolicyKind.POLICY, PolicyKind.REWARD
    known = [
        update(policy, 1, "sft", 0, batch="a"),
        update(reward, 1, "reward", 0, batch="b"),
        update(policy, 2, "ppo", 1, batch="c"),
        update(reward, 2, "reward", 1),
        update(policy, 3, "ppo", 2),
        update(policy, 4, "restore", 3, restored_version=2, batch="c"),
        update(policy, 5, "ppo", 4),
    ]
    manifests = [
        BatchManifest.model_construct(record_id="a", phase="sft", cursors={"x": 9, "y": 4}, commit_seq_to=9),
        BatchManifest.model_construct(record_id="c", phase="ppo", cursors={}, commit_seq_to=20),
    ]
    standing = compute_training_state(known, manifests)
    assert (standing.policy_version, standing.reward_version, standing.reference_version) == (5, 2, 1)
    assert standing.policy_ancestry == (5, 4, 2, 1)  # 3 was rolled back
    assert standing.reward_version_by_policy == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2}
    assert [standing.get_cursor("sft", "x"), standing.get_cursor("sft", "y"), standing.get_cursor("sft", "z")] == [9, 4, -1]
    assert standing.get_cursor("ppo") == 20
    drawn_for = BatchManifest.model_construct(phase="ppo", base_policy_version=3, base_reward_version=2)
    assert is_superseded(drawn_for, standing)
