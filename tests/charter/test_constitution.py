"""`charter constitution` on a small scripted stream: list, show, lint, diff with labels, test, study."""

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
    """A data folder in which five prompts went through every stage under customer-service."""
    settings = settings_of(tmp_path_factory.mktemp("constitution") / "data")
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    over = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
    stream(settings, bus, over)
    bus.close()
    return settings.folder


def stream(settings, bus, over):
    """Run every stage until the query counts all prompts."""
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = open_store(settings)
        while not store.path.exists() or store.query(over).rows != [(PROMPTS,)]:
            host.failure_event.wait(0.05)
            host.raise_if_failed()


def settings_of(folder):
    return load_settings(FLAGS | {"data.folder": str(folder)}, environment={})[0]


def call(folder, *arguments, code=0, stdin=None):
    words = [word for key, value in FLAGS.items() for word in ("--set", f"{key}={value}")]
    arguments = [*map(str, arguments), "--data", str(folder), *words]
    done = CliRunner().invoke(cli, ["constitution", *arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_list_shows_the_shipped_ones_and_what_runs_used(folder, tmp_path):
    rows = json.loads(call(tmp_path, "list", "--json"))
    assert {row["name"]: (row["critique"], row["judge"]) for row in rows}["default"] == (16, 16)
    assert len(rows) == 4 == len(json.loads(call(folder, "list", "--json")))  # the run's is a shipped one


def test_show_takes_names_files_runs_and_standard_input(folder, tmp_path):
    assert "guard-data" in call(folder, "show") and "guard-data" in call(folder, "show", "run:live")
    (row,) = json.loads(call(folder, "show", "run:live", "--json"))
    assert row["hash"] == load_constitution("customer-service").hash and len(row["critique"]) == 5
    assert parse_constitution(call(folder, "show", "-", "--toml", stdin=COURSE), "x").hash == load_constitution("course").hash
    prose = tmp_path / "prose.toml"
    prose.write_text(
        'name = "p"\nversion = "1.0.0"\n[[prose]]\nid = "a"\nname = "A"\npriority = 3\ntags = ["t"]\ntext = "Be fair."\n'
    )
    assert "3. a: A  (only for t)" in call(folder, "show", prose)
    with pytest.raises(UsageError, match="no run nowhere"):
        call(folder, "show", "run:nowhere")


def test_lint_has_an_exit_code_lines_and_json(folder, tmp_path):
    assert "no findings" in call(folder, "lint", "default", "course")
    bad = tmp_path / "bad.toml"
    bad.write_text(COURSE.replace('name = "Honesty"', 'name = "Helpfulness"'))
    assert f"{bad}:27: duplicate: honesty: it has the name of helpfulness" in call(folder, "lint", bad, code=1)
    rows = json.loads(call(folder, "lint", bad, "--json", code=1))
    assert [row["line"] for row in rows] == [27, 43] and rows[0]["rule"] == "duplicate"


def test_a_content_that_changed_without_its_version_is_seen(folder, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        (CONSTITUTIONS_FOLDER / "customer-service.toml").read_text().replace("stays friendly and short", "stays friendly")
    )
    assert "mine.toml:3: version: run live used other content" in call(folder, "lint", mine, code=1)
    rows = json.loads(call(folder, "diff", "run:live", mine, "--json"))
    assert [row["what"] for row in rows] == ["changed", "version not raised"]
    said = call(folder, "diff", "run:live", mine)
    assert "changed critique stay-kind revision" in said and "version not raised" in said
    assert "no differences" in call(folder, "diff", "run:live", "customer-service")


def test_diff_judges_a_frozen_slice_under_both(folder, tmp_path):
    mine = tmp_path / "mine.toml"
    text = (
        (CONSTITUTIONS_FOLDER / "customer-service.toml")
        .read_text()
        .replace("brings the customer closer to", "gives the customer")
    )
    mine.write_text(text.replace('id = "kinder"', 'id = "warmer"'))
    rows = [
        row for row in json.loads(call(folder, "diff", "run:live", mine, "--rejudge", "4", "--json")) if row["kind"] == "labels"
    ]
    changes = {row["principle"]: row["change"] for row in rows}
    assert changes == {
        "solves-more": "changed", "promises-less": "same", "kinder": "removed", "safer-with-data": "same", "hands-over": "same",
        "warmer": "added", "(mean of all)": "",
    }  # fmt: skip
    assert all(row["pairs"] == 4 and row["no_label"] == 0 for row in rows)
    assert all(row["flips"] == 0 and row["mean_change"] == 0 for row in rows if row["change"] == "same")
    assert next(row for row in rows if row["change"] == "changed")["mean_change"] > 0
    again = [
        row for row in json.loads(call(folder, "diff", "run:live", mine, "--rejudge", "4", "--json")) if row["kind"] == "labels"
    ]
    assert again == rows


def test_a_slice_is_the_same_each_time_and_a_smaller_one_is_its_beginning(folder):
    settings = settings_of(folder)
    chosen = [pair.record_id for pair in load_frozen_pairs(settings, PROMPTS)]
    assert len(set(chosen)) == PROMPTS and [pair.record_id for pair in load_frozen_pairs(settings, 3)] == chosen[:3]
    with pytest.raises(UsageError, match="no database"):
        load_frozen_pairs(settings_of(folder.parent / "empty"), 3)


# What is counted, with judges whose answers are known


def bench_of(tmp_path, rule, mass=0.9):
    """A bench whose judge prefers the first answer shown with the probability that `rule` gives for the whole question."""
    settings = settings_of(tmp_path / "none")
    context = open_batch_judge(settings)
    bench = context.__enter__()
    bench.models.open_models["scripted"] = ScriptedModel(
        option_rule=lambda ask: rule(ask.messages[-1].content), option_mass=mass
    )
    return bench


def prefers(word):
    """A judge that is sure of the answer with this word, wherever it is shown."""
    return lambda text: 0.9 if text.index(word) < text.index("Answer (B)") else 0.1


CASES = CaseFile(
    (
        ConstitutionCase(prompt="p", wins="GOOD", loses="BAD", principles=("kinder",)),
        ConstitutionCase(prompt="q", wins="GOOD", loses="BAD"),
    ),
    ("1", "2"),
    "",
)


def test_hits_and_misses_are_counted_for_each_principle_in_both_orders(tmp_path):
    rows = {
        t.principle_id: t.to_row()
        for t in run_cases(bench_of(tmp_path, prefers("GOOD")), load_constitution("customer-service"), CASES)
    }
    assert rows["kinder"] == ("kinder", 2, 2, 0, 2, 2, 0, pytest.approx(0.9)) and rows["solves-more"][1:4] == (1, 1, 0)
    rows = {
        t.principle_id: t.to_row()
        for t in run_cases(bench_of(tmp_path, prefers("BAD")), load_constitution("customer-service"), CASES)
    }
    assert rows["kinder"][:6] == ("kinder", 2, 0, 2, 0, 0)
    slot = {
        t.principle_id: t.to_row()
        for t in run_cases(bench_of(tmp_path, lambda _: 0.8), load_constitution("customer-service"), CASES)
    }
    assert slot["kinder"][:6] == ("kinder", 2, 0, 2, 2, 0)  # the first slot always wins: one order right, none counted a hit
    unread = {
        t.principle_id: t.to_row()
        for t in run_cases(bench_of(tmp_path, prefers("GOOD"), mass=0.1), load_constitution("course"), CASES_OF_COURSE)
    }
    assert unread["honesty"][1:4] == (1, 0, 0) and unread["honesty"][6] == 1


CASES_OF_COURSE = CaseFile((ConstitutionCase(prompt="p", wins="GOOD", loses="BAD", principles=("honesty",)),), ("1",), "")


def test_a_constitution_that_asks_all_at_once_is_asked_once_for_each_case(tmp_path):
    bench = bench_of(tmp_path, prefers("GOOD"))
    tallies = {t.principle_id: t.to_row() for t in run_cases(bench, load_constitution("course"), CASES_OF_COURSE)}
    assert tallies["honesty"][1:4] == (1, 1, 0) and tallies["helpfulness"][1] == 0
    assert bench.models.open_models["scripted"].num_scored == 2  # both orders of one question


def test_flips_are_counted_against_the_words_before_and_against_the_mean(tmp_path):
    before = load_constitution("customer-service")
    after = parse_constitution(before.text.replace("solution of their problem", "UPSIDE"), "x").without_principles(["kinder"])
    pairs = [make_pair_response([ChatMessage(role="user", content=str(n))], "GOOD", "BAD", [], "s") for n in range(3)]
    bench = bench_of(tmp_path, lambda text: prefers("BAD" if "UPSIDE" in text else "GOOD")(text))
    rows = {row[0]: row for row in compare_labels(bench, before, after, pairs)}
    assert rows["solves-more"][1:4] == ("changed", 3, 0) and rows["solves-more"][6:8] == (pytest.approx(0.8), 3)
    assert rows["kinder"][1] == "removed" and rows["kinder"][7] == 0
    assert rows["hands-over"][1] == "same" and rows["hands-over"][7] == 0
    # The mean of five at 0.9 against the mean of 0.1, 0.9, 0.9, 0.9.
    assert rows["(mean of all)"][4:6] == (pytest.approx(0.9), pytest.approx(0.7))
    asked_once = 2 * 3 * (5 + 1)  # both orders, three pairs, five questions and the changed one
    assert bench.models.open_models["scripted"].num_scored == asked_once


def test_a_mean_label_weighs_principles_and_leaves_out_what_has_no_label():
    weighted = parse_constitution(
        load_constitution("customer-service").text.replace('id = "kinder"', 'id = "kinder"\nweight = 3'), "x"
    )
    means = average_labels(weighted, {"kinder": {0: 0.8, 1: None}, "solves-more": {0: 0.4, 1: 0.3, 2: None}})
    assert means == {0: pytest.approx(0.7), 1: pytest.approx(0.3), 2: None}


def test_test_ends_with_1_below_the_wanted_share(folder, tmp_path):
    said = call(folder, "test", "customer-service", "--min-accuracy", "0")
    assert "of 5 labels are hits under customer-service 1.1.0, judged by scripted" in said
    path = tmp_path / "cases.jsonl"
    lines = [{"prompt": str(n), "wins": "a", "loses": "b"} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = json.loads(call(folder, "test", path, "--json", code=1))  # a judge that hashes is not always right
    assert sum(row["hits"] + row["misses"] for row in rows) == 30
    assert call(folder, "test", "-", "--min-accuracy", "0", stdin=path.read_text()).count("\n") == 8


# Leaving out


def test_study_leaves_out_each_principle_in_turn_and_says_what_changes(tmp_path):
    settings = settings_of(tmp_path / "data")
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    over = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
    stream(settings, bus, over)
    bus.close()
    assert call(settings.folder, "ablate", "--dry-run").count("without ") == 10
    store, drawn = (
        open_store(settings),
        "SELECT principle_id, count(DISTINCT response_id) FROM raw.{} WHERE run_id = 'live' GROUP BY 1",
    )
    by_critique, by_judging = (dict(store.query(drawn.format(topic)).rows) for topic in ("revisions", "preferences"))
    left_out = [next(iter(by_critique)), next(iter(by_judging))]
    rows = json.loads(call(settings.folder, "ablate", *left_out, "--json"))
    assert [row["excluded_principle"] for row in rows] == ["(nothing)", left_out[0], "(nothing)", left_out[1]]
    whole, chains, judged, labels = rows
    # The control: the same configuration makes the same records, and the scripted model the same texts.
    assert (whole["chains"], whole["changed"], whole["similarity"], whole["revised"]) == (PROMPTS, 0, 1.0, 1.0)
    assert (judged["pairs"], judged["flips"], judged["mean_p_change"]) == (PROMPTS, 0, 0.0)
    # Only what a principle was drawn for changes when it is left out.
    assert chains["changed"] == chains["sampled"] == by_critique[left_out[0]] and chains["similarity"] < 1
    assert labels["mean_p_change"] > 0 and labels["sampled"] == by_judging[left_out[1]] and labels["pairs"] == PROMPTS
    assert [row["changed_elsewhere"] for row in rows] == [0, 0, 0, 0] and whole["sampled"] is None
    runs = dict(store.query("SELECT run_id, constitution.hash FROM runs").rows)
    assert set(runs) == {"live", *(row["run"] for row in rows)} and len(set(runs.values())) == 3
    assert json.loads(call(settings.folder, "ablate", left_out[1], "--json")) == rows[2:]  # it was over
    with pytest.raises(ConstitutionError, match="did you mean kinder"):
        call(settings.folder, "ablate", "kindr")


@pytest.mark.parametrize("verb", ["list", "show", "lint", "diff", "test", "ablate"])
def test_every_verb_has_examples(verb):
    assert "Examples:" in CliRunner().invoke(cli, ["constitution", verb, "--help"]).output
