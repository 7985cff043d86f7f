"""The command line: fast start, three-line errors, and JSON output of commands that read."""

import ast
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter import dead_letters, labels
from charter.cli import SECTIONS, VERBS, describe_error, load_command
from charter.lookup import find_prompt_ids
from charter.text import escape_unprintable, format_json
from engine import errors
from engine.store import Store
from tests.support import fork_server
from tests.support.shared import make_once
from tests.support.waiting import HANG_S, wait_until

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "duckdb", "pyarrow", "kafka", "rich", "httpx", "pydantic")


def run_charter(*arguments, stdin="", **environment):
    return fork_server.run_charter([*map(str, arguments)], stdin=stdin, environment=os.environ | environment)


def run_new_python(*arguments, stdin="", **environment):
    """Run `charter` as `run_charter` does, but with its own imports."""
    command = [sys.executable, "-m", "charter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_loads_no_heavy_libraries(arguments):
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]", result.stderr


def test_loading_commands_does_not_import_torch():
    heavy = "('torch', 'transformers', 'trl')"
    load = "import charter.cli, charter.pipeline, sys; [charter.cli.load_command(verb) for verb in charter.cli.VERBS]"
    code = f"{load}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_command_is_listed_and_has_examples():
    for verb in VERBS:
        group = load_command(verb)
        for command in (group, *(group.commands.values() if isinstance(group, click.Group) else ())):
            assert "Examples:" in command.help, f"{verb} {command.name}"


def test_help_lists_every_command_in_its_section():
    lines = run_new_python("--help").stdout
    for section, verbs in SECTIONS.items():
        after = lines[lines.index(f"{section}:") :]
        assert all(f"\n  {verb} " in after for verb in verbs)


def test_without_a_command_it_prints_first_steps_or_the_status(tmp_path, data):
    result = run_charter(CHARTER_DATA__FOLDER=str(tmp_path / "nothing"))
    assert result.returncode == 0 and "charter demo" in result.stdout and "charter run" in result.stdout
    result = run_charter(CHARTER_DATA__FOLDER=str(data))
    assert (
        result.returncode == 0
        and "preferences" in result.stdout
        and "records that the stages of run live have not processed yet" in result.stdout
    )


def test_shell_completes_commands():
    result = run_new_python(_CHARTER_COMPLETE="bash_complete", COMP_WORDS="charter pro", COMP_CWORD="1")
    assert result.stdout.split() == ["plain,produce"]


def test_shell_completes_choices_and_files():
    environment = {"_CHARTER_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    assert run_charter(**environment, COMP_WORDS="charter train --phase p").stdout.split() == ["plain,ppo"]
    result = run_charter(**environment | {"COMP_CWORD": "2"}, COMP_WORDS="charter produce my")
    assert result.stdout.split() == ["file,my"]  # the shell then completes file names


def process_three_prompts(folder):
    from charter.connect import connect_bus, open_store
    from charter.pipeline import STAGES, make_host
    from engine.settings import load_settings
    from producers.files import SHIPPED_PROMPTS_PATH, FileProducer

    settings, _ = load_settings({"data.folder": str(folder / "data"), "models.policy": "scripted"}, environment={})
    bus = connect_bus(settings)
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=3)
    with make_host(settings, bus, STAGES, sink=True) as host:
        store = open_store(settings)
        finished = "SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL"
        wait_until(lambda: store.query(finished).rows == [(3,)], host)
    bus.close()


@pytest.fixture
def data(tmp_path):
    """Return a copy of a data folder with three prompts that the scripted model has processed."""
    folder = make_once("three-prompts", process_three_prompts)
    return shutil.copytree(folder / "data", tmp_path / "data")


def test_json_output_is_a_list_of_objects(data):
    for arguments in (["policy"], ["sql", "select 1 as a"], ["topics"], ["config"]):
        result = run_charter(*arguments, "--json", "--data", data)
        assert result.returncode == 0, result.stderr
        rows = json.loads(result.stdout)
        assert isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def test_sql_returns_a_trace_and_the_versions(data):
    result = run_charter("sql", "select * from traces limit 1", "--data", data)
    assert (
        result.returncode == 0
        and "prompt:" in result.stdout
        and '"answers"' in result.stdout
        and "preferences:" in result.stdout
    )
    result = run_charter("sql", "-", "--data", data, stdin="select policy_version, count(*) as n from responses group by 1")
    assert result.stdout.split() == ["policy_version", "n", "---------------", "-", "0", "3"]


def test_show_accepts_the_prefix_of_any_id(data):
    rows = json.loads(
        run_charter("sql", "select prompt_id, preferences[1].record_id as j from traces", "--json", "--data", data).stdout
    )
    for identifier in (rows[0]["prompt_id"], rows[0]["j"], rows[0]["prompt_id"][:8]):
        result = run_charter("show", identifier, "--data", data)
        assert result.returncode == 0 and "completion 1 by policy 0" in result.stdout and "judged by" in result.stdout
    assert run_charter("show", "ffffffff", "--data", data).returncode == 2


def test_tail_prints_the_newest_records(data):
    result = run_charter("tail", "preferences", "-n", "2", "--data", data)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2 and rows[0]["topic"] == "preferences" and rows[0]["response_a"]
    assert len(run_charter("tail", "prompts", "--raw", "--data", data).stdout.splitlines()) == 3
    assert run_charter("tail", "promts", "--data", data).returncode == 2


def test_produce_reports_invalid_lines_and_publishes_the_others(tmp_path):
    result = run_new_python("produce", "-", "--data", tmp_path / "d", stdin='"good"\n{bad\n"also good"\n')
    assert result.returncode == 1 and "row 2: not JSON" in result.stderr and "2 prompts published" in result.stdout
    result = run_charter("produce", "-", "--strict", "--data", tmp_path / "e", stdin='"good"\n{bad\n"never"\n')
    assert result.returncode == 2 and "row 2" in result.stderr
    assert json.loads(run_charter("tail", "prompts", "--data", tmp_path / "e").stdout)["messages"][0]["content"] == "good"


def test_dry_run_shows_the_first_records_and_fails_if_a_row_is_refused(tmp_path):
    rows = [{"system": "Be brief.", "question": f"q{n}", "chosen": " a\n", "rejected": "b", "id": n} for n in range(5)]
    stdin = "".join(json.dumps(row) + "\n" for row in rows)
    command = ("produce", "-", "--as", "preferences", "--dry-run", "--data", tmp_path / "d", "--column", "prompt=question")
    result = run_charter(*command, stdin=stdin)
    assert result.returncode == 0 and result.stdout.count("would be published as") == 3 and "would publish 5" in result.stdout
    shown = json.loads(result.stdout.partition("published as ")[2].partition("- row 2")[0])
    assert [message["content"] for message in shown["messages"]] == ["Be brief.", "q0"]
    assert shown["response_a" if shown["p_a"] == 1 else "response_b"] == " a\n"
    assert result.stderr.strip() == "- row 1: columns without effect on preferences: id"
    result = run_charter(*command, stdin=stdin * 2 + '{"prompt": "q"}\n' * 30)
    assert result.returncode == 1 and "would publish 5 preferences, 5 duplicates skipped; 30 rows are invalid" in result.stdout
    assert result.stderr.count("row 30: needs") == 1 and "row 31" not in result.stderr and "30 rows: needs" in result.stderr
    assert not (tmp_path / "d").exists()


def test_dry_run_shows_what_produce_publishes(tmp_path):
    stdin = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    shown = run_charter("produce", "-", "--as", "preferences", "--dry-run", stdin=stdin).stdout
    fields = json.loads(shown.partition("published as ")[2].rpartition("}")[0] + "}")
    run_charter("produce", "-", "--as", "preferences", "--data", tmp_path / "d", stdin=stdin)
    record = json.loads(run_charter("tail", "preferences", "--data", tmp_path / "d").stdout)
    assert fields == {name: record[name] for name in fields}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": " a"}, "both responses are the same"),
        ("demonstrations", {"prompt": "q", "completion": "<think>Hm.</think>a"}, "the reasoning of a model"),
    ],
)
def test_dry_run_refuses_the_rows_that_produce_refuses(tmp_path, kind, row, reason):
    for option in (["--dry-run"], []):
        result = run_charter("produce", "-", "--as", kind, "--data", tmp_path / "d", *option, stdin=json.dumps(row))
        assert result.returncode == 1 and reason in result.stderr and "would be published" not in result.stdout


@pytest.mark.parametrize(
    ("column", "reason"),
    [("prompt", "NAME=COLUMN"), ("question=prompt", "NAME=COLUMN"), ("prompt=a --column prompt=b", "twice")],
)
def test_produce_rejects_a_column_mapping_that_is_not_understood(tmp_path, column, reason):
    result = run_charter("produce", "-", "--column", *column.split(), "--data", tmp_path / "d")
    assert result.returncode == 2 and reason in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["rnu"], 2, ["rnu", "charter --help"]),
        (["show"], 2, ["'ID'", "charter show --help"]),
        (["replay"], 2, ["--stage", "respond, critique, revise, judge"]),
        (["policy", "rollback", "--reason"], 2, ["--reason"]),
        (["dlq", "retry"], 2, ["--all", "charter dlq retry --help"]),
        (["tail", "prompts", "-n", "-1"], 2, ["-n"]),
        (["dashboard", "--port", "99999"], 2, ["--port"]),
        (["policy", "export", "7", "w"], 2, ["there is no log", "charter produce FILE"]),
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
        (["train", "--phase", "sft"], 2, ["there is no log", "charter produce FILE"]),
    ],
)
def test_errors_have_three_lines(tmp_path, arguments, code, expected):
    result = run_charter(*arguments, CHARTER_DATA__FOLDER=str(tmp_path / "d"))
    assert result.returncode == code, result.stderr
    assert all(word in result.stderr for word in expected) and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 3, result.stderr


def test_memory_of_an_update_is_estimated_without_a_log(tiny, tmp_path):
    """A model on a server has no row in the table, and the command says so."""
    for policy, expected in ((tiny, []), ("http://127.0.0.1:9/v1#m", ["http://127.0.0.1:9/v1#m is not in the table"])):
        result = run_charter("train", "--estimate-memory", "--data", tmp_path / "none", "--set", f"models.policy={policy}")
        titles = {line.split()[0] for line in result.stdout.splitlines()}
        assert result.returncode == 0 and titles == {"model", "1B", "8B", "70B", "GiB", *([] if expected else [tiny.name])}
        assert all(text in result.stderr for text in expected) and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["policy", "export", "7", "w"], ["no policy 7", "charter policy list"]),
        (["train", "--phase", "sft", "--set", "models.policy=scripted"], ["no local weights"]),
    ],
)
def test_errors_in_a_folder_with_data_have_three_lines(data, arguments, expected):
    result = run_charter(*arguments, "--data", data)
    assert result.returncode == 2 and all(word in result.stderr for word in expected)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 3, result.stderr


def test_every_user_error_in_the_code_has_three_parts():
    """Errors that only the engine catches (CommitUncertain, PartitionLost, PermanentRecordError, ...) need no remedy."""
    count, internal = 0, {"CommitUncertain", "PartitionLost", "PermanentRecordError", "WriterFenced", "OffsetsLost"}
    for folder in ("charter", "engine", "consumers", "producers", "trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id in internal:
                    continue
                if isinstance(error := vars(errors).get(node.func.id), type) and issubclass(error, errors.CharterError):
                    parts = [p for p in node.args if not (isinstance(p, ast.Constant) and p.value == "")]
                    assert len(parts) == 3 or isinstance(node.args[0], ast.Starred), f"{path}:{node.lineno}"
                    count += 1
    assert count > 100


def test_log_json_prints_one_object_per_line(tmp_path):
    folder = {"CHARTER_DATA__FOLDER": str(tmp_path / "d"), "CHARTER_MODELS__POLICY": "scripted", "CHARTER_ALLOW_SCRIPTED": "1"}
    run_charter("produce", "-", stdin='"one"', **folder)
    for arguments, code in ((["run", "--until-done"], 0), (["run", "--set", "run.constitution=nope"], 2)):
        result = run_charter(*arguments, "--log-json", **folder)
        lines = [json.loads(line) for line in result.stderr.splitlines()]
        assert result.returncode == code and lines, result.stderr
    assert (
        lines[-1]["level"] == "ERROR" and lines[-1]["message"].startswith("error: ") and lines[-1]["message"].count("\n") == 2
    )


def test_unexpected_error_has_three_lines():
    try:
        iter(()).__next__()
    except StopIteration as error:
        what, why, fix = describe_error(error)
    assert "bug" in what and "StopIteration" in why and "test_cli.py" in why and "--traceback" in fix
    assert describe_error(PermissionError(13, "Permission denied", "/x"))[:2] == ("cannot use /x", "Permission denied")


@given(st.text(st.characters(codec="utf-8")))
def test_json_output_escapes_hostile_text_without_loss(text):
    lines = format_json([{"text": text, text: float("nan")}])
    assert json.loads(lines) == ([{"text": text, text: None}] if text != "text" else [{"text": None}])
    assert escape_unprintable(lines) == lines


def test_json_output_shows_emoji_and_escapes_direction_characters():
    assert format_json(["\U0001f469\u200d\U0001f33e \u202e \u200d"], None) == '["\U0001f469\u200d\U0001f33e \\u202e \\u200d"]'


def test_id_prefixes_accept_only_characters_of_ids(data):
    database = Store(data / "charter.duckdb")
    for wrong in ("zzz", "%", "", "_", " "):
        assert find_prompt_ids(database, wrong) == []
        with pytest.raises(errors.UsageError, match="no label"):
            labels.find_pair(database.query, wrong)
        with pytest.raises(errors.UsageError, match="no dead letters"):
            dead_letters.find_dead_letter(database, wrong)
    result = run_charter("erase", "zzz", "--yes", "--data", data)
    assert result.returncode == 2 and "no prompts" in result.stderr


def test_ctrl_c_ends_a_long_query(data):
    long = "select count(*) from range(1000000000000)"
    command = [sys.executable, "-m", "charter", "sql", long, "--timeout-s", "300", "--data", str(data)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (data / "charter.lock" / "file").open() as file:
        while asking.poll() is None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(file, fcntl.LOCK_UN)
            except BlockingIOError:  # the command waits for input
                break
    asking.send_signal(signal.SIGINT)
    assert asking.communicate(timeout=HANG_S) == ("", "\n") and asking.returncode == 130


def test_output_works_on_a_terminal_without_unicode(data):
    result = run_new_python("sql", "select '→' as x", "--data", data, PYTHONIOENCODING="latin-1")
    assert result.returncode == 0 and "\\u2192" in result.stdout


def test_secrets_and_control_characters_are_not_printed():
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


@pytest.mark.parametrize(
    ("statement", "words"), [("select 1; select 2", "2 statements"), (";", "no statements"), ("/* */", "no st")]
)
def test_sql_runs_exactly_one_statement(statement, words, data):
    result = run_charter("sql", statement, "--data", data)
    assert result.returncode == 2 and words in result.stderr and result.stdout == ""
    assert run_charter("sql", "select ';' as c;", "--data", data, "--csv").stdout == "c\n;\n"


def test_show_lists_some_of_many_matches(data):
    store = Store(data / "charter.duckdb")
    ids = sorted(str(row[0]) for row in store.query("SELECT prompt_id FROM prompts").rows)
    prefix = next(char for char in "0123456789abcdef" if len(find_prompt_ids(store, char)) > 1)
    matches = find_prompt_ids(store, prefix)
    result = run_charter("show", prefix, "--data", data)
    assert result.returncode == 2 and f"matches {len(matches)} prompts" in result.stderr
    listed = [identifier for identifier in ids if identifier in result.stderr]
    assert len(listed) == min(len(matches), 5) and set(listed) <= set(matches)
    example = result.stderr.splitlines()[-1].split("charter show ")[1]
    assert run_charter("show", example, "--data", data).returncode == 0


@pytest.mark.parametrize("text", ["[respond]\nmax_tokns = 4", "[respond]\nmax_tokens = 'many'", "[nothing]", "x ="])
def test_advice_for_a_wrong_settings_file_works(text, tmp_path):
    (tmp_path / "charter.toml").write_text(text)
    result = run_charter("config", "--config", tmp_path / "charter.toml")
    assert result.returncode == 2
    assert "charter config --defaults" in result.stderr or "fix the line" in result.stderr
    result = run_charter("config", "--defaults", "--config", tmp_path / "charter.toml")
    assert result.returncode == 0 and "# max_tokens = 256" in result.stdout


def test_empty_topic_is_reported(tmp_path):
    run_charter("produce", "-", "--data", tmp_path, stdin='"One?"\n')
    result = run_charter("tail", "demonstrations", "--data", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "there are no records in demonstrations\n")


@pytest.mark.parametrize("name", ["a?b", "a\\b", ""])
def test_data_folder_that_duckdb_cannot_use_is_refused(name, tmp_path):
    result = run_charter("produce", "-", "--data", tmp_path / name if name else "", stdin='"One?"\n')
    assert result.returncode == 2 and "data.folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [":memory:", "md:x", "sqlite:y", "a#b%20c", "it's [1]; ünï"])
def test_data_folder_with_an_unusual_name_works(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(Path(name) / "charter.duckdb")
    store.create_schema()
    assert store.query("SELECT count(*) FROM prompts").rows == [(0,)]
    assert (tmp_path / name / "charter.duckdb").exists()


def test_snapshot_to_an_unsupported_path_is_refused(data, tmp_path):
    result = run_charter("snapshot", tmp_path / "a?b.duckdb", "--data", data)
    assert result.returncode == 2 and "DuckDB does not support the character ?" in result.stderr
