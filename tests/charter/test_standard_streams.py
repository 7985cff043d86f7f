"""Closed standard streams: a closed input is an error with three lines, and a closed output ends the command without a message."""

import os
import subprocess
import sys

import pytest

from tests.support.deployment import Deployment

CHARTER = f"'{sys.executable}' -m charter"


def run_shell(script, folder):
    environment = os.environ | {"CHARTER_MODELS__POLICY": "scripted", "CHARTER_DATA__FOLDER": str(folder / "data")}
    command = ["bash", "-o", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", ["produce -", "sql -", "chat", "chat -", "constitution lint -"])
def test_closed_standard_input_is_a_usage_error(arguments, tmp_path):
    Deployment(tmp_path / "data").publish("One?")  # chat needs a log
    result = run_shell(f"{CHARTER} {arguments} <&-", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-3] == "error: standard input is closed"


def test_question_without_an_answer_is_reported(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?")
    deployment.stream(1)
    ((prompt_id,),) = deployment.sql("SELECT prompt_id FROM prompts")
    ended = run_shell(f"{CHARTER} erase {prompt_id} < /dev/null", tmp_path)
    assert ended.returncode == 130 and "standard input ended before the question was answered" in ended.stderr
    closed = run_shell(f"{CHARTER} erase {prompt_id} <&-", tmp_path)
    assert closed.returncode == 2 and "standard input is closed" in closed.stderr
    assert deployment.sql("SELECT count(*) FROM prompts") == [(1,)]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_change_the_result(closed, tmp_path):
    (tmp_path / "p.jsonl").write_text('"One?"\n')
    assert run_shell(f"{CHARTER} produce p.jsonl {closed} && {CHARTER} run --until-done {closed}", tmp_path).returncode == 0
    result = run_shell(f'{CHARTER} sql "select count(*) as n from preferences" --json', tmp_path)
    assert '"n": 1' in result.stdout  # nothing was printed into the database or the log


@pytest.mark.parametrize("arguments", ["config", "--help", "run --help", "tail prompts"])
def test_closed_pipe_ends_the_command_as_for_other_tools(arguments, tmp_path):
    Deployment(tmp_path / "data").publish("One?")
    # The command starts when the reader has closed the pipe.
    script = f"mkfifo gate; (read -r _ < gate; {CHARTER} {arguments}) | (exec 0<&-; echo closed > gate)"
    result = run_shell(script, tmp_path)
    assert (result.returncode, result.stderr) == (141, "")


def test_error_message_into_a_closed_pipe_has_the_same_exit_code(tmp_path):
    script = f"mkfifo gate; (read -r _ < gate; {CHARTER} nosuch 2>&1) | (exec 0<&-; echo closed > gate)"
    assert run_shell(script, tmp_path).returncode == 141
