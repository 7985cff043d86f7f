"""The whole stream with the scripted model: every prompt once through every stage, whatever is killed or comes twice."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from charter.connect import connect_bus, open_store
from charter.lag import compute_lags
from charter.pipeline import STAGES, make_host
from engine.bus.port import ProducerRecord
from engine.bus.read import read_topic
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer

WITHIN_S = 60
PROMPTS = 40


def settings_for(folder, **flags):
    wanted = {"data.folder": str(folder), "models.policy": "scripted", "run.id": "r", "prompts.eval_fraction": "0"}
    return load_settings(wanted | {name.replace("__", "."): value for name, value in flags.items()}, environment={})[0]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request, tmp_path):
    flags = {}
    if request.param == "kafka":
        address = request.getfixturevalue("kafka_address")
        flags = {"bus__address": address, "bus__prefix": f"{tmp_path.name}-{time.time_ns()}.", "bus__partitions": "3"}
    return settings_for(tmp_path / "data", **flags)


def one(settings, sql):
    store = open_store(settings)
    return store.query(sql, limit_s=10.0).rows[0][0] if store.path.exists() else 0


FINISHED = """SELECT count(*) FROM prompts p WHERE EXISTS (FROM revision_chains e WHERE e.prompt_id = p.prompt_id)
              AND EXISTS (FROM preferences j WHERE j.prompt_id = p.prompt_id)"""


def wait_for(condition, host=None):
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        if host:
            host.raise_if_failed()
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def check_whole(settings, prompts=PROMPTS):
    """Everything is there once: one response a prompt, one end a chain, one label a pair, and lineage that leads back."""
    assert one(settings, "SELECT sum(duplicates) FROM pipeline_status") == 0
    assert one(settings, "SELECT count(*) FROM responses") == prompts == one(settings, "SELECT count(*) FROM preferences")
    assert one(settings, "SELECT count(DISTINCT response_id) FROM revision_chains") == prompts
    assert one(settings, "SELECT count(*) FROM revision_chains") == prompts
    orphans = """WITH made AS (FROM responses SELECT record_id UNION FROM critiques SELECT record_id
                               UNION FROM revisions SELECT record_id),
                      named AS (FROM critiques SELECT unnest(parent_ids) AS id UNION FROM revisions SELECT unnest(parent_ids))
                 SELECT count(*) FROM named WHERE id NOT IN (FROM made)"""
    assert one(settings, orphans) == 0
    assert one(settings, "SELECT count(*) FROM critiques WHERE NOT final") == one(settings, "SELECT count(*) FROM revisions")


def test_every_prompt_goes_all_the_way_once(settings):
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_for(lambda: one(settings, FINISHED) == PROMPTS, host)
    check_whole(settings)
    story = open_store(settings).query_dicts("SELECT * FROM traces WHERE revisions IS NOT NULL LIMIT 1")[0]
    assert story["responses"] and story["critiques"] and story["preferences"] and story["final_response"]
    assert one(settings, "SELECT count(*) FROM runs") == 1
    bus.close()


def test_a_restart_in_the_middle_changes_nothing(settings):
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    for target in (3, 20):
        with make_host(settings, bus, STAGES, sink=True) as host:
            wait_for(lambda target=target: one(settings, "SELECT count(*) FROM responses") >= target, host)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_for(lambda: one(settings, FINISHED) == PROMPTS, host)
    check_whole(settings)
    bus.close()


def test_duplicate_delivery_is_marked_and_not_trained_on_twice(tmp_path):
    settings = settings_for(tmp_path)
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=10)
    again = [ProducerRecord("prompts", m.key, m.value, m.headers) for m in read_topic(bus, "prompts")]
    bus.publish(again)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_for(
            lambda: one(settings, "SELECT sum(records + duplicates) FROM pipeline_status WHERE topic = 'preferences'") == 20,
            host,
        )
        wait_for(lambda: set(compute_lags(bus, "r", "completions").values()) == {0}, host)
        wait_for(lambda: one(settings, FINISHED) == 10, host)
    for table in ("prompts", "responses", "preferences"):
        assert one(settings, f"SELECT duplicates FROM pipeline_status WHERE topic = '{table}'") == 10
        assert one(settings, f"SELECT content_mismatches FROM pipeline_status WHERE topic = '{table}'") == 0
    assert one(settings, "SELECT count(*) FROM sft_examples") == 10 == one(settings, "SELECT count(*) FROM preference_pairs")
    bus.close()


def test_a_poisoned_prompt_is_a_dead_letter_and_the_others_go_on(tmp_path):
    settings = settings_for(tmp_path / "data")
    bus = connect_bus(settings)
    lines = tmp_path / "p.jsonl"
    lines.write_text(f'"fine"\n"{POISON_TEXT}"\n"also fine"\n')
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(lines))
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_for(lambda: one(settings, FINISHED) == 2 and one(settings, "SELECT count(*) FROM dead_letters") == 1, host)
    assert one(settings, "SELECT stage || ' ' || kind || ' ' || source_topic FROM dead_letters") == "respond PERMANENT prompts"
    bus.close()


RUN = """
    import sys
    from charter.connect import connect_bus
    from charter.pipeline import STAGES, make_host
    from engine.settings import load_settings
    settings = load_settings({"data.folder": sys.argv[1], "models.policy": "scripted", "run.id": "r", "prompts.eval_fraction": "0"})[0]
    with make_host(settings, connect_bus(settings), STAGES, sink=True) as host:
        print("running", flush=True)
        host.failure_event.wait()
"""


def test_killed_with_no_warning_it_loses_and_doubles_nothing(tmp_path):
    settings = settings_for(tmp_path)
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH))
    for rows in (1, 30, 90):
        command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "running\n"
            wait_for(lambda rows=rows: sum(bus.end_offsets(["responses", "critiques", "preferences"]).values()) >= rows)
            os.kill(process.pid, signal.SIGKILL)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_for(lambda: one(settings, FINISHED) == 72, host)
    check_whole(settings, 72)
    bus.close()


def test_two_processes_share_a_stage(tmp_path):
    settings = settings_for(tmp_path)
    bus = connect_bus(settings)
    first = make_host(settings, bus, STAGES, sink=True, instance="a")
    second = make_host(settings, bus, ["respond", "judge"], sink=False, instance="b")
    with first, second:
        wait_for(
            lambda: all(
                len(w.consumer.assignment()) == 6 for h in (first, second) for w in h.workers if w.stage.name == "respond"
            )
        )
        FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
        wait_for(lambda: one(settings, FINISHED) == PROMPTS, first)
    assert all(w.num_committed for h in (first, second) for w in h.workers if w.stage.name == "respond")
    check_whole(settings)
    bus.close()
