"""A small run for tests of the dashboard and the report: the demo with a two-layer model, hostile prompts and a dead letter."""

import json
import shutil

from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from consumers.sink import Sink
from engine.bus.port import ProducerRecord
from engine.settings import load_settings
from engine.worker import to_producer_record
from tests.support.records import make_grades, make_suite_response
from tests.support.shared import make_once
from tests.support.waiting import HANG_S, wait_until

_RIGHT_TO_LEFT_TEXT = "\u202eright to left\u202c مرحبا بالعالم"
HOSTILE_TEXTS = {
    "markup": "</p></div><h1>big</h1><b onmouseover=alert(1)>bold</b><img src=x onerror=alert(1)>",
    "script": "<script>document.title='owned'</script><svg/onload=fetch('http://192.0.2.1/')>'\"`{{7*7}}{% raw %}${7*7}",
    "escapes": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m and a bell \x07 and a zero-width \u200b joiner",
    "long": "w" * 1500 + " " + "ß" * 500,
    "direction": _RIGHT_TO_LEFT_TEXT,
}
_SETTINGS = {
    "respond.max_tokens": "8", "critique.max_tokens": "8", "critique.few_shot": "false", "revise.max_tokens": "8",
    "critique.min_option_mass": "0", "judge.min_option_mass": "0", "prompts.eval_fraction": "0",
    "sft.learning_rate": "1e-3", "reward.learning_rate": "1e-2", "ppo.learning_rate": "1e-3", "distill.min_teacher_effect": "0",
}  # fmt: skip


def make_setting_flags(folder, model, **more):
    """Return settings for a small model. The demo's judge would find that all of its responses deviate in the same way."""
    flags = {"data.folder": str(folder), "models.policy": str(model), "models.judge": str(model), **_SETTINGS}
    if model != "scripted":
        # The small model finds no flaw in the responses of the demo. With this setting it revises them nevertheless.
        flags["critique.early_stop"] = "none"
    return flags | more


def _run_command(folder, model, *arguments):
    flags = make_setting_flags(folder, model)
    options = [option for key, value in flags.items() for option in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(cli, [*map(str, arguments), *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def copy_demo_with_hostile_run(folder, model):
    """Copy a folder with the demo of `copy_demo` and then hostile prompts in a second run; return the settings of this run."""

    def make(shared):
        copy_demo(shared / "data", model)
        _run_hostile_prompts(shared / "data", model, "hostile")

    shutil.copytree(make_once("demo-with-hostile-run", make) / "data", folder)
    return load_settings(make_setting_flags(folder, model, **{"run.id": "hostile"}), environment={})[0]


def copy_hostile_run(folder):
    """Copy the data folder of a run of the scripted model on hostile prompts, one of which no stage can decode."""
    shared = make_once("hostile-run", lambda shared: _run_hostile_prompts(shared / "data", "scripted"))
    shutil.copytree(shared / "data", folder)
    return folder


def copy_demo(folder, model):
    """Run the demo with `model`, once for all test processes, and copy its data folder to `folder`."""
    demo = make_once("demo", lambda shared: _run_command(shared / "data", model, "demo", "--prompts", "4"))
    shutil.copytree(demo / "data", folder)


def _run_hostile_prompts(folder, model, run="live"):
    """Run hostile prompts and one undecodable record through every stage."""
    rows = folder.parent / "hostile.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "tags": ["<i>tag</i>"]}) + "\n" for text in HOSTILE_TEXTS.values()))
    _run_command(folder, model, "produce", rows, "--run", run)
    settings = load_settings(make_setting_flags(folder, model, **{"run.id": run}), environment={})[0]
    bus = connect_bus(settings)
    writer = bus.open_writer("test.broken")
    writer.commit([ProducerRecord("prompts", b"<b>key</b>", b"\x00not a record <script>\xff", ())])
    writer.close()
    where = f"WHERE run_id = '{run}'"
    finished = f"""SELECT (SELECT count(*) FROM revision_chains {where}), (SELECT count(*) FROM preferences {where}),
                       (SELECT count(*) FROM dead_letters) > 0"""
    store, expected = open_store(settings), [(len(HOSTILE_TEXTS), len(HOSTILE_TEXTS), True)]
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: store.path.exists() and store.query(finished, limit_s=HANG_S).rows == expected, host)
    bus.close()


def make_evaluation(policies=(0, 1)):
    """Return the records of an evaluation: each policy answers hostile prompts of XSTest, and refuses as many of them as its version."""
    refusal, records = "I'm sorry, but I can't help with that.", []
    for policy in policies:
        for subset in ("safe", "unsafe"):
            for n, (name, text) in enumerate(HOSTILE_TEXTS.items()):
                response = make_suite_response(
                    f"{subset} {name} {text}", refusal if n < policy else text, subset=subset, policy_version=policy
                )
                records += [response, *make_grades(response)]
    return records


def add_evaluation(settings):
    """Add the records of `make_evaluation` to the log and to the database."""
    bus = connect_bus(settings)
    bus.publish([to_producer_record(record) for record in make_evaluation()])
    sink = Sink(bus, open_store(settings), max_wait_s=0.05)
    while sink.step():
        pass
    sink.close()
    bus.close()
