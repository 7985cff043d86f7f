"""The command line: light, clear when something is wrong, and JSON where it reads."""

import json
import os
import subprocess
import sys

import pytest

from charter.cli import SECTIONS, VERBS, cli

HEAVY = ("torch", "transformers", "trl", "duckdb", "pyarrow", "kafka", "rich", "httpx", "pydantic")


def charter(*arguments, stdin="", **environment):
    command = [sys.executable, "-m", "charter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ['charter', *{arguments!r}]
from charter.__main__ import main
try:
    main()
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]", done.stderr


def test_reading_verbs_load_no_torch():
    heavy = "('torch', 'transformers', 'trl')"
    code = f"import charter.pipeline, charter.tail, sys; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_verb_is_there_with_examples():
    assert tuple(cli.commands) and set(cli.commands) == set(VERBS)
    for verb in VERBS:
        assert "Examples:" in charter(verb, "--help").stdout


def test_help_lists_every_verb_in_its_section():
    said = charter("--help").stdout
    for section, verbs in SECTIONS.items():
        after = said[said.index(f"{section}:") :]
        assert all(f"\n  {verb} " in after for verb in verbs)


def test_without_a_verb_it_says_how_to_start_or_how_things_are(tmp_path, data):
    done = charter(CHARTER_DATA__FOLDER=str(tmp_path / "nothing"))
    assert done.returncode == 0 and "charter demo" in done.stdout and "charter run" in done.stdout
    done = charter(CHARTER_DATA__FOLDER=str(data))
    assert done.returncode == 0 and "preferences" in done.stdout and "waiting in run live" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(shell):
    done = charter("completion", shell)
    assert done.returncode == 0 and "_CHARTER_COMPLETE" in done.stdout and "charter" in done.stdout


def test_a_shell_completes_verbs():
    done = charter(_CHARTER_COMPLETE="bash_complete", COMP_WORDS="charter pro", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,produce"]


@pytest.fixture
def data(tmp_path):
    """A data folder in which the scripted model has answered three prompts."""
    from charter.pipeline import STAGES, connect, make_host, store_of
    from engine.settings import load
    from producers.files import SHIPPED, Producer

    settings, _ = load({"data.folder": str(tmp_path / "data"), "models.policy": "scripted"}, environment={})
    bus = connect(settings)
    Producer(bus, "live", eval_share=0.0).publish(str(SHIPPED), last=3)
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = store_of(settings)
        while store.query("SELECT count(*) FROM stories WHERE ended IS NOT NULL AND preferences IS NOT NULL").rows != [(3,)]:
            host.failed.wait(0.05)
            host.check()
    bus.close()
    return settings.folder


def test_reading_verbs_give_lists_of_objects(data):
    for arguments in (["status"], ["sql", "select 1 as a"], ["topics"], ["config"]):
        done = charter(*arguments, "--json", "--data", data)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def test_sql_shows_a_whole_story_and_the_versions(data):
    done = charter("sql", "select * from stories limit 1", "--data", data)
    assert done.returncode == 0 and "prompt:" in done.stdout and '"answers"' in done.stdout and "preferences:" in done.stdout
    done = charter("sql", "-", "--data", data, stdin="select policy_version, count(*) as n from responses group by 1")
    assert done.stdout.split() == ["policy_version", "n", "--------------", "-", "0", "3"]


def test_show_takes_the_beginning_of_any_id(data):
    rows = json.loads(
        charter("sql", "select prompt_id, preferences[1].record_id as j from stories", "--json", "--data", data).stdout
    )
    for identifier in (rows[0]["prompt_id"], rows[0]["j"], rows[0]["prompt_id"][:8]):
        done = charter("show", identifier, "--data", data)
        assert done.returncode == 0 and "answer 1 by policy 0" in done.stdout and "judged by" in done.stdout
    assert charter("show", "ffffffff", "--data", data).returncode == 2


def test_tail_prints_the_newest_records(data):
    done = charter("tail", "preferences", "-n", "2", "--data", data)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 and rows[0]["topic"] == "preferences" and rows[0]["a"]
    assert len(charter("tail", "prompts", "--raw", "--data", data).stdout.splitlines()) == 3
    assert charter("tail", "promts", "--data", data).returncode == 2


def test_produce_reports_bad_lines_and_keeps_the_good_ones(tmp_path):
    done = charter("produce", "-", "--data", tmp_path / "d", stdin='"good"\n{bad\n"also good"\n')
    assert done.returncode == 1 and "line 2: not JSON" in done.stderr and "2 prompts published" in done.stdout
    done = charter("produce", "-", "--strict", "--data", tmp_path / "e", stdin='"good"\n{bad\n"never"\n')
    assert done.returncode == 2 and "line 2" in done.stderr
    assert json.loads(charter("tail", "prompts", "--data", tmp_path / "e").stdout)["turns"][0]["content"] == "good"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rnu"], 2, ["rnu"]),
        (["run", "--set", "respond.sampels=2"], 2, ["respond.samples"]),
        (["run", "--set", "respond.samples"], 2, ["NAME=VALUE"]),
        (["sql", "select 1"], 2, ["no database", "charter demo"]),
        (["run", "--set", "models.policy=/nowhere/model"], 3, ["no model", "models.policy"]),
        (["run", "--set", "run.constitution=defualt", "--set", "models.policy=scripted"], 2, ["did you mean default"]),
        (["topics", "--bus", "kafka://127.0.0.1"], 2, ["HOST:PORT"]),
        (["topics", "--bus", "kafka://127.0.0.1:9"], 3, ["refused"]),
        (["produce", "/nowhere.jsonl"], 2, ["cannot read"]),
        (["demo", "--prompts", "1"], 2, ["--prompts"]),
        (["train", "--phase", "sft", "--set", "models.policy=scripted"], 2, ["no weights"]),
    ],
)
def test_errors_say_what_why_and_what_to_type(tmp_path, arguments, code, words):
    done = charter(*arguments, *(["--data", tmp_path / "d"] if arguments != ["rnu"] else []))
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5


def test_secrets_and_hostile_text_stay_out_of_the_terminal():
    from charter.text import inert, table
    from engine.models.endpoint import Endpoint

    hostile = "a\x1b[2Jb\u202ec\x00d\re"
    assert "\x1b" not in inert(hostile) and "\u202e" not in table(["x"], [[hostile]]) and "\r" not in inert(hostile)
    assert "sk-secret" not in repr(Endpoint("http://127.0.0.1:9/v1", "m", "sk-secret"))
