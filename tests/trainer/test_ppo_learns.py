"""PPO learns a known preference and keeps it: the short form of `benchmarks.learning` (see `benchmarks.learning.ppo_ablations`)."""

import pytest

from benchmarks.learning.ppo_ablations import PREVIOUS_SETTINGS, make_ppo_config, run_ppo, train_small_base_model

SEED = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_small_base_model(tmp_path_factory.mktemp("small-language"))


def test_ppo_learns_a_preference_and_keeps_it(base, tmp_path):
    p = make_ppo_config({})
    result = run_ppo(base, tmp_path, p, SEED)
    assert result.target_rates[-1] > result.target_rates[0] + 0.25 and result.target_rates[-1] == max(result.target_rates), (
        result
    )
    assert result.refusal_rates[-1] > result.refusal_rates[0] + 0.2, (
        result
    )  # with the mean of the batch as the baseline, refusals are unlearned
    assert max(result.kls) < p.kl_target and not result.update_error, result  # a constant learning rate exceeds the target


def test_ppo_with_previous_settings_does_not_learn(base, tmp_path):
    """The previous settings: a constant learning rate, the mean of the batch as the baseline, no KL limit on an update."""
    p = make_ppo_config(PREVIOUS_SETTINGS)
    result = run_ppo(base, tmp_path, p, SEED)
    assert (
        result.target_rates[-1] < result.target_rates[0] + 0.25 and result.refusal_rates[-1] < result.refusal_rates[0] + 0.2
    ), result
