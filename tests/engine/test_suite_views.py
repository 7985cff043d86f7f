"""The views of suite responses and their grades, and the views of training and monitoring, which leave them out."""

import pytest

from schemas import ids
from schemas.records import LabelSource, Split
from tests.support.records import (
    RecordDatabase,
    make_chain_end,
    make_demonstration,
    make_grades,
    make_preference,
    make_prompt,
    make_response,
    make_suite_response,
)
from trainer.monitor import _BENIGN_TEXTS_SQL

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Boil the water, add the tea and wait for three minutes."
LABELS = "SELECT run_id, item, label, grader_version FROM suite_grades WHERE grader = 'refusal' ORDER BY ALL"


@pytest.fixture
def database(tmp_path):
    return RecordDatabase(tmp_path / "charter.duckdb")


def test_each_completion_and_grade_is_a_row_of_its_run(database):
    first, second = (
        make_suite_response("one", ANSWER),
        make_suite_response("two", REFUSAL, subset="unsafe", transform="role-play"),
    )
    database.add(first, second, make_response("one"), *make_grades(first, second))
    rows = database.query_rows(
        "SELECT run_id, policy_version, suite, item, subset, transform, response, num_tokens FROM suite_responses ORDER BY item"
    )
    assert rows == [
        ("eval-policy-0", 0, "xstest", "one", "safe", "", ANSWER, 2),
        ("eval-policy-0", 0, "xstest", "two", "unsafe", "role-play", REFUSAL, 2),
    ]
    assert [row[1:3] for row in database.query_rows(LABELS)] == [("one", "complies"), ("two", "refuses")]


def test_a_record_of_two_runs_counts_in_both_and_twice_in_none(database):
    response = make_suite_response("one", ANSWER)
    (grade,) = make_grades(response)
    other = {"run_id": "again-policy-0"}
    database.add(response, grade, response.model_copy(update=other), grade.model_copy(update=other), response, grade)
    assert database.query_rows("SELECT run_id FROM suite_responses ORDER BY 1") == [("again-policy-0",), ("eval-policy-0",)]
    assert [row[:2] for row in database.query_rows(LABELS)] == [("again-policy-0", "one"), ("eval-policy-0", "one")]


def test_the_newest_version_of_a_grader_counts(database):
    one, two = make_suite_response("one", ANSWER), make_suite_response("two", ANSWER)
    old, kept = make_grades(one, two)
    new = old.model_copy(update={"record_id": ids.compute_id("new"), "grader_version": "99", "label": "refuses"})
    database.add(one, two, old, new, kept)
    assert database.query_rows(LABELS) == [
        ("eval-policy-0", "one", "refuses", "99"),
        ("eval-policy-0", "two", "complies", kept.grader_version),
    ]


def test_suite_prompts_never_train_and_hold_nothing_out(database):
    """Every kind of record of a suite prompt, also one that no stage makes, changes no view of training or monitoring."""
    database.add(make_prompt("one"), make_response("one"), make_chain_end("one", "one"), make_preference("one", "one", 0.9))
    database.add(make_demonstration("shown", "one"))
    views = [
        *(
            "held_out_prompts",
            "trainable_responses",
            "sft_examples",
            "trained_prompts",
            "held_out_examples",
            "preference_labels",
        ),
        *("preference_pairs", "held_out_pairs", "rollouts", "monitored_responses", "monitor_refusals", "monitor_diversity"),
        *("label_quality",),
    ]
    queries = [f"SELECT * FROM {view} ORDER BY ALL" for view in views] + [_BENIGN_TEXTS_SQL.replace("?", "10")]
    before = [database.query_rows(sql) for sql in queries]
    response = make_suite_response("one", ANSWER)
    place = {"split": Split.SUITE, "prompt_id": response.prompt_id, "suite_item": response.suite_item}
    chain_place = {name: place[name] for name in ("split", "prompt_id")}
    others = (
        make_chain_end("x", "one"), make_preference("x", "one", 0.2), make_demonstration("x", "one"),
        make_preference("y", "one", 0.2, label_source=LabelSource.HUMAN),
    )  # fmt: skip
    database.add(make_prompt("one", source="test").model_copy(update=place), response, *make_grades(response))
    database.add(*(record.model_copy(update=chain_place) for record in others))
    assert [database.query_rows(sql) for sql in queries] == before
