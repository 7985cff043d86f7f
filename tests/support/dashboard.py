"""A small real run for the dashboard and the report: the demo with a two-layer model, hostile prompts, and a dead letter."""

import json

from click.testing import CliRunner

from charter.cli import cli
from charter.pipeline import STAGES, connect, make_host, store_of
from engine.bus.port import Outgoing
from engine.settings import load

RTL = "\u202eright to left\u202c مرحبا بالعالم"
HOSTILE = {
    "markup": "</p></div><h1>big</h1><b onmouseover=alert(1)>bold</b><img src=x onerror=alert(1)>",
    "script": "<script>document.title='owned'</script><svg/onload=fetch('http://192.0.2.1/')>'\"`{{7*7}}{% raw %}${7*7}",
    "escapes": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m and a bell \x07 and a zero-width \u200b joiner",
    "long": "w" * 1500 + " " + "ß" * 500,
    "direction": RTL,
}
SETTINGS = {
    "respond.max_tokens": "8", "critique.max_tokens": "8", "critique.few_shot": "false", "revise.max_tokens": "8",
    "critique.min_mass": "0", "judge.min_mass": "0", "prompts.eval_share": "0",
    "sft.learning_rate": "1e-3", "reward.learning_rate": "1e-2", "ppo.learning_rate": "1e-3",
}  # fmt: skip


def flags_of(folder, model, **more):
    return {"data.folder": str(folder), "models.policy": str(model), **SETTINGS, **more}


def call(folder, model, *arguments):
    flags = flags_of(folder, model)
    words = [word for key, value in flags.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(cli, [*map(str, arguments), *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def make_run(folder, model):
    """The demo with `model`, then hostile prompts in a run of their own; returns its settings."""
    call(folder, model, "demo", "--prompts", "4")
    return stream_hostile(folder, model, "hostile")


def stream_hostile(folder, model, run="live"):
    """A run on hostile prompts, one of which no stage can read, through every stage; returns its settings."""
    rows = folder.parent / "hostile.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "tags": ["<i>tag</i>"]}) + "\n" for text in HOSTILE.values()))
    call(folder, model, "produce", rows, "--run", run)
    settings = load(flags_of(folder, model, **{"run.id": run}), environment={})[0]
    bus = connect(settings)
    writer = bus.writer("test.broken")
    writer.commit([Outgoing("prompts", b"<b>key</b>", b"\x00not a record <script>\xff", ())])
    writer.close()
    of_run = f"WHERE run_id = '{run}'"
    ended = f"""SELECT (SELECT count(*) FROM revision_chains {of_run}), (SELECT count(*) FROM preferences {of_run}),
                       (SELECT count(*) FROM dead_letters) > 0"""
    store, wanted = store_of(settings), [(len(HOSTILE), len(HOSTILE), True)]
    with make_host(settings, bus, STAGES, sink=True) as host:
        while not store.path.exists() or store.query(ended, limit_s=20.0).rows != wanted:
            host.failed.wait(0.05)
            host.check()
    bus.close()
    return settings
