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


@pytest.mark.parametrize(
    ("chosen", "num_questions"),
    [
        ({}, None),
        ({"grade.graders": '["refusal", "principles"]'}, 2 * 2 * 16),
        ({"grade.graders": '["principles"]', "grade.subjects": '["completion", "final_response"]'}, 2 * 3 * 16),
    ],
)
def test_estimate_counts_the_questions_of_the_principles_grader(chosen, num_questions):
    settings, _ = load_settings(chosen, environment={})
    costs = [cost.prompt_tokens for cost in estimate_costs(settings, ["grade"], PROMPTS, CHARS)]
    one_question = 1000 + PROMPTS * (256 + PRINCIPLE_PROMPT_TOKENS)
    assert costs == ([] if num_questions is None else [num_questions * one_question])
