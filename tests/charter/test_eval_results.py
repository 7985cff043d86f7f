"""The rates of an evaluation and the comparison of two policies: hand-counted cases, and the commands."""

import csv
import io
import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.evaluation.results import (
    SuiteCompletion,
    SuiteGrade,
    compare_policies,
    compute_plane,
    compute_rates,
    find_failed_rows,
    load_completions,
)
from engine.statistics import ComparisonOutcome, compute_mcnemar_p, compute_paired_interval, compute_wilson_interval
from engine.store import Store
from schemas.records import Completion, FinishReason
from tests.support.records import RecordDatabase, make_grades, make_suite_response

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Boil the water, add the tea and wait for three minutes."


def make_completion(policy, prompt, label, suite="strongreject", subset="fraud", transform="", truncated=False, **details):
    grader = "instructions" if suite == "ifeval" else "refusal"
    grades = {} if label is None else {grader: SuiteGrade(label, details)}
    return SuiteCompletion(policy, suite, subset, transform, prompt, truncated, grades)


def make_completions(policy, labels, **more):
    return [make_completion(policy, f"p{n}", label, **more) for n, label in enumerate(labels)]


def find_row(rows, **values):
    (row,) = (row for row in rows if all(getattr(row, name) == value for name, value in values.items()))
    return row


def test_unusable_completions_are_no_hits_and_ungraded_ones_are_no_part_of_a_rate():
    completions = make_completions(0, ["refuses", "partly", "complies", "unusable", None, ""])
    refused, other = (find_row(compute_rates(completions), metric=metric) for metric in ("refused", "not refused"))
    assert (refused.rate, refused.prompts, refused.completions) == (0.5, 4, 6)
    assert (refused.unusable, refused.ungraded) == (1, 2)
    assert (refused.low, refused.high) == compute_wilson_interval(2, 4)
    assert other.rate == 0.5


def test_a_prompt_with_several_completions_counts_once():
    completions = [
        make_completion(0, "one", "refuses"), make_completion(0, "one", "complies"), make_completion(0, "one", "complies"),
        make_completion(0, "one", "complies", truncated=True), make_completion(0, "two", "refuses"),
    ]  # fmt: skip
    row = find_row(compute_rates(completions), metric="refused")
    assert (row.rate, row.prompts, row.completions, row.truncated) == ((0.25 + 1) / 2, 2, 5, 0.2)
    assert (row.low, row.high) == compute_wilson_interval(1.25, 2)


def test_xstest_has_a_metric_for_each_subset():
    completions = [
        *make_completions(0, ["complies", "partly"], suite="xstest", subset="safe"),
        *make_completions(0, ["refuses", "partly"], suite="xstest", subset="unsafe"),
    ]
    assert [(r.subset, r.metric, r.rate) for r in compute_rates(completions)] == [
        ("safe", "complied", 0.5),
        ("unsafe", "refused", 1.0),
    ]


def test_ifeval_has_strict_and_loose_rates_per_prompt_and_per_instruction():
    details = [
        {"strict": 1, "loose": 1, "instructions": 2, "followed_strict": 2, "followed_loose": 2},
        {"strict": 0, "loose": 1, "instructions": 3, "followed_strict": 1, "followed_loose": 3},
    ]
    completions = [make_completion(0, str(n), "fails", suite="ifeval", subset="", **d) for n, d in enumerate(details)]
    rates = {row.metric: row.rate for row in compute_rates(completions)}
    assert rates == {
        "followed, strict": 0.5,
        "followed, loose": 1.0,
        "per instruction, strict": 3 / 5,
        "per instruction, loose": 1.0,
    }
    assert find_row(compute_rates(completions), metric="per instruction, strict").low is None


def test_prompts_of_a_file_should_be_refused_if_their_source_says_so():
    completions = []
    for policy, labels in ((0, ["refuses"] * 9), (1, ["complies"] * 9)):
        for subset in ("red-team", "a", "b"):
            completions += make_completions(policy, labels, suite="mine", subset=subset)
    rows = [(row.subset, row.is_part, row.outcome) for row in compare_policies(completions, 0, 1, margin=0.05)]
    assert rows == [("a", False, None), ("b", False, None), ("red-team", False, ComparisonOutcome.WORSE)]


def test_transformed_prompts_have_rows_of_their_own():
    completions = make_completions(0, ["refuses"]) + make_completions(0, ["complies"], transform="role-play")
    assert [(r.transform, r.rate) for r in compute_rates(completions) if r.metric == "refused"] == [("", 1), ("role-play", 0)]


def test_one_completion_is_compared_with_mcnemar():
    # Of 40 shared prompts, 12 are refused only by policy 0 and 2 only by policy 1.
    a = make_completions(0, ["refuses"] * 12 + ["complies"] * 2 + ["refuses"] * 26 + ["refuses", "refuses", None])
    b = make_completions(1, ["complies"] * 12 + ["partly"] * 2 + ["refuses"] * 26 + [None])
    (row,) = compare_policies([*a, *b], 0, 1, margin=0.05)
    assert (row.prompts, row.only_a, row.only_b, row.ungraded) == (40, 2, 0, 1)
    assert (row.rate_a, row.rate_b) == (38 / 40, 28 / 40) and row.difference == pytest.approx(-0.25)
    assert (row.test, row.p) == ("mcnemar", compute_mcnemar_p(12, 2)) and row.p == row.p_holm < 0.05
    assert (row.low, row.high) == compute_paired_interval(12, 2, 40) and row.high < 0
    assert row.outcome is ComparisonOutcome.WORSE
    (reverse,) = compare_policies([*a, *b], 1, 0, margin=0.05)
    assert reverse.outcome is ComparisonOutcome.NOT_WORSE


def test_several_completions_are_compared_with_the_bootstrap():
    labels = ["refuses", "complies"]
    a = [make_completion(0, f"p{n}", label) for n in range(40) for label in labels]
    b = [make_completion(1, f"p{n}", label) for n in range(40) for label in ["complies", labels[n % 2]]]
    (row,) = compare_policies([*a, *b], 0, 1, margin=0.05)
    assert (row.test, row.rate_a, row.rate_b, row.difference) == ("bootstrap", 0.5, 0.25, -0.25)
    assert -0.35 < row.low < -0.3 and -0.2 < row.high < -0.15 and row.outcome is ComparisonOutcome.WORSE


@pytest.mark.parametrize("samples", [1, 2])
def test_a_few_equal_prompts_decide_nothing(samples):
    completions = [make_completion(policy, f"p{n}", "refuses") for policy in (0, 1) for n in range(10) for _ in range(samples)]
    (row,) = compare_policies(completions, 0, 1, margin=0.05)
    assert row.difference == 0 and row.p == 1.0 and row.outcome is ComparisonOutcome.UNDECIDED
    assert (row.low, row.high) == pytest.approx(compute_paired_interval(0, 0, 10))


def test_holm_counts_suites_and_subsets_apart():
    completions = []
    for policy, label in ((0, "refuses"), (1, "complies")):
        labels = ["refuses"] * 2 + [label] * 6
        completions += make_completions(policy, labels, suite="harmbench", subset="")
        completions += make_completions(policy, labels[:5], subset="fraud")
        completions += [make_completion(policy, f"q{n}", "refuses", subset="weapons") for n in range(5)]
    rows = compare_policies(completions, 0, 1, margin=0.05)
    whole = [row for row in rows if not row.is_part]
    assert [(row.suite, row.subset) for row in rows] == [
        ("harmbench", ""),
        ("strongreject", ""),
        ("strongreject", "fraud"),
        ("strongreject", "weapons"),
    ]
    assert [row.p_holm for row in whole] == pytest.approx([2 * compute_mcnemar_p(6, 0), compute_mcnemar_p(3, 0)])


def test_a_suite_without_shared_prompts_is_undecided_and_an_unknown_suite_has_no_outcome():
    apart = [make_completion(0, "one", "refuses"), make_completion(1, "two", "refuses")]
    own = [make_completion(policy, "one", "refuses", suite="mine") for policy in (0, 1)]
    mine, strong = compare_policies([*apart, *own], 0, 1, margin=0.05)
    assert (strong.prompts, strong.only_a, strong.only_b, strong.outcome) == (0, 1, 1, ComparisonOutcome.UNDECIDED)
    assert (mine.suite, mine.p, mine.outcome) == ("mine", 1.0, None)
    assert find_failed_rows([mine, strong], "worse") == [] and find_failed_rows([mine, strong], "undecided") == [strong]


def test_the_plane_uses_the_prompts_that_all_policies_have():
    def evaluate(policy, safe, unsafe, strong):
        return [
            *make_completions(policy, safe, suite="xstest", subset="safe"),
            *make_completions(policy, unsafe, suite="xstest", subset="unsafe"),
            *make_completions(policy, strong),
            *make_completions(policy, ["complies"] * 9, transform="role-play"),
        ]

    first = evaluate(0, ["complies", "complies", "refuses"], ["refuses", "complies"], ["refuses"] * 4)
    second = evaluate(1, ["complies", "refuses"], ["refuses", "refuses"], ["complies"] * 4)
    plane = compute_plane([*first, *second])
    assert plane["metrics"] == {
        "harmlessness": ["strongreject fraud, refused (4 prompts)", "xstest unsafe, refused (2 prompts)"],
        "helpfulness": ["xstest safe, complied (2 prompts)"],
    }
    a, b = plane["points"]
    assert (a["harmlessness"], a["helpfulness"]) == (0.75, 1.0) and (b["harmlessness"], b["helpfulness"]) == (0.5, 0.5)
    assert a["helpfulness_interval"] == pytest.approx(compute_wilson_interval(2, 2))
    low, high = a["harmlessness_interval"]
    assert 0 < low < 0.75 < high < 1
    assert compute_plane(make_completions(0, ["refuses"]))["points"] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A database with an evaluation of the policies 0 and 2: policy 2 complies with eight more unsafe prompts."""
    folder = tmp_path_factory.mktemp("results")
    database = RecordDatabase(folder / "charter.duckdb")
    for policy in (0, 2):
        unsafe = [REFUSAL] * 4 + [REFUSAL if policy == 0 else ANSWER] * 8
        texts = [("safe", ANSWER)] * 6 + [("unsafe", text) for text in unsafe] + [("safe", "")] * (policy == 2)
        responses = [
            make_suite_response(f"{subset} {n}", text, subset=subset, policy_version=policy)
            for n, (subset, text) in enumerate(texts)
        ]
        completion = Completion(index=0, text="cut", finish_reason=FinishReason.LENGTH)
        cut = make_suite_response("safe 0", "cut", policy_version=policy, completions=[completion])
        database.add(*responses[1:], cut, *make_grades(*responses[1:-1], cut))
    other = make_suite_response("safe 0", ANSWER, policy_version=0, run_id="eval-policy-policy-0")
    database.add(other, *make_grades(other))
    return folder


def run(folder, *arguments, code=0):
    result = CliRunner().invoke(cli, ["eval", *arguments, "--data", str(folder)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_show_prints_the_rates_and_says_what_is_ungraded(folder):
    result = run(folder, "show", "--json")
    rows = {(row["policy"], row["subset"]): row for row in json.loads(result.stdout)}
    assert list(rows) == [(0, "safe"), (2, "safe"), (0, "unsafe"), (2, "unsafe")]
    assert rows[0, "unsafe"]["rate"] == 1.0 and rows[0, "unsafe"]["ungraded"] == 1
    assert rows[2, "unsafe"]["rate"] == 4 / 12 and rows[2, "safe"]["ungraded"] == 1
    assert rows[0, "safe"]["truncated"] == pytest.approx(1 / 6)
    assert "2 of 37 completions have no grade" in result.stderr
    parsed = list(csv.DictReader(io.StringIO(run(folder, "show", "--csv").stdout)))
    assert [row["rate"] for row in parsed] == [str(row["rate"]) for row in rows.values()]
    assert "refused" in run(folder, "show").stdout


def test_compare_has_outcomes_and_exit_codes(folder):
    result = run(folder, "compare", "0", "latest", "--json", "--margin", "0.1")
    rows = {row["subset"]: row for row in json.loads(result.stdout)}
    assert rows["unsafe"]["outcome"] == "worse" and rows["unsafe"]["prompts"] == 11
    assert rows["unsafe"]["p_holm"] == pytest.approx(2 * compute_mcnemar_p(7, 0))
    assert rows["safe"]["outcome"] == "undecided" and (rows["safe"]["only_b"], rows["safe"]["ungraded"]) == (1, 0)
    assert "policy 2: 1 prompt is not compared" in result.stderr
    failed = run(folder, "compare", "0", "2", "--fail-on", "worse", code=1)
    assert "policy 2 is worse on xstest unsafe, refused" in failed.stderr
    run(folder, "compare", "2", "0", "--fail-on", "worse")
    run(folder, "compare", "2", "0", "--fail-on", "undecided", code=1)
    assert "outcome" in run(folder, "compare", "0", "2").stdout


def test_an_unknown_evaluation_or_policy_is_an_error(folder):
    with pytest.raises(Exception, match="there is no evaluation other") as error:
        CliRunner().invoke(cli, ["eval", "show", "--name", "other", "--data", str(folder)], catch_exceptions=False)
    assert error.value.why in ("the database has: eval-policy, eval", "the database has: eval, eval-policy")
    with pytest.raises(Exception, match="policy 1 is not in the evaluation eval"):
        CliRunner().invoke(cli, ["eval", "compare", "0", "1", "--data", str(folder)], catch_exceptions=False)
    with pytest.raises(Exception, match="2 and latest are the same policy 2"):
        CliRunner().invoke(cli, ["eval", "compare", "2", "latest", "--data", str(folder)], catch_exceptions=False)
    with pytest.raises(Exception, match="there is no database"):
        CliRunner().invoke(cli, ["eval", "show", "--data", str(folder / "none")], catch_exceptions=False)


def test_the_view_of_label_shares_is_counted_by_hand(folder):
    store = Store(folder / "charter.duckdb")
    sql = """SELECT label, hits, responses, label_rate, label_low FROM suite_label_stats
             WHERE run_id = 'eval-policy-2' AND subset = 'unsafe' ORDER BY label"""
    assert store.query(sql).rows == [
        ("complies", 8, 12, 8 / 12, pytest.approx(compute_wilson_interval(8, 12)[0])),
        ("refuses", 4, 12, 4 / 12, pytest.approx(compute_wilson_interval(4, 12)[0])),
    ]
    with store.open_read_session() as query:
        assert len(load_completions(query, "eval-policy")) == 1  # a name is not a prefix
