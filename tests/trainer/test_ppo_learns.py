"""PPO learns a known preference and keeps it: the short form of `benchmarks.learning` (see `benchmarks.learning.ppo_ablations`)."""

import pytest

from benchmarks.learning.ppo_ablations import PREVIOUS_SETTINGS, make_ppo_config, run_ppo, train_small_base_model

SEED = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_small_base_model(tmp_path_factory.mktemp("small-language"))


def test_ppo_learns_and_stays_learned(base, tmp_path):
    p = make_ppo_config({})
    course = run_ppo(base, tmp_path, p, SEED)
    assert course.target_rates[-1] > course.target_rates[0] + 0.25 and course.target_rates[-1] == max(course.target_rates), (
        course
    )
    assert course.refusal_rates[-1] > course.refusal_rates[0] + 0.2, course  # what the batch's mean as a baseline unlearns
    assert max(course.kls) < p.kl_target and not course.update_error, course  # what a constant rate overshoots


def test_ppo_as_it_was_fails_here(base, tmp_path):
    """A constant rate from the first step, the batch's mean as the baseline, no limit on an update."""
    p = make_ppo_config(PREVIOUS_SETTINGS)
    course = run_ppo(base, tmp_path, p, SEED)
    assert (
        course.target_rates[-1] < course.target_rates[0] + 0.25 and course.refusal_rates[-1] < course.refusal_rates[0] + 0.2
    ), course
