"""The command line: light, clear when something is wrong, and JSON where it reads."""

import ast
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter import dead_letters
from charter.cli import SECTIONS, VERBS, describe_error, load_command
from charter.commands import label
from charter.lookup import find_prompt_ids
from charter.text import format_json
from engine import errors
from engine.store import Store

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "duckdb", "pyarrow", "kafka", "rich", "httpx", "pydantic")


def charter(*arguments, stdin="", **environment):
    command = [sys.executable, "-m", "charter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
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


def test_no_command_loads_torch_before_it_runs():
    heavy = "('torch', 'transformers', 'trl')"
    load = "import charter.cli, charter.pipeline, sys; [charter.cli.load_command(verb) for verb in charter.cli.VERBS]"
    code = f"{load}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_verb_is_there_with_examples():
    for verb in VERBS:
        found = load_command(verb)
        for command in (found, *(found.commands.values() if isinstance(found, click.Group) else ())):
            assert "Examples:" in command.help, f"{verb} {command.name}"


def test_help_lists_every_verb_in_its_section():
    said = charter("--help").stdout
    for section, verbs in SECTIONS.items():
        after = said[said.index(f"{section}:") :]
        assert all(f"\n  {verb} " in after for verb in verbs)


def test_without_a_verb_it_says_how_to_start_or_how_things_are(tmp_path, data):
    done = charter(CHARTER_DATA__FOLDER=str(tmp_path / "nothing"))
    assert done.returncode == 0 and "charter demo" in done.stdout and "charter run" in done.stdout
    done = charter(CHARTER_DATA__FOLDER=str(data))
    assert (
        done.returncode == 0
        and "preferences" in done.stdout
        and "records that the stages of run live have not processed yet" in done.stdout
    )


def test_a_shell_completes_verbs():
    done = charter(_CHARTER_COMPLETE="bash_complete", COMP_WORDS="charter pro", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,produce"]


def test_a_shell_completes_choices_and_files():
    asked = {"_CHARTER_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    assert charter(**asked, COMP_WORDS="charter train --phase p").stdout.split() == ["plain,ppo"]
    done = charter(**asked | {"COMP_CWORD": "2"}, COMP_WORDS="charter produce my")
    assert done.stdout.split() == ["file,my"]  # the shell itself then looks for files


@pytest.fixture
def data(tmp_path):
    """A data folder in which the scripted model has answered three prompts."""
    from charter.connect import connect_bus, open_store
    from charter.pipeline import STAGES, make_host
    from engine.settings import load_settings
    from producers.files import SHIPPED_PROMPTS_PATH, FileProducer

    settings, _ = load_settings({"data.folder": str(tmp_path / "data"), "models.policy": "scripted"}, environment={})
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=3)
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = open_store(settings)
        while store.query("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL").rows != [
            (3,)
        ]:
            host.failure_event.wait(0.05)
            host.raise_if_failed()
    bus.close()
    return settings.folder


def test_reading_verbs_give_lists_of_objects(data):
    for arguments in (["status"], ["sql", "select 1 as a"], ["topics"], ["config"]):
        done = charter(*arguments, "--json", "--data", data)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def test_sql_shows_a_whole_story_and_the_versions(data):
    done = charter("sql", "select * from traces limit 1", "--data", data)
    assert done.returncode == 0 and "prompt:" in done.stdout and '"answers"' in done.stdout and "preferences:" in done.stdout
    done = charter("sql", "-", "--data", data, stdin="select policy_version, count(*) as n from responses group by 1")
    assert done.stdout.split() == ["policy_version", "n", "---------------", "-", "0", "3"]


def test_show_takes_the_beginning_of_any_id(data):
    rows = json.loads(
        charter("sql", "select prompt_id, preferences[1].record_id as j from traces", "--json", "--data", data).stdout
    )
    for identifier in (rows[0]["prompt_id"], rows[0]["j"], rows[0]["prompt_id"][:8]):
        done = charter("show", identifier, "--data", data)
        assert done.returncode == 0 and "completion 1 by policy 0" in done.stdout and "judged by" in done.stdout
    assert charter("show", "ffffffff", "--data", data).returncode == 2


def test_tail_prints_the_newest_records(data):
    done = charter("tail", "preferences", "-n", "2", "--data", data)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 and rows[0]["topic"] == "preferences" and rows[0]["response_a"]
    assert len(charter("tail", "prompts", "--raw", "--data", data).stdout.splitlines()) == 3
    assert charter("tail", "promts", "--data", data).returncode == 2


def test_produce_reports_bad_lines_and_keeps_the_good_ones(tmp_path):
    done = charter("produce", "-", "--data", tmp_path / "d", stdin='"good"\n{bad\n"also good"\n')
    assert done.returncode == 1 and "line 2: not JSON" in done.stderr and "2 prompts published" in done.stdout
    done = charter("produce", "-", "--strict", "--data", tmp_path / "e", stdin='"good"\n{bad\n"never"\n')
    assert done.returncode == 2 and "line 2" in done.stderr
    assert json.loads(charter("tail", "prompts", "--data", tmp_path / "e").stdout)["messages"][0]["content"] == "good"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rnu"], 2, ["rnu", "charter --help"]),
        (["show"], 2, ["'ID'", "charter show --help"]),
        (["replay"], 2, ["--stage", "respond, critique, revise, judge"]),
        (["policy", "rollback", "--reason"], 2, ["--reason"]),
        (["dlq", "retry"], 2, ["--all", "charter dlq retry --help"]),
        (["tail", "prompts", "-n", "-1"], 2, ["-n"]),
        (["dashboard", "--port", "99999"], 2, ["--port"]),
        (["policy", "export", "7", "w"], 2, ["no policy 7", "charter policy list"]),
        (["backup", "b"], 2, ["nothing to back up"]),
        (["eval", "agreement", "--pairs", "/nowhere"], 2, ["/nowhere", "No such file"]),
        (["topics", "--bus", "localhost:9092"], 2, ["kafka://HOST:PORT"]),
        (["topics", "--bus", "kafka:/x"], 2, ["kafka://HOST:PORT"]),
        (["run", "--set", "respond.num_completion=2"], 2, ["respond.num_completions"]),
        (["run", "--set", "respond.num_completions"], 2, ["NAME=VALUE"]),
        (["sql", "select 1"], 2, ["no database", "charter demo"]),
        (["run", "--set", "models.policy=/nowhere/model"], 3, ["no model", "models.policy"]),
        (["run", "--set", "run.constitution=defualt", "--set", "models.policy=scripted"], 2, ["did you mean default"]),
        (["topics", "--bus", "kafka://127.0.0.1"], 2, ["HOST:PORT"]),
        (["topics", "--bus", "kafka://127.0.0.1:9"], 3, ["refused"]),
        (["produce", "/nowhere.jsonl"], 2, ["cannot read"]),
        (["demo", "--prompts", "1"], 2, ["--prompts"]),
        (["train", "--phase", "sft", "--set", "models.policy=scripted"], 2, ["no local weights"]),
    ],
)
def test_errors_say_what_why_and_what_to_type(tmp_path, arguments, code, words):
    done = charter(*arguments, CHARTER_DATA__FOLDER=str(tmp_path / "d"))
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 3, done.stderr


def test_every_error_in_the_code_has_its_three_parts():
    """What only the machinery catches (a commit in doubt, a partition that moved, a record that dies) needs no third one."""
    found, internal = 0, {"CommitUncertain", "PartitionLost", "PermanentRecordError", "WriterFenced", "OffsetsLost"}
    for folder in ("charter", "engine", "consumers", "producers", "trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id in internal:
                    continue
                if isinstance(error := vars(errors).get(node.func.id), type) and issubclass(error, errors.CharterError):
                    parts = [p for p in node.args if not (isinstance(p, ast.Constant) and p.value == "")]
                    assert len(parts) == 3 or isinstance(node.args[0], ast.Starred), f"{path}:{node.lineno}"
                    found += 1
    assert found > 100


def test_with_log_json_every_line_of_the_log_is_an_object(tmp_path):
    folder = {"CHARTER_DATA__FOLDER": str(tmp_path / "d"), "CHARTER_MODELS__POLICY": "scripted", "CHARTER_ALLOW_SCRIPTED": "1"}
    charter("produce", "-", stdin='"one"', **folder)
    for arguments, code in ((["run", "--until-done"], 0), (["run", "--set", "run.constitution=nope"], 2)):
        done = charter(*arguments, "--log-json", **folder)
        said = [json.loads(line) for line in done.stderr.splitlines()]
        assert done.returncode == code and said, done.stderr
    assert said[-1]["level"] == "ERROR" and said[-1]["message"].startswith("error: ") and said[-1]["message"].count("\n") == 2


def test_what_nobody_foresaw_is_told_in_three_lines_too():
    try:
        iter(()).__next__()
    except StopIteration as error:
        what, why, fix = describe_error(error)
    assert "bug" in what and "StopIteration" in why and "test_cli.py" in why and "--traceback" in fix
    assert describe_error(PermissionError(13, "Permission denied", "/x"))[:2] == ("cannot use /x", "Permission denied")


@given(st.text(st.characters(codec="utf-8")))
def test_json_shows_hostile_text_inert_and_loses_none_of_it(text):
    said = format_json([{"text": text, text: float("nan")}])
    assert json.loads(said) == ([{"text": text, text: None}] if text != "text" else [{"text": None}])
    assert all(c.isprintable() or c == "\n" for c in said)


def test_ids_are_matched_by_what_an_id_can_begin_with(data):
    database = Store(data / "charter.duckdb")
    for wrong in ("zzz", "%", "", "_", " "):
        assert find_prompt_ids(database, wrong) == []
        for find in (label.find_label, dead_letters.find_dead_letter):
            with pytest.raises(errors.UsageError, match=r"no label|no dead letters"):
                find(database, wrong)
    done = charter("erase", "zzz", "--yes", "--data", data)
    assert done.returncode == 2 and "no prompts" in done.stderr


def test_ctrl_c_ends_a_long_query_at_once(data):
    long = "select count(*) from range(1000000000000)"
    command = [sys.executable, "-m", "charter", "sql", long, "--timeout-s", "300", "--data", str(data)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (data / "charter.gate" / "file").open() as file:
        while asking.poll() is None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(file, fcntl.LOCK_UN)
            except BlockingIOError:  # it reads
                break
    asking.send_signal(signal.SIGINT)
    assert asking.communicate(timeout=30) == ("", "\n") and asking.returncode == 130


def test_a_terminal_without_unicode_is_served(data):
    done = charter("sql", "select '→' as x", "--data", data, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "\\u2192" in done.stdout


def test_secrets_and_hostile_text_stay_out_of_the_terminal():
    from charter.console import format_table
    from charter.text import escape_unprintable
    from engine.models.endpoint import Endpoint

    hostile = "a\x1b[2Jb\u202ec\x00d\re"
    assert (
        "\x1b" not in escape_unprintable(hostile)
        and "\u202e" not in format_table(["x"], [[hostile]])
        and "\r" not in escape_unprintable(hostile)
    )
    assert "sk-secret" not in repr(Endpoint("http://127.0.0.1:9/v1", "m", "sk-secret"))
