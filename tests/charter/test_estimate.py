"""Estimates of tokens and cost against values computed by hand, for each answer mode of the judge."""

import pytest

from charter.estimate import PRINCIPLE_PROMPT_TOKENS, estimate_costs
from engine.settings import load_settings

PROMPTS, CHARS = 10, 4000
SHOWN = 1000 + PROMPTS * (256 + PRINCIPLE_PROMPT_TOKENS) + PROMPTS * 256  # the prompts, both responses, the question


@pytest.mark.parametrize(
    ("chosen", "read", "written"),
    [
        ({}, 2 * SHOWN, 0),
        ({"respond.num_completions": 4}, 3 * 2 * SHOWN, 0),
        ({"respond.num_completions": 4, "judge.pairing": "revision"}, 2 * SHOWN, 0),
        ({"judge.preset": "ensemble-k"}, 5 * 2 * SHOWN, 0),
        ({"judge.preset": "course"}, 2 * SHOWN, 2 * PROMPTS * 256),
        ({"judge.preset": "bai2022-cot", "judge.max_tokens": 64}, 4 * SHOWN + 2 * PROMPTS * 64, 2 * PROMPTS * 64),
    ],
)
def test_estimate_counts_both_orders_for_each_principle(chosen, read, written):
    settings, _ = load_settings(chosen, environment={})
    (cost,) = estimate_costs(settings, ["judge"], PROMPTS, CHARS)
    assert (cost.num_records, cost.prompt_tokens, cost.max_completion_tokens) == (PROMPTS, read, written)
