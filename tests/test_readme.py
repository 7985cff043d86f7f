"""The commands of the README, run in its order after the demo, in one shell session, with a two-layer model."""

import os
import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from charter.project_folder import create_project_folder
from constitutions.lint import lint_constitution
from constitutions.loader import load_constitution, parse_constitution
from engine.settings import get_environment_name, load_settings
from producers.files import SHIPPED_PROMPTS_PATH
from producers.parse import parse_prompt
from producers.rows import read_rows
from schemas import ids
from tests.support import fork_server
from tests.support.chat_server import FakeChatServer, make_script
from tests.support.dashboard import copy_demo, make_setting_flags
from tests.support.fork_server import CHARTER_MODULES
from tests.support.waiting import HANG_S, read_until_hang

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if re.match(r"(charter|cd|echo|printf|export) ", line)
]
KAFKA_ADDRESS, SERVER_ADDRESS = "kafka://localhost:9092", "http://localhost:8000/v1"  # as in the README
FORK_SERVER_MODULES = (*CHARTER_MODULES, "engine.models.local", "transformers.models.llama.modeling_llama")
SHOWN_ID = re.search(r"^charter show (\w+)", README, re.MULTILINE)[1]


def make_environment(model):
    folder = Path(sys.executable).parent
    settings = {name: value for name, value in make_setting_flags("", model).items() if name != "data.folder"}
    variables = {get_environment_name(*name.split(".")): value for name, value in settings.items()}
    return os.environ | variables | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def run_shell(script, folder, environment):
    """Run a script in a folder."""
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, check=True, timeout=HANG_S)


def run_charter(arguments, folder, environment, *, code=0, stdin=""):
    """Run `charter` in a folder, with arguments as typed in a shell. Return its output, and its output with its error output.

    The process is a fork of one that has imported Charter and torch.
    """
    result = fork_server.run_charter(
        shlex.split(arguments), folder=folder, environment=environment, stdin=stdin, modules=FORK_SERVER_MODULES
    )
    assert result.returncode == code, f"charter {arguments}\n{result.stdout}{result.stderr}"
    return result.stdout, result.stdout + result.stderr


def test_shown_id_is_a_prompt_of_the_demo():
    rows = read_rows(str(SHIPPED_PROMPTS_PATH), 1, 48)
    prompt_ids = [ids.compute_prompt_id(parse_prompt(row, source="", max_chars=10**6).messages) for _, row in rows]
    assert [prompt_id.startswith(SHOWN_ID) for prompt_id in prompt_ids].count(True) == 1


def test_readme_exports_no_variables():
    assert not [line for line in README.splitlines() if line.startswith("export ")]


def test_shown_constitution_is_that_of_the_new_folder(tmp_path):
    (shown,) = [block for language, block in BLOCKS if language == "toml"]
    create_project_folder(tmp_path / "library")
    written = load_constitution(str(tmp_path / "library" / "constitution.toml"))
    assert parse_constitution(shown, "README.md").hash == written.hash and lint_constitution(written) == []
    assert load_settings(file=tmp_path / "library" / "charter.toml", environment={})[0].run.constitution == "constitution.toml"


@pytest.mark.timeout(0)  # the commands have a timeout
def test_commands_work_in_order_after_the_demo(tiny, tmp_path):
    environment, folder = make_environment(tiny), tmp_path
    copy_demo(folder / ".charter", tiny)
    prompt_id = run_charter("sql 'select prompt_id from traces limit 1' --csv", folder, environment)[0].split()[-1]
    ran = []
    for line in COMMANDS:
        command = line.split(" # ")[0].strip().replace(f"show {SHOWN_ID}", f"show {prompt_id[:8]}")
        arguments = command.removeprefix("charter ")
        if KAFKA_ADDRESS in command:
            continue
        if SERVER_ADDRESS in command:
            judge_on_a_server(arguments, folder, environment)
        elif command.startswith("cd "):
            folder /= command.split()[1]
        elif command.startswith("charter dashboard"):
            serve_dashboard(folder, environment)
        elif command.startswith("charter "):
            run_charter(arguments, folder, environment, stdin="q\n" * arguments.startswith("label"))
        else:
            run_shell(command, folder, environment)
        ran.append(command)
    assert (folder / "exported" / "pairs").is_dir() and folder.name == "library"
    assert {"charter init library", "charter runs compare live rejudged", "charter dashboard"} <= set(ran)


def judge_on_a_server(arguments, folder, environment):
    """Judge one more prompt with a model on a server, and check that the server was asked."""
    server = FakeChatServer(["MODEL"])
    server.script = make_script()
    (folder / "more.jsonl").write_text('"One more?"\n')
    try:
        run_charter("produce more.jsonl", folder, environment)
        run_charter("run --stage respond --until-done", folder, environment)
        run_charter(f"{arguments.replace(SERVER_ADDRESS, server.url)} --until-done", folder, environment)
    finally:
        server.close()
    assert server.requests


@pytest.mark.kafka
@pytest.mark.timeout(0)  # the commands have a timeout
def test_kafka_commands_work(tiny, kafka_address, tmp_path):
    environment = make_environment(tiny) | {"CHARTER_BUS__PREFIX": f"v{uuid.uuid4().hex[:8]}."}
    run_charter("init library", tmp_path, environment)
    commands = [line.split(" # ")[0].replace(KAFKA_ADDRESS, kafka_address) for line in COMMANDS if KAFKA_ADDRESS in line]
    assert len(commands) == 4 and all(command.startswith("charter ") for command in commands)
    for command in commands:
        arguments = command.removeprefix("charter ")
        run_charter(arguments + " --until-done" * arguments.startswith("run"), tmp_path / "library", environment)
    rows, _ = run_charter("sql 'select count(*) from preferences' --csv", tmp_path / "library", environment)
    assert rows.split()[-1] == "6"


def serve_dashboard(folder, environment):
    command = [sys.executable, "-m", "charter", "dashboard", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    read_until_hang(process, lambda line: "http://" in line)
    process.terminate()
    process.communicate()


@pytest.mark.timeout(0)  # the commands have a timeout
def test_new_run_states_its_policy_and_keeps_the_base_model(tiny, tmp_path):
    environment = make_environment(tiny)
    copy_demo(tmp_path / ".charter", tiny)
    (tmp_path / "p.jsonl").write_text('"One more?"\n')

    def run(arguments, code=0):
        return run_charter(arguments, tmp_path, environment, code=code)[1]

    run("produce p.jsonl --run base")
    output = run("run --run base --until-done --from-base")
    assert "the base model) for the whole run (run.from_base), although the log has policies up to 3" in output
    run("produce p.jsonl --run base --epoch 1")
    assert "the base model) for the whole run" in run("run --run base --until-done")
    run("produce p.jsonl --run newest --epoch 2")
    output = run("run --run newest --until-done")
    assert "responses come from policy 3 (from distill, trained in run demo), the newest on the log" in output
    sql = "select run_id, policy_version from responses where run_id <> 'demo' and split <> 'SUITE' order by 1, 2"
    rows = run_charter(f'sql "{sql}" --csv', tmp_path, environment)[0].split()[1:]
    assert rows == ["base,0", "base,0", "newest,3"]
    for change in ("--run newest --from-base", "--run base --set run.from_base=false"):
        assert "a run keeps its start" in run(f"run {change} --until-done", code=2)
