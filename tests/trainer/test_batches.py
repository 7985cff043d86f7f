"""Sampling of batches: mixtures by hand, groups of similar length, and every reason why a rollout is too stale."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.settings import load_settings, parse_mixture
from schemas.records import BatchManifest, PolicyKind, PolicyUpdate
from tests.support.records import RecordDatabase, make_response
from trainer.batches import (
    RowRef,
    StalenessLimits,
    compute_exact_mixture_size,
    describe_mixture_shortfall,
    find_staleness_reason,
    group_by_length,
    measure_clock_difference,
    sample_mixture,
)
from trainer.state import TrainingState, compute_training_state, is_superseded

SFT = {"*": 0.73, "helpful": 0.27}


def make_rows(**counts):
    """Make rows of these sources, with interleaved commits."""
    order = sorted((n / count, source) for source, count in counts.items() for n in range(count))
    return [RowRef(str(n), source, n, length=n % 7) for n, (_, source) in enumerate(order)]


def count_sources(chosen):
    sources = [row.source for row in chosen]
    return {source: sources.count(source) for source in sorted(set(sources))}


@pytest.mark.parametrize(
    ("available", "min_size", "max_size", "expected"),
    [
        ({"red": 730, "helpful": 270}, 10, 4096, {"helpful": 270, "red": 730}),  # exactly the mixture
        ({"red": 730, "helpful": 1000}, 10, 4096, {"helpful": 270, "red": 730}),  # the rest waits
        ({"red": 5000, "helpful": 5000}, 10, 100, {"helpful": 27, "red": 73}),  # the largest that is allowed
        ({"red": 100}, 10, 4096, {"red": 100}),  # a source is missing: the others grow
        ({"red": 100, "helpful": 1}, 50, 4096, {"helpful": 1, "red": 49}),  # scarce: filled up to the minimum size
        ({"red": 40, "blue": 33, "helpful": 27}, 10, 100, {"blue": 33, "helpful": 27, "red": 40}),  # * is all others
    ],
)
def test_sample_mixture_returns_the_largest_batch_with_the_shares(available, min_size, max_size, expected):
    chosen = sample_mixture(make_rows(**available), SFT, min_size=min_size, max_size=max_size)
    assert count_sources(chosen) == expected
    assert [row.commit_seq for row in chosen] == sorted(row.commit_seq for row in chosen)
    for source, count in expected.items():  # the oldest of each source
        assert [r for r in chosen if r.source == source] == [r for r in make_rows(**available) if r.source == source][:count]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), st.integers(40, 120))
def test_sample_mixture_takes_rows_once_and_respects_its_limits(red, blue, helpful, min_size, max_size):
    available = make_rows(red=red, blue=blue, helpful=helpful)
    chosen = sample_mixture(available, SFT, min_size=min_size, max_size=max_size)
    assert len({row.row_id for row in chosen}) == len(chosen) <= max_size
    assert len(chosen) >= min(len(available), min_size, max_size)
    assert compute_exact_mixture_size(available, SFT) <= len(available)


def test_mixture_shortfall_names_the_missing_sources():
    assert describe_mixture_shortfall(make_rows(red=73, helpful=27), SFT) is None
    warning = describe_mixture_shortfall(make_rows(red=100), SFT)
    assert warning == (
        "the mixture of this batch is * 100% (configured: 73%), helpful 0% (configured: 27%); there are no new rows of helpful"
    )


def test_default_mixtures_match_the_paper_and_invalid_ones_are_rejected():
    train = load_settings({}, environment={})[0].train
    assert parse_mixture(train.sft_mixture) == SFT and parse_mixture(train.reward_mixture) == {"helpful": 0.43, "*": 0.57}
    for bad in ('["helpful=0.3"]', '["helpful"]', '["*=0"]'):
        with pytest.raises(UsageError, match=r"train.sft_mixture cannot be"):
            load_settings({"train.sft_mixture": bad}, environment={})


def test_group_by_length_groups_similar_lengths_and_depends_on_the_seed():
    available = [RowRef(str(n), "s", n, length=(n * 37) % 101) for n in range(100)]
    order = group_by_length(available, 8, seed=3)
    assert sorted(row.row_id for row in order) == sorted(row.row_id for row in available) and order == group_by_length(
        available, 8, seed=3
    )
    assert order != group_by_length(available, 8, seed=4)
    spans = [max(r.length for r in step) - min(r.length for r in step) for step in split_steps(order, 8)]
    shuffled = [max(r.length for r in step) - min(r.length for r in step) for step in split_steps(available, 8)]
    assert sum(spans) < sum(shuffled) / 3 and len(list(split_steps(order, 8))[-1]) == 4  # the short step stays the last


def split_steps(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def make_past_time(seconds: float) -> datetime:
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
def test_staleness_limits_give_their_reason(version, age_s, reason):
    state = TrainingState(7, 3, policy_ancestry=(7, 5, 4, 3), reward_version_by_policy={3: 0, 4: 1, 5: 2, 7: 3})
    row = {"policy_version": version, "created_at": make_past_time(age_s)}
    assert find_staleness_reason(row, state, StalenessLimits(max_staleness=2, max_reward_staleness=2, max_age_s=60)) == reason


def test_age_of_a_rollout_is_at_most_the_age_of_its_policy():
    """The clock of the stage is an hour behind the clock of the trainer, so it writes times before its policy was published."""
    limits = StalenessLimits(max_age_s=60)
    row = {"policy_version": 1, "created_at": make_past_time(3600)}
    reasons = [
        find_staleness_reason(row, TrainingState(1, policy_ancestry=(1, 0), publication_times=times), limits)
        for times in ({}, {1: make_past_time(61)}, {1: make_past_time(5)})
    ]
    assert reasons == ["older than 60 s", "older than 60 s", None]


@pytest.mark.parametrize(("age_s", "difference_s"), [(1800, 0), (3600 + 90, -90), (-120, 120)])
def test_clock_difference_is_what_the_times_of_policies_and_responses_prove(tmp_path, age_s, difference_s):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    response = make_response("a")
    created_at = make_past_time(age_s).replace(tzinfo=UTC)
    database.add(response.model_copy(update={"policy_version": 1, "created_at": created_at}))
    state = TrainingState(1, publication_times={1: make_past_time(3600)})
    assert measure_clock_difference(database.store, state).total_seconds() == pytest.approx(difference_s, abs=5)


def test_reward_staleness_limit_gives_its_reason():
    state = TrainingState(5, 6, policy_ancestry=(5, 4), reward_version_by_policy={4: 2, 5: 3})
    row = {"policy_version": 4, "created_at": make_past_time(0)}
    assert find_staleness_reason(row, state, StalenessLimits(max_reward_staleness=3)) == "older than 3 reward-model versions"
    assert find_staleness_reason(row, state, StalenessLimits(max_reward_staleness=4)) is None


def make_update(kind, version, phase, base, *, restored_version=None, batch=None):
    return PolicyUpdate.model_construct(
        kind=kind,
        version=version,
        phase=phase,
        base_version=base,
        restored_version=restored_version,
        batch_id=batch,
        model=None,
    )


def test_training_state_follows_the_log_after_a_rollback():
    policy, reward = PolicyKind.POLICY, PolicyKind.REWARD
    updates = [
        make_update(policy, 1, "sft", 0, batch="a"),
        make_update(reward, 1, "reward", 0, batch="b"),
        make_update(policy, 2, "ppo", 1, batch="c"),
        make_update(reward, 2, "reward", 1),
        make_update(policy, 3, "ppo", 2),
        make_update(policy, 4, "restore", 3, restored_version=2, batch="c"),
        make_update(policy, 5, "ppo", 4),
    ]
    manifests = [
        BatchManifest.model_construct(record_id="a", phase="sft", cursors={"x": 9, "y": 4}, commit_seq_to=9, sink_session="s"),
        BatchManifest.model_construct(record_id="c", phase="ppo", cursors={}, commit_seq_to=20, sink_session="s"),
        BatchManifest.model_construct(record_id="z", phase="sft", cursors={}, commit_seq_to=99, sink_session="s"),
    ]
    state = compute_training_state(updates, manifests)
    assert (state.policy_version, state.reward_version, state.reference_version) == (5, 2, 1)
    assert state.policy_ancestry == (5, 4, 2, 1)  # 3 was rolled back
    assert state.reward_version_by_policy == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2}
    assert [manifest.record_id for manifest in state.trained_batches] == ["a", "c"]  # no update has trained on z
    superseded = BatchManifest.model_construct(phase="ppo", base_policy_version=3, base_reward_version=2)
    assert is_superseded(superseded, state)
