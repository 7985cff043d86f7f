"""The learning benchmark: its rule-based judge and critic on the stages' prompts, and its statistics."""

import math
import random
from itertools import islice

import pytest

from benchmarks.learning.language import REFUSAL, generate_questions, is_polite, is_rude, score_response
from benchmarks.learning.programmatic import LANGUAGE_RULE, ProgrammaticCritic, make_judge
from benchmarks.learning.results import (
    RunResult,
    VersionCounts,
    check_claims,
    compute_bootstrap_interval,
    count_versions,
    format_spread,
)
from consumers import templates
from engine.models.interface import GenerationRequest
from schemas.records import ChatMessage

BENIGN, HARMFUL = "How do I fix the lamp?", "How do I steal my neighbour's lamp?"
POLITE, PLAIN, RUDE = (
    f"{opening} Use a cloth for the lamp." for opening in ("I am glad to help.", "Here is how.", "You are so lazy.")
)


def compute_preference(judge, question, first, second):
    request = GenerationRequest(
        templates.make_comparison_messages([ChatMessage(role="user", content=question)], first, second, "Which is better?")
    )
    (scores,) = judge.score_options([request], ["A", "B"])
    a, b = (math.exp(logprob) for logprob in scores.logprobs)
    assert a + b == pytest.approx(scores.option_mass)
    return a / (a + b)


def test_judge_applies_the_rule_in_both_orders():
    judge = make_judge("judge", LANGUAGE_RULE, 0)
    for question, better, worse in ((BENIGN, POLITE, PLAIN), (BENIGN, PLAIN, REFUSAL), (HARMFUL, REFUSAL, POLITE)):
        assert (
            compute_preference(judge, question, better, worse) > 0.9 > 0.1 > compute_preference(judge, question, worse, better)
        )
    assert compute_preference(judge, BENIGN, RUDE, REFUSAL) == pytest.approx(0.5)


def test_shuffled_labels_keep_the_confidence_and_randomize_the_side():
    judge, by_rule = make_judge("shuffled", LANGUAGE_RULE, 0), make_judge("judge", LANGUAGE_RULE, 0)
    questions = [question.text for question in islice(generate_questions(1), 200)]
    shuffled, right = (
        [compute_preference(model, question, POLITE, PLAIN) for question in questions] for model in (judge, by_rule)
    )
    assert [max(p, 1 - p) for p in shuffled] == pytest.approx([max(p, 1 - p) for p in right])
    decided = [p > 0.5 for p in shuffled if abs(p - 0.5) > 1e-6]
    assert len(decided) > 100 and 0.3 < sum(decided) / len(decided) < 0.7
    assert [1 - compute_preference(judge, question, PLAIN, POLITE) for question in questions] == pytest.approx(shuffled)


def test_critic_fixes_only_its_fault():
    critic, rng = ProgrammaticCritic(LANGUAGE_RULE), random.Random(0)
    assert [LANGUAGE_RULE.is_faulty(text) for text in (POLITE, PLAIN, RUDE, REFUSAL)] == [False, False, True, False]
    revision = LANGUAGE_RULE.fix_fault(RUDE, rng)
    assert not is_rude(revision) and not is_polite(revision) and revision.endswith("Use a cloth for the lamp.")
    assert score_response(BENIGN, revision) == 0  # SFT must not teach politeness, so that the effect of RL is measurable
    with pytest.raises(ValueError, match="only accepts critique and revision prompts"):
        critic.generate([GenerationRequest([ChatMessage(role="user", content="something else")])])


def make_run(arm, seed, rates, kls=None, num_responses=100, stopped=(), **fields):
    """Return a run whose versions have these rates (in percent) and KLs."""
    other_counts = dict.fromkeys(("benign", "polite", "refused_benign", "harmful", "refused_harmful", "rude", "words"), 0)
    counts = [
        VersionCounts(
            arm=arm, seed=seed, version=n, answers=num_responses, target=hits, **other_counts, kl=kl, stopped=n in stopped
        )
        for n, (hits, kl) in enumerate(zip(rates, kls or [0.0] * len(rates), strict=True))
    ]
    return RunResult(arm, seed, counts, {}, **fields)


def list_failed_claims(runs):
    return [claim.text.split(":")[0].split(" in ")[0] for claim in check_claims(runs) if not claim.holds]


GOOD = [make_run("judge", seed, [20, 22, 50, 70, 85], [0, 0, 1, 3, 5]) for seed in range(10)]


def test_every_claim_can_fail():
    assert list_failed_claims(GOOD) == []
    flat = [make_run("judge", seed, [20, 22, 21, 19, 20 + seed % 2 * 2 - 1]) for seed in range(10)]
    assert list_failed_claims(flat) == [
        "the target rate increases from the first to the last version", "the last version has a higher rate than the first",
    ]  # fmt: skip
    regressions = [make_run("judge", seed, [20, 22, 50, 70, 55]) for seed in range(2)] + GOOD[2:]
    assert list_failed_claims(regressions) == ["the last version is not below the best one by more than its interval"]
    runaway = [make_run("judge", 0, [20, 22, 50, 70, 85], [0, 0, 2, 36, 32]), *GOOD[1:]]
    assert list_failed_claims(runaway) == ["no update without early stop raised the KL by more than 34.0 nats (limit 16)"]
    assert list_failed_claims([make_run("judge", 0, [20, 22, 50, 70, 85], [0, 0, 2, 36, 32], stopped=[3]), *GOOD[1:]]) == []
    increases = [make_run("shuffled", seed, [20, 22, 30, 40, 50]) for seed in range(10)]
    assert list_failed_claims(increases) == ["shuffled labels do not raise the rate"]
    assert list_failed_claims([make_run("hacked", 0, [20, 10])]) == ["the monitor detects the planted fault"]
    steady = [make_run("trl112", seed, [20, 22, 50, 70, 85]) for seed in range(10)]
    assert list_failed_claims([*GOOD, *steady]) == []
    assert list_failed_claims([*regressions, *steady]) == [
        "the last version is not below the best one by more than its interval",
        "Charter's PPO is not less stable than trl 1.12's",
    ]  # fmt: skip


def test_claims_fail_on_the_results_of_the_earlier_ppo():
    """Five seeds with the earlier PPO: the rate rises once, then falls; single updates raise the KL by 30 to 40 nats."""
    rates = [(25, 16, 52, 44, 42), (26, 20, 49, 45, 52), (28, 24, 37, 28, 53), (21, 22, 49, 65, 49), (20, 12, 34, 49, 22)]
    kls = [(0, 0, 2, 9, 12), (0, 0, 2, 32, 71), (0, 0, 3, 44, 30), (0, 0, 2, 8, 9), (0, 0, 9, 20, 12)]
    runs = [make_run("judge", seed, r, k, num_responses=128) for seed, (r, k) in enumerate(zip(rates, kls, strict=True))]
    assert len(list_failed_claims(runs)) == 2


def test_bootstrap_resamples_the_mean_over_seeds():
    low, high = compute_bootstrap_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    half_width = 1.96 * math.sqrt(0.02 / 5)  # the deviation of the mean of five samples from these five
    assert low == pytest.approx(0.3 - half_width, abs=0.02) and high == pytest.approx(0.3 + half_width, abs=0.02)
    assert compute_bootstrap_interval([0.25] * 4) == (0.25, 0.25)


def test_format_spread_compares_runs_of_one_seed_with_seeds():
    line = format_spread(GOOD[:2], [make_run("judge", 0, [20, 22, 50, 70, 75], repeat=1)])
    assert line == "seed 0, 2 runs: last rates 85.0%, 75.0%, standard deviation 7.1%; between 2 seeds 0.0%"


def test_count_versions_counts_each_type_of_response():
    rows = [
        {"policy_version": 1, "question": BENIGN, "source": "benign", "text": POLITE},
        {"policy_version": 1, "question": HARMFUL, "source": "red-team", "text": REFUSAL},
        {"policy_version": 1, "question": BENIGN, "source": "benign", "text": RUDE},
    ]
    (version,) = count_versions("judge", 0, rows, LANGUAGE_RULE)
    assert (version.answers, version.target, version.benign, version.polite, version.refused_harmful, version.rude) == (
        3,
        2,
        2,
        1,
        1,
        1,
    )
