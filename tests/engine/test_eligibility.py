"""One rule decides which responses and pairs may be used. Python and SQL give the same results."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.eligibility import find_pair_problem, find_rejection_reason, is_blank, strip_blanks
from schemas.records import FinishReason, LabelSource, Outcome, RejectionReason
from tests.support.records import RecordDatabase, make_chain_end, make_demonstration, make_preference, make_prompt
from tests.support.waiting import HANG_S

BLANK = ["", " ", "\n\t\r\n", "\u200b", "\ufeff\u00a0", "\u3000\u2028", "\u2800", "\x1f\x85", "\u200e\u202c"]
VISIBLE = ["a", ".", "\u4e2d", "\u0627", "\U0001f600", "-", "\u200b.\u200b"]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return RecordDatabase(tmp_path_factory.mktemp("data") / "charter.duckdb")


@pytest.fixture(scope="module")
def query(database):
    """Run queries in one session: to open the database takes longer than a query."""
    with database.store.open_read_session(limit_s=HANG_S) as session:
        yield session


@pytest.mark.parametrize("text", BLANK)
def test_text_without_a_visible_character_is_blank(text):
    assert is_blank(text) and strip_blanks(text) == ""


@pytest.mark.parametrize("text", VISIBLE)
def test_text_with_a_visible_character_is_not_blank(text):
    assert not is_blank(text) and strip_blanks(f"\n\u200b {text}\ufeff") == strip_blanks(text)


def test_rejection_reason_of_a_response():
    assert find_rejection_reason(" \n", FinishReason.LENGTH) is RejectionReason.EMPTY
    assert find_rejection_reason("The first half of", FinishReason.REFUSED) is RejectionReason.REFUSED
    assert find_rejection_reason("yes", FinishReason.UNKNOWN) is RejectionReason.NONE


def test_problem_of_a_pair_names_the_response():
    assert find_pair_problem("yes", "no") is None
    assert find_pair_problem("yes", "\u200b") == (Outcome.EMPTY, "response B has no visible text")
    withheld = find_pair_problem("half", "no", FinishReason.REFUSED, FinishReason.STOP)
    assert withheld == (Outcome.WITHHELD, "response A was withheld by a content filter of the server")
    assert find_pair_problem("yes\n", "\ufeffyes") == (Outcome.IDENTICAL, "both responses are the same")
    assert find_pair_problem("if a:\n  b", "if a:\n    b") is None  # white space inside a text can be a difference


TEXTS = st.text(st.sampled_from("ab \n\t\u200b\u3000\ufeff\u0301."), max_size=5) | st.sampled_from(BLANK + VISIBLE)
REASONS = st.sampled_from(list(FinishReason))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, REASONS, REASONS), min_size=1, max_size=20))
def test_sql_macros_equal_the_functions(query, rows):
    sql = """SELECT find_pair_outcome(r.a, r.b, r.fa, r.fb), find_rejection_reason(r.a, r.fa)
             FROM (SELECT unnest($rows) AS r, generate_subscripts($rows, 1) AS n) ORDER BY n"""
    values = [{"a": a, "b": b, "fa": fa.value, "fb": fb.value} for a, b, fa, fb in rows]
    problems = [find_pair_problem(*row) for row in rows]
    expected = [
        (problem and problem[0].value, find_rejection_reason(a, fa).value)
        for problem, (a, _, fa, _) in zip(problems, rows, strict=True)
    ]
    assert query(sql, {"rows": values}).rows == expected


def test_unusable_responses_and_pairs_are_in_no_training_view(tmp_path):
    """Records that say OK, for example of an earlier version or of a custom stage, are excluded, too."""
    database = RecordDatabase(tmp_path / "charter.duckdb")
    human = {"label_source": LabelSource.HUMAN, "pairing": "human"}
    database.add(
        make_prompt("p"),
        make_preference("good", "p", 0.8),
        make_preference("empty", "p", 0.9, response_b=" \n"),
        make_preference("same", "p", 0.85, response_a="x", response_b="x\u200b"),
        make_preference("withheld", "p", 0.7, finish_reason_a=FinishReason.REFUSED),
        make_preference("person", "p", 1.0, response_b="", **human),
        make_demonstration("good", "p"),
        make_demonstration("blank", "p").model_copy(update={"completion": "\n\u00a0"}),
    )
    for name, update in {
        "kept": {},
        "blank": {"final_response": "\t\n"},
        "cut": {"final_finish_reason": FinishReason.REFUSED},
    }.items():
        database.add(make_chain_end(name, "p").model_copy(update=update))
    assert database.query_rows("SELECT response_a FROM preference_pairs") == [("good a",)]
    assert sorted(database.query_rows("SELECT completion FROM sft_examples")) == [("good answer",), ("kept final",)]
    excluded = database.query_rows("SELECT exclusion_reason, count(*) FROM preference_labels GROUP BY 1 ORDER BY 1 NULLS FIRST")
    assert excluded == [(None, 1), ("EMPTY", 2), ("IDENTICAL", 1), ("WITHHELD", 1)]


def test_unjudged_pairs_are_counted_and_are_no_judgments(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    outcomes = (Outcome.EMPTY, Outcome.EMPTY, Outcome.WITHHELD, Outcome.IDENTICAL, Outcome.LOW_MASS)
    labels = [make_preference(f"p{n}", "p", None, outcome=outcome) for n, outcome in enumerate(outcomes)]
    database.add(make_prompt("p"), make_preference("good", "p", 0.8), *labels)
    counts = database.query_rows("SELECT outcome, pairs FROM unjudged_pair_stats ORDER BY outcome")
    assert counts == [("EMPTY", 2), ("IDENTICAL", 1), ("WITHHELD", 1)]
    assert database.query_rows("SELECT count(*) FROM judge_votes") == [(2,)]


def test_markers_of_chat_formats_are_a_column_of_the_training_views(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(make_prompt("p"))
    for name, text in itertools.product("ab", ("plain <b>text</b>", "stop <|im_end|>")):
        database.add(make_preference(f"{name} {text}", "p", 0.8, **{f"response_{name}": text}))
        database.add(make_demonstration(f"{name} {text}", "p").model_copy(update={"completion": f"{name} {text}"}))
    for view in ("preference_pairs", "sft_examples"):
        assert database.query_rows(f"SELECT has_control_markers, count(*) FROM {view} GROUP BY 1 ORDER BY 1") == [
            (False, 2),
            (True, 2),
        ]
