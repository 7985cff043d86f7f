"""PPO learns a known preference and keeps it: the short form of `benchmarks.learning` (see `benchmarks.learning.short`)."""

import pytest

from benchmarks.learning.short import BEFORE, hyperparameters, learn, make_base

SEED = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("small-language"))


def test_ppo_learns_and_stays_learned(base, tmp_path):
    p = hyperparameters({})
    course = learn(base, tmp_path, p, SEED)
    assert course.rates[-1] > course.rates[0] + 0.25 and course.rates[-1] == max(course.rates), course
    assert course.refusals[-1] > course.refusals[0] + 0.2, course  # what the batch's mean as a baseline unlearns
    assert max(course.kls) < p.kl_target and not course.refused, course  # what a constant rate overshoots


def test_ppo_as_it_was_fails_here(base, tmp_path):
    """A constant rate from the first step, the batch's mean as the baseline, no limit on an update."""
    p = hyperparameters(BEFORE)
    course = learn(base, tmp_path, p, SEED)
    assert course.rates[-1] < course.rates[0] + 0.25 and course.refusals[-1] < course.refusals[0] + 0.2, course
