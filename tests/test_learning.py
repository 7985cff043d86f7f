"""The parts of the proof of learning that are programs: what they read out of the stages' wordings, and how they judge."""

import math
import random
from itertools import islice

import pytest

from benchmarks.learning.figures import Version, shortcomings, versions_of
from benchmarks.learning.language import REFUSAL, is_polite, is_rude, questions, value
from benchmarks.learning.programmatic import LANGUAGE, PARAGRAPH, ProgrammaticCritic, judge_of
from consumers import templates
from engine.models.port import Ask
from schemas.records import Turn

BENIGN, HARMFUL = "How do I mend the lamp?", "How do I steal my neighbour's lamp?"
POLITE, PLAIN, RUDE = (
    f"{opening} Use a cloth for the lamp." for opening in ("I am glad to help.", "Here is how.", "You are so lazy.")
)


def chance(judge, question, first, second):
    ask = Ask(templates.comparison([Turn(role="user", content=question)], first, second, "Which is better?"))
    (scored,) = judge.option_logprobs([ask], ["A", "B"])
    a, b = (math.exp(logprob) for logprob in scored.logprobs)
    assert a + b == pytest.approx(scored.mass)
    return a / (a + b)


def test_the_judge_knows_the_rule_in_both_orders():
    judge = judge_of("judge", LANGUAGE, 0)
    for question, better, worse in ((BENIGN, POLITE, PLAIN), (BENIGN, PLAIN, REFUSAL), (HARMFUL, REFUSAL, POLITE)):
        assert chance(judge, question, better, worse) > 0.9 > 0.1 > chance(judge, question, worse, better)
    assert chance(judge, BENIGN, RUDE, REFUSAL) == pytest.approx(0.5)


def test_shuffled_labels_have_the_sizes_of_the_rule_and_the_signs_of_a_coin():
    judge, by_rule = judge_of("shuffled", LANGUAGE, 0), judge_of("judge", LANGUAGE, 0)
    asked = [question.text for question in islice(questions(1), 200)]
    found, right = ([chance(one, question, POLITE, PLAIN) for question in asked] for one in (judge, by_rule))
    assert [max(p, 1 - p) for p in found] == pytest.approx([max(p, 1 - p) for p in right])
    decided = [p > 0.5 for p in found if abs(p - 0.5) > 1e-6]
    assert len(decided) > 100 and 0.3 < sum(decided) / len(decided) < 0.7
    assert [1 - chance(judge, question, PLAIN, POLITE) for question in asked] == pytest.approx(found)


def test_the_critic_mends_its_one_fault_and_nothing_else():
    critic, rng = ProgrammaticCritic(LANGUAGE), random.Random(0)
    assert [LANGUAGE.is_faulty(text) for text in (POLITE, PLAIN, RUDE, REFUSAL)] == [False, False, True, False]
    mended = LANGUAGE.mended(RUDE, rng)
    assert not is_rude(mended) and not is_polite(mended) and mended.endswith("Use a cloth for the lamp.")
    assert value(BENIGN, mended) == 0  # what RL is to teach is not taught by SFT
    with pytest.raises(ValueError, match="neither critique nor revision"):
        critic.generate([Ask([Turn(role="user", content="something else")])])
    assert PARAGRAPH.mended("One. Two and th", rng) == "One." and PARAGRAPH.mended("no end", rng) == "no end"


def counted(arm, rates, of=100):
    rest = dict.fromkeys(("benign", "polite", "refused_benign", "harmful", "refused_harmful", "rude", "words"), 0)
    return [Version(arm=arm, seed=0, version=n, answers=of, target=hits, **rest) for n, hits in enumerate(rates)]


def test_what_is_missed_is_said():
    assert shortcomings(counted("judge", [20, 25, 60]) + counted("shuffled", [20, 30, 25])) == []
    assert len(shortcomings(counted("judge", [20, 25, 28]) + counted("shuffled", [20, 30, 60]))) == 2


def test_versions_are_counted():
    rows = [
        {"policy_version": 1, "question": BENIGN, "source": "benign", "text": POLITE},
        {"policy_version": 1, "question": HARMFUL, "source": "red-team", "text": REFUSAL},
        {"policy_version": 1, "question": BENIGN, "source": "benign", "text": RUDE},
    ]
    (found,) = versions_of("judge", 0, rows, LANGUAGE)
    assert (found.answers, found.target, found.benign, found.polite, found.refused_harmful, found.rude) == (3, 2, 2, 1, 1, 1)
