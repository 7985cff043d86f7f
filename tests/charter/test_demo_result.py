"""The result at the end of `charter demo`, its judge, and its inputs. tests/test_demo.py runs the demo."""

from dataclasses import replace

import pytest

from charter.commands.demo import demo
from charter.demo import DEMO_PRESET
from charter.demo_evaluation import describe_difference
from charter.evaluation.results import ComparisonRow, SuiteCompletion, SuiteGrade, compare_policies
from charter.evaluation.suites import ONE_SENTENCE, open_suite
from charter.grader_judge import GraderJudge
from consumers.compare import Question, compare_in_both_orders
from consumers.graders.one_sentence import OneSentenceGrader, grade_form
from consumers.templates import COMPARISON_TEMPLATE, make_comparison_messages
from engine.models.interface import GenerationRequest
from producers.files import DEMONSTRATIONS_PATH, SHIPPED_PROMPTS_PATH
from producers.parse import parse_demonstration, parse_prompt
from producers.rows import read_rows
from schemas.records import ChatMessage

DIALOGUE = (ChatMessage(role="user", content="Why is\nthe sky blue?"),)
SHORT, LONG = "Air scatters blue light most.", "It is air. Air scatters blue light.\n> It scatters it a lot."


def compare(num_a, num_b, total=24):
    """Return the comparison of two policies of which the first responses follow the constitution."""
    completions = [
        SuiteCompletion(
            policy, ONE_SENTENCE, "", "", str(n), False,
            {ONE_SENTENCE: SuiteGrade("follows" if n < number else "deviates", {})},
        )
        for policy, number in ((0, num_a), (3, num_b))
        for n in range(total)
    ]  # fmt: skip
    (row,) = compare_policies(completions, 0, 3, 0.05)
    return describe_difference(row, 0, 3)


def test_effect_and_no_effect_are_described_from_the_measurement():
    assert compare(1, 20).startswith("Policy 3 answers in one short sentence more often than policy 0: +79%")
    assert compare(20, 1).startswith("Policy 3 answers in one short sentence less often than policy 0: -79%")
    for same in ((5, 5), (5, 6), (6, 5), (0, 0)):
        assert compare(*same).startswith("No effect was measured between policy 0 and policy 3")


def test_a_comparison_without_grades_is_no_effect():
    row = ComparisonRow("one-sentence", "", "", "one short sentence", 0)
    assert "no effect was measured" in describe_difference(row, 0, 3)
    assert "no effect was measured" in describe_difference(replace(row, difference=0.5, low=None, high=None), 0, 3)


def test_judge_prefers_the_response_with_the_higher_score():
    judge = GraderJudge(OneSentenceGrader())

    def ask(first, second):
        return Question(make_comparison_messages(DIALOGUE, first, second, "Which is better?", COMPARISON_TEMPLATE))

    pairs = [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT + " "), ("> " + SHORT, LONG)]
    results = compare_in_both_orders(judge, [(ask(a, b), ask(b, a)) for a, b in pairs])
    margins = [grade_form(a, is_cut=False).score - grade_form(b, is_cut=False).score for a, b in pairs]
    assert [(result.p_mean > 0.5) - (result.p_mean < 0.5) for result in results] == [(m > 0) - (m < 0) for m in margins]
    assert [round(result.p_mean, 2) for result in results[:3]] == [0.96, 0.04, 0.5]
    assert not any(result.position_flip for result in results)
    with pytest.raises(ValueError, match="not a comparison"):
        judge.score_options([GenerationRequest(DIALOGUE)], ("A", "B"))
    assert DEMO_PRESET["models"]["judge"] == judge.id


def test_inputs_of_the_demo_are_enough_and_disjoint():
    default = next(option.default for option in demo.params if option.name == "prompts")
    rows = list(read_rows(str(DEMONSTRATIONS_PATH)))
    examples = [parse_demonstration(row, source="", max_chars=1000) for _, row in rows]
    assert len(examples) == default and {example.source for example in examples} == {"helpful"}
    assert [e.completion for e in examples if grade_form(e.completion, is_cut=False).label != "follows"] == []
    shipped = [parse_prompt(row, source="", max_chars=1000).messages for _, row in read_rows(str(SHIPPED_PROMPTS_PATH))]
    evaluated = {p.messages for p in open_suite(f"{ONE_SENTENCE}={SHIPPED_PROMPTS_PATH}", "", 1000).prompts[-default:]}
    assert len(evaluated) == default
    assert not evaluated & {*shipped[:default], *(example.messages for example in examples)}
