"""`charter constitution` on a small scripted run: list, show, lint, diff with labels, test, study."""

import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.evaluation.rejudge import (
    average_labels,
    compare_labels,
    load_frozen_pairs,
    make_pair_response,
    open_batch_judge,
    run_cases,
)
from charter.pipeline import STAGES, make_host
from constitutions.cases import CaseFile, ConstitutionCase
from constitutions.loader import CONSTITUTIONS_FOLDER, ConstitutionError, load_constitution, parse_constitution
from engine.errors import UsageError
from engine.models.scripted import ScriptedModel
from engine.settings import load_settings as load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.records import ChatMessage
from tests.support.waiting import wait_until

PROMPTS = 5
FLAGS = {
    "models.policy": "scripted",
    "run.constitution": "customer-service",
    "critique.rounds": "1",
    "critique.early_stop": "none",
    "prompts.eval_fraction": "0",
}
COURSE = (CONSTITUTIONS_FOLDER / "course.toml").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data folder with five prompts that passed every stage under customer-service."""
    settings = make_settings(tmp_path_factory.mktemp("constitution") / "data")
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    sql = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
    run_pipeline(settings, bus, sql)
    bus.close()
    return settings.folder


def run_pipeline(settings, bus, sql):
    """Run every stage until the query returns the number of prompts."""
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = open_store(settings)
        wait_until(lambda: store.path.exists() and store.query(sql).rows == [(PROMPTS,)], host)


def make_settings(folder):
    return load_settings(FLAGS | {"data.folder": str(folder)}, environment={})[0]


def run_command(folder, *arguments, code=0, stdin=None):
    options = [word for key, value in FLAGS.items() for word in ("--set", f"{key}={value}")]
    arguments = [*map(str, arguments), "--data", str(folder), *options]
    result = CliRunner().invoke(cli, ["constitution", *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_list_shows_shipped_constitutions_and_those_of_runs(folder, tmp_path):
    rows = json.loads(run_command(tmp_path, "list", "--json"))
    assert {row["name"]: (row["critique"], row["judge"]) for row in rows}["default"] == (16, 16)
    assert len(rows) == 5 == len(json.loads(run_command(folder, "list", "--json")))  # the run used a shipped constitution


def test_show_accepts_names_files_runs_and_standard_input(folder, tmp_path):
    assert "guard-data" in run_command(folder, "show") and "guard-data" in run_command(folder, "show", "run:live")
    (row,) = json.loads(run_command(folder, "show", "run:live", "--json"))
    assert row["hash"] == load_constitution("customer-service").hash and len(row["critique"]) == 5
    assert (
        parse_constitution(run_command(folder, "show", "-", "--toml", stdin=COURSE), "x").hash
        == load_constitution("course").hash
    )
    prose = tmp_path / "prose.toml"
    prose.write_text(
        'name = "p"\nversion = "1.0.0"\n[[prose]]\nid = "a"\nname = "A"\npriority = 3\ntags = ["t"]\ntext = "Be fair."\n'
    )
    assert "3. a: A  (only for t)" in run_command(folder, "show", prose)
    with pytest.raises(UsageError, match="no run nowhere"):
        run_command(folder, "show", "run:nowhere")


def test_lint_has_an_exit_code_text_and_json(folder, tmp_path):
    assert "no findings" in run_command(folder, "lint", "default", "course")
    bad = tmp_path / "bad.toml"
    bad.write_text(COURSE.replace('name = "Honesty"', 'name = "Helpfulness"'))
    assert f"{bad}:27: duplicate: honesty: it has the same name as helpfulness" in run_command(folder, "lint", bad, code=1)
    rows = json.loads(run_command(folder, "lint", bad, "--json", code=1))
    assert [row["line"] for row in rows] == [27, 43] and rows[0]["rule"] == "duplicate"


def test_lint_reports_changed_content_under_an_old_version(folder, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        (CONSTITUTIONS_FOLDER / "customer-service.toml").read_text().replace("stays friendly and short", "stays friendly")
    )
    assert "mine.toml:3: version: run live used other content" in run_command(folder, "lint", mine, code=1)
    rows = json.loads(run_command(folder, "diff", "run:live", mine, "--json"))
    assert [row["what"] for row in rows] == ["changed", "version not raised"]
    output = run_command(folder, "diff", "run:live", mine)
    assert "changed critique stay-kind revision" in output and "version not raised" in output
    assert "no differences" in run_command(folder, "diff", "run:live", "customer-service")


def test_diff_judges_the_same_pairs_under_both_constitutions(folder, tmp_path):
    mine = tmp_path / "mine.toml"
    text = (
        (CONSTITUTIONS_FOLDER / "customer-service.toml")
        .read_text()
        .replace("brings the customer closer to", "gives the customer")
    )
    mine.write_text(text.replace('id = "kinder"', 'id = "warmer"'))
    rows = [
        row
        for row in json.loads(run_command(folder, "diff", "run:live", mine, "--rejudge", "4", "--json"))
        if row["kind"] == "labels"
    ]
    changes = {row["principle"]: row["change"] for row in rows}
    assert changes == {
        "solves-more": "changed", "promises-less": "same", "kinder": "removed", "safer-with-data": "same", "hands-over": "same",
        "warmer": "added", "(mean of all)": "",
    }  # fmt: skip
    assert all(row["pairs"] == 4 and row["no_label"] == 0 for row in rows)
    assert all(row["flips"] == 0 and row["mean_change"] == 0 for row in rows if row["change"] == "same")
    assert next(row for row in rows if row["change"] == "changed")["mean_change"] > 0
    repeated = [
        row
        for row in json.loads(run_command(folder, "diff", "run:live", mine, "--rejudge", "4", "--json"))
        if row["kind"] == "labels"
    ]
    assert repeated == rows


def test_slice_is_deterministic_and_a_smaller_one_is_its_prefix(folder):
    settings = make_settings(folder)
    record_ids = [pair.record_id for pair in load_frozen_pairs(settings, PROMPTS)]
    assert len(set(record_ids)) == PROMPTS and [pair.record_id for pair in load_frozen_pairs(settings, 3)] == record_ids[:3]
    with pytest.raises(UsageError, match="no database"):
        load_frozen_pairs(make_settings(folder.parent / "empty"), 3)


# Counts, with judges whose probabilities are known


def make_bench(tmp_path, rule, mass=0.9):
    """Return a bench whose judge prefers the first response with probability `rule(question)`."""
    settings = make_settings(tmp_path / "none")
    context = open_batch_judge(settings)
    bench = context.__enter__()
    bench.models.open_models["scripted"] = ScriptedModel(
        option_rule=lambda ask: rule(ask.messages[-1].content), option_mass=mass
    )
    return bench


def make_preferring_rule(word):
    """Return a rule that prefers the response with this word in either position."""
    return lambda text: 0.9 if text.index(word) < text.index("Answer (B)") else 0.1


CASES = CaseFile(
    (
        ConstitutionCase(prompt="p", wins="GOOD", loses="BAD", principles=("kinder",)),
        ConstitutionCase(prompt="q", wins="GOOD", loses="BAD"),
    ),
    ("1", "2"),
    "",
)


def test_hits_are_counted_for_each_principle_in_both_orders(tmp_path):
    rows = {
        t.principle_id: t.to_row()
        for t in run_cases(make_bench(tmp_path, make_preferring_rule("GOOD")), load_constitution("customer-service"), CASES)
    }
    assert rows["kinder"] == ("kinder", 2, 2, 0, 2, 2, 0, pytest.approx(0.9)) and rows["solves-more"][1:4] == (1, 1, 0)
    rows = {
        t.principle_id: t.to_row()
        for t in run_cases(make_bench(tmp_path, make_preferring_rule("BAD")), load_constitution("customer-service"), CASES)
    }
    assert rows["kinder"][:6] == ("kinder", 2, 0, 2, 0, 0)
    slot = {
        t.principle_id: t.to_row()
        for t in run_cases(make_bench(tmp_path, lambda _: 0.8), load_constitution("customer-service"), CASES)
    }
    assert slot["kinder"][:6] == (
        "kinder",
        2,
        0,
        2,
        2,
        0,
    )  # the first position always wins: one order is right, which is not a hit
    unread = {
        t.principle_id: t.to_row()
        for t in run_cases(
            make_bench(tmp_path, make_preferring_rule("GOOD"), mass=0.1), load_constitution("course"), CASES_OF_COURSE
        )
    }
    assert unread["honesty"][1:4] == (1, 0, 0) and unread["honesty"][6] == 1


CASES_OF_COURSE = CaseFile((ConstitutionCase(prompt="p", wins="GOOD", loses="BAD", principles=("honesty",)),), ("1",), "")


def test_constitution_judged_as_a_whole_needs_one_question_per_case(tmp_path):
    bench = make_bench(tmp_path, make_preferring_rule("GOOD"))
    tallies = {t.principle_id: t.to_row() for t in run_cases(bench, load_constitution("course"), CASES_OF_COURSE)}
    assert tallies["honesty"][1:4] == (1, 1, 0) and tallies["helpfulness"][1] == 0
    assert bench.models.open_models["scripted"].num_scored == 2  # both orders of one question


def test_flips_are_counted_against_the_old_wording_and_the_mean(tmp_path):
    before = load_constitution("customer-service")
    after = parse_constitution(before.text.replace("solution of their problem", "UPSIDE"), "x").without_principles(["kinder"])
    pairs = [make_pair_response([ChatMessage(role="user", content=str(n))], "GOOD", "BAD", [], "s") for n in range(3)]
    bench = make_bench(tmp_path, lambda text: make_preferring_rule("BAD" if "UPSIDE" in text else "GOOD")(text))
    rows = {row[0]: row for row in compare_labels(bench, before, after, pairs)}
    assert rows["solves-more"][1:4] == ("changed", 3, 0) and rows["solves-more"][6:8] == (pytest.approx(0.8), 3)
    assert rows["kinder"][1] == "removed" and rows["kinder"][7] == 0
    assert rows["hands-over"][1] == "same" and rows["hands-over"][7] == 0
    # The mean of five at 0.9 against the mean of 0.1, 0.9, 0.9, 0.9.
    assert rows["(mean of all)"][4:6] == (pytest.approx(0.9), pytest.approx(0.7))
    asked_once = 2 * 3 * (5 + 1)  # both orders, three pairs, five questions and the changed one
    assert bench.models.open_models["scripted"].num_scored == asked_once


def test_mean_label_weights_principles_and_ignores_missing_labels():
    weighted = parse_constitution(
        load_constitution("customer-service").text.replace('id = "kinder"', 'id = "kinder"\nweight = 3'), "x"
    )
    means = average_labels(weighted, {"kinder": {0: 0.8, 1: None}, "solves-more": {0: 0.4, 1: 0.3, 2: None}})
    assert means == {0: pytest.approx(0.7), 1: pytest.approx(0.3), 2: None}


def test_test_command_exits_with_1_below_the_required_fraction(folder, tmp_path):
    output = run_command(folder, "test", "customer-service", "--min-accuracy", "0")
    assert "of 5 labels are hits under customer-service 1.1.0, judged by scripted" in output
    path = tmp_path / "cases.jsonl"
    lines = [{"prompt": str(n), "wins": "a", "loses": "b"} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = json.loads(run_command(folder, "test", path, "--json", code=1))  # a judge that hashes its input is not always right
    assert sum(row["hits"] + row["misses"] for row in rows) == 30
    assert run_command(folder, "test", "-", "--min-accuracy", "0", stdin=path.read_text()).count("\n") == 8


# Ablation


def test_ablate_excludes_each_principle_and_reports_the_changes(tmp_path):
    settings = make_settings(tmp_path / "data")
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    sql = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
    run_pipeline(settings, bus, sql)
    bus.close()
    assert run_command(settings.folder, "ablate", "--dry-run").count("without ") == 10
    store, count_sql = (
        open_store(settings),
        "SELECT principle_id, count(DISTINCT response_id) FROM raw.{} WHERE run_id = 'live' GROUP BY 1",
    )
    by_critique, by_judging = (dict(store.query(count_sql.format(topic)).rows) for topic in ("revisions", "preferences"))
    excluded = [next(iter(by_critique)), next(iter(by_judging))]
    rows = json.loads(run_command(settings.folder, "ablate", *excluded, "--json"))
    assert [row["excluded_principle"] for row in rows] == ["(nothing)", excluded[0], "(nothing)", excluded[1]]
    control, chains, label_control, labels = rows
    # The control run: the same configuration gives the same record ids, and the scripted model the same completions.
    assert (control["chains"], control["changed"], control["similarity"], control["revised"]) == (PROMPTS, 0, 1.0, 1.0)
    assert (label_control["pairs"], label_control["flips"], label_control["mean_p_change"]) == (PROMPTS, 0, 0.0)
    # Excluding a principle changes only the records that sampled it.
    assert chains["changed"] == chains["sampled"] == by_critique[excluded[0]] and chains["similarity"] < 1
    assert labels["mean_p_change"] > 0 and labels["sampled"] == by_judging[excluded[1]] and labels["pairs"] == PROMPTS
    assert [row["changed_elsewhere"] for row in rows] == [0, 0, 0, 0] and control["sampled"] is None
    runs = dict(store.query("SELECT run_id, constitution.hash FROM runs").rows)
    assert set(runs) == {"live", *(row["run"] for row in rows)} and len(set(runs.values())) == 3
    assert json.loads(run_command(settings.folder, "ablate", excluded[1], "--json")) == rows[2:]  # the ablation is complete
    with pytest.raises(ConstitutionError, match="did you mean kinder"):
        run_command(settings.folder, "ablate", "kindr")


@pytest.mark.parametrize("verb", ["list", "show", "lint", "diff", "test", "ablate"])
def test_every_command_has_examples(verb):
    assert "Examples:" in CliRunner().invoke(cli, ["constitution", verb, "--help"]).output
