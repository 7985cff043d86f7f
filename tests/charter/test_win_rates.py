"""Win rates by a held-out judge: hand-counted cases, the accuracy of the judge, and the command."""

import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.evaluation.agreement_study import read_pairs
from charter.evaluation.win_rates import (
    JudgeAccuracy,
    compute_win_rates,
    describe_evidence,
    measure_accuracy,
    read_database_accuracy,
)
from engine.errors import UsageError
from engine.statistics import compute_wilson_interval
from schemas.records import ChatMessage, ModelRef
from tests.support.records import RecordDatabase, make_human_label, make_judged_preference, make_suite_response

MESSAGES = (ChatMessage(role="user", content="How?"),)


def write_rows(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def prefer_longer(pairs):
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for _, a, b in pairs]


def test_win_rates_count_ties_half_and_equal_lengths_apart():
    texts = [("a " * 10, "b " * 9), ("a " * 10, "b " * 8), ("a", "b " * 50), ("a a", "b b"), ("c", "d " * 9)]
    pairs = [(MESSAGES, a, b) for a, b in texts]
    every, equal = compute_win_rates(pairs, [0.9, 0.2, 0.1, 0.5, None])
    assert (every.group, every.pairs, every.labeled, every.wins, every.win_rate) == ("all", 5, 4, 2.5, 0.625)
    assert (every.low, every.high) == compute_wilson_interval(2.5, 4)
    assert (equal.group, equal.pairs, equal.labeled, equal.wins) == ("equal length", 2, 2, 0.5)
    assert compute_win_rates([], [])[0].win_rate is None


def make_accuracy(judge, path, chosen, rejected, pairs=12):
    rows = [{"prompt": f"q{n}", "chosen": chosen, "rejected": rejected} for n in range(pairs)]
    return measure_accuracy(judge, path.name, read_pairs(write_rows(path, rows), None, 0))


def test_a_judge_is_measured_on_pairs_with_labels_by_people(tmp_path):
    good = make_accuracy(prefer_longer, tmp_path / "good.json", "long answer", "short", 9)
    assert (good.source, good.pairs, good.decided, good.accuracy, good.is_above_chance) == ("good.json", 9, 9, 1.0, True)
    bad = make_accuracy(prefer_longer, tmp_path / "bad.json", "short", "long answer")
    assert bad.accuracy == 0.0 and not bad.is_above_chance
    assert describe_evidence([good]) == "the judge is above chance"
    assert describe_evidence([good, bad]) == "no evidence: the judge is at chance on bad.json"
    assert describe_evidence([]).startswith("no evidence")


def test_a_judge_without_labels_is_no_evidence(tmp_path):
    accuracy = make_accuracy(lambda pairs: [None for _ in pairs], tmp_path / "people.json", "a", "b", 1)
    assert accuracy.accuracy is None and str(accuracy) == "people.json: no label on 1 pairs"
    assert describe_evidence([accuracy]).startswith("no evidence")


def test_labels_by_people_in_the_database_measure_the_judge(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    labels = [make_judged_preference(str(n), str(n), "a", "b", 0.9, 0.8) for n in range(4)]
    database.add(*labels, *(make_human_label(str(n), label, float(n > 0)) for n, label in enumerate(labels)))
    with database.store.open_read_session() as query:
        accuracy, missing = read_database_accuracy(query, "critic"), read_database_accuracy(query, "other")
    low, high = compute_wilson_interval(3, 4)
    assert accuracy == JudgeAccuracy("labels by people in the database", 4, 4, 0.75, low, high) and missing is None


def test_the_command_compares_two_policies(tmp_path):
    texts = [("one", "two"), ("long answer", "short"), ("same", "same")]
    RecordDatabase(tmp_path / "charter.duckdb").add(
        *(make_suite_response(f"p{n}", pair[v], policy_version=v) for n, pair in enumerate(texts) for v in (0, 1))
    )
    people = write_rows(tmp_path / "people.json", [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(6)])
    row = {"input": "q", "output_1": "x", "output_2": "y", "label": 2}
    llmbar = write_rows(tmp_path / "llmbar.json", [row])
    arguments = ["eval", "win-rate", "0", "latest", "--data", str(tmp_path), "--judge", "scripted"]
    result = CliRunner().invoke(
        cli,
        [*arguments, "--judge-suite", f"pairs={people}", "--judge-suite", f"llmbar={llmbar}", "--json"],
        catch_exceptions=False,
    )
    every, equal = json.loads(result.stdout)
    assert (every["suite"], every["identical"], every["pairs"], every["group"]) == ("xstest", 1, 2, "all")
    assert equal["pairs"] == 1  # one word each
    assert every["judge_accuracy"].startswith("people.json: ")
    assert "llmbar.json: " in every["judge_accuracy"] and every["evidence"].startswith(("no evidence", "the judge"))
    assert f"judge {every['judge']}: {every['evidence']}" in result.stderr
    plain = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "no evidence: the accuracy of the judge is not known" in plain.stderr and "win_rate" in plain.stdout


def test_a_judge_that_labeled_training_data_is_refused(tmp_path):
    label = make_judged_preference("1", "one", "a", "b", 0.9, 0.8).model_copy(
        update={"model": ModelRef(id="scripted", revision="1")}
    )
    RecordDatabase(tmp_path / "charter.duckdb").add(
        label, *(make_suite_response("p", f"text {v}", policy_version=v) for v in (0, 1))
    )
    with pytest.raises(UsageError, match="--judge scripted is the model scripted, which labeled training data"):
        CliRunner().invoke(
            cli, ["eval", "win-rate", "0", "1", "--data", str(tmp_path), "--judge", "scripted"], catch_exceptions=False
        )
