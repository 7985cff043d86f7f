"""PPO learns a known preference and keeps it: a short version of `benchmarks.learning` (`benchmarks.learning.ppo_ablations`)."""

import pytest

from benchmarks.learning.ppo_ablations import PREVIOUS_SETTINGS, make_ppo_config, run_ppo, train_small_base_model

SEED = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_small_base_model(tmp_path_factory.mktemp("small-language"))


def test_ppo_learns_a_preference_and_keeps_it(base, tmp_path):
    config = make_ppo_config({})
    result = run_ppo(base, tmp_path, config, SEED)
    rates, refusals = result.target_rates, result.refusal_rates
    assert rates[-1] > rates[0] + 0.25 and rates[-1] == max(rates), result
    assert refusals[-1] > refusals[0] + 0.2, result  # with the mean of the batch as the baseline, refusals are unlearned
    assert max(result.kls) < config.kl_target and not result.update_error, result  # a constant learning rate exceeds the target


def test_ppo_with_previous_settings_does_not_learn(base, tmp_path):
    """The previous settings: a constant learning rate, the mean of the batch as the baseline, no KL limit on an update."""
    config = make_ppo_config(PREVIOUS_SETTINGS)
    result = run_ppo(base, tmp_path, config, SEED)
    rates, refusals = result.target_rates, result.refusal_rates
    assert rates[-1] < rates[0] + 0.25 and refusals[-1] < refusals[0] + 0.2, result
