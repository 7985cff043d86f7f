"""Human labels: the question, "not applicable", the name of the labeler, pending labels, and wrapped text."""

import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.labels import is_swapped, parse_key, parse_labeler
from charter.manifests import make_run_manifest
from charter.pipeline import make_host
from charter.runs import SHARED_LABELS_SQL
from constitutions.loader import load_constitution
from consumers.judge import make_constitution_ref
from engine.errors import UsageError
from engine.settings import load_settings
from schemas import ids
from schemas.records import PrincipleVote
from tests.support.records import RecordDatabase, make_human_label, make_preference, make_prompt
from tests.support.waiting import wait_until


@pytest.fixture
def constitution():
    return load_constitution("default")


@pytest.fixture
def settings(tmp_path):
    return load_settings({"data.folder": str(tmp_path / "data"), "models.policy": "scripted"}, environment={})[0]


@pytest.fixture
def pairs(settings, constitution):
    """Three labels of a judge: an unsure label under one principle, a sure label, and a label with two votes."""
    care, *_, other = constitution.judge
    ref = make_constitution_ref(constitution)
    votes = [PrincipleVote(principle_id=p.id, p_forward=0.9, p_backward=0.9, option_mass_forward=1, option_mass_backward=1)
             for p in (care, other)]  # fmt: skip
    records = (
        make_preference("unsure", "x", 0.5, constitution=ref, principle_id=care.id),
        make_preference("sure", "x", 0.9, constitution=ref, principle_id=care.id),
        make_preference("votes", "x", 0.95, constitution=ref, votes=votes),
    )
    database = RecordDatabase(settings.folder / "charter.duckdb")
    database.add(make_run_manifest(settings, constitution), make_prompt("x"), *records)
    return dict(zip(("unsure", "sure", "votes"), records, strict=True))


def run_label(settings, *arguments, stdin=None, code=0):
    result = CliRunner().invoke(cli, ["label", *map(str, arguments), "--data", str(settings.folder)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def store_labels(settings, count):
    """Run the sink until `count` decisions of people are in the database; return the database."""
    bus, store = connect_bus(settings), open_store(settings)
    sql = "SELECT count(*) FROM preferences WHERE label_source = 'HUMAN'"
    with make_host(settings, bus, [], sink=True) as host:
        wait_until(lambda: store.query(sql).rows == [(count,)], host)
    bus.close()
    return store


def unwrap(output):
    return " ".join(output.split())


def test_labeling_shows_the_question_of_the_judge(settings, pairs, constitution):
    output = unwrap(run_label(settings, stdin="s\ns\ns\n"))
    care, *_, other = (unwrap(principle.judge_prompt) for principle in constitution.judge)
    assert f"--- question {care} (principle {pairs['unsure'].principle_id})" in output
    assert f"- {care} - {other}" in output  # a pair with two votes


def test_labeling_says_that_a_question_is_missing(settings):
    database = RecordDatabase(settings.folder / "charter.duckdb")
    database.add(make_prompt("x"), make_preference("p", "x", 0.5, principle_id="kindness"))
    assert "the question of the judge is not in the database (principle kindness)" in unwrap(run_label(settings, stdin="q\n"))


def test_a_pair_that_is_not_applicable_has_no_label(settings, pairs):
    output = run_label(settings, "--labeler", "ana", "--count", "1", stdin="n\n")
    assert "1 label published" in output
    store = store_labels(settings, 1)
    decision = "SELECT outcome, p_a, labeler, parent_ids[1]::VARCHAR FROM preferences WHERE label_source = 'HUMAN'"
    unsure = pairs["unsure"].record_id
    assert store.query(decision).rows == [("NOT_APPLICABLE", None, "ana", unsure)]
    # The judge's label is overridden, so the pair is in no view of labels; it is not shown again.
    for view in ("preference_pairs", "preference_labels WHERE overridden_by IS NULL", "ai_human_labels"):
        assert unsure not in {str(row[0]) for row in store.query(f"SELECT record_id FROM {view}").rows}
    assert "pair 1 of 2; 1 of 3 pairs labeled" in run_label(settings, stdin="q\n")
    # A later label of the same pair counts again.
    run_label(settings, unsure, "--prefer", "a", "--labeler", "ben")
    store = store_labels(settings, 2)
    rows = store.query("SELECT p_a, parent_ids[1]::VARCHAR FROM preferences SEMI JOIN preference_pairs USING (record_id) "
                       "WHERE label_source = 'HUMAN'").rows  # fmt: skip
    assert rows == [(1.0, unsure)]


def test_labels_that_no_sink_has_read_are_not_asked_for_again(settings, pairs):
    run_label(settings, "--count", "1", stdin="1\n")
    output = run_label(settings, stdin="q\n")
    assert "not in the database yet: the human labels of 1 pair;" in output
    assert "pair 1 of 2; 1 of 3 pairs labeled" in output and "unsure a" not in output


def test_lines_of_standard_input_may_name_the_labeler(settings, pairs):
    lines = [
        {"record_id": pairs["unsure"].record_id, "prefer": "not-applicable", "labeler": "ana"},
        {"record_id": pairs["sure"].record_id, "prefer": "b"},
        {"record_id": pairs["sure"].record_id, "prefer": "c"},
        {"record_id": pairs["sure"].record_id, "prefer": "a", "confidence": "high"},
        {"record_id": pairs["sure"].record_id, "prefer": "a", "labeler": ""},
        {"record_id": pairs["sure"].record_id, "prefer": ["a"]},
    ]
    output = run_label(settings, "-", "--labeler", "ben", stdin="\n".join(map(json.dumps, lines)), code=1)
    assert "2 labels published; 4 lines are invalid" in output
    assert "prefer cannot be 'c'" in output and "unknown key 'confidence'" in output and "cannot be ''" in output
    store = store_labels(settings, 2)
    rows = store.query("SELECT labeler, outcome, p_a FROM preferences WHERE label_source = 'HUMAN' ORDER BY labeler").rows
    assert rows == [("ana", "NOT_APPLICABLE", None), ("ben", "OK", 0.0)]


def test_keys_refer_to_the_displayed_order():
    for record_id in ("3f2a", "77aa", "0b1c", "9d9d"):
        first = "b" if is_swapped(record_id) else "a"
        assert parse_key("1", record_id) == first != parse_key("2", record_id)
        assert (parse_key("=", record_id), parse_key("n", record_id)) == ("tie", "not-applicable")
    assert len({is_swapped(record_id) for record_id in ("3f2a", "77aa", "0b1c", "9d9d", "1111", "2222")}) == 2
    with pytest.raises(UsageError, match="'3' is not a label"):
        parse_key("3", "3f2a")


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\u202eb"])
def test_names_that_cannot_be_shown_are_refused(name):
    with pytest.raises(UsageError, match="the name of the labeler cannot be"):
        parse_labeler(name)
    assert parse_labeler(" Ana Müller ") == "Ana Müller"


def test_long_lines_break_between_words(settings):
    words = [f"word{number}" for number in range(200)]
    database = RecordDatabase(settings.folder / "charter.duckdb")
    code = "    if x:\n        return"
    database.add(make_prompt("x"), make_preference("p", "x", 0.5, response_a=" ".join(words), response_b=code))
    output = run_label(settings, stdin="q\n")
    assert set(words) <= set(output.split()) and max(map(len, output.splitlines())) <= 100
    assert "  " + code.replace("\n", "\n  ") in output  # the indentation of code stays


def test_a_human_record_without_a_label_is_shown_in_the_trace(settings, pairs):
    run_label(settings, pairs["sure"].record_id, "--prefer", "not-applicable", "--labeler", "ana")
    store_labels(settings, 1)
    result = CliRunner().invoke(cli, ["show", pairs["sure"].prompt_id[:8], "--data", str(settings.folder)])
    replaced = pairs["sure"].record_id[:8]
    assert f"marked as not applicable by ana, replaces label {replaced}" in result.output, result.output


def test_comparison_of_two_runs_leaves_out_human_labels(settings):
    judged = make_preference("one", "x", 0.6, response_id=ids.compute_id("response"))
    again = make_preference("two", "x", 0.7, run_id="again").model_copy(
        update={name: getattr(judged, name) for name in ("response_id", "response_a", "response_b")}
    )
    database = RecordDatabase(settings.folder / "charter.duckdb")
    database.add(make_prompt("x"), judged, again, make_human_label("person", judged, 0.0))
    (row,) = open_store(settings).query(SHARED_LABELS_SQL, ["r", "again"]).to_dicts()
    assert (row["pairs"], row["mean_first"], row["mean_second"], row["flips"]) == (1, 0.6, 0.7, 0)
