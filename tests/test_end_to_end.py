"""The whole pipeline with the scripted model: each prompt passes every stage once, also after kills and duplicates."""

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
from tests.support.waiting import HANG_S, wait_until

PROMPTS = 40


def make_settings(folder, **flags):
    required = {"data.folder": str(folder), "models.policy": "scripted", "run.id": "r", "prompts.eval_fraction": "0"}
    return load_settings(required | {name.replace("__", "."): value for name, value in flags.items()}, environment={})[0]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request, tmp_path):
    flags = {}
    if request.param == "kafka":
        address = request.getfixturevalue("kafka_address")
        flags = {"bus__address": address, "bus__prefix": f"{tmp_path.name}-{time.time_ns()}.", "bus__partitions": "3"}
    return make_settings(tmp_path / "data", **flags)


def query_value(settings, sql):
    store = open_store(settings)
    return store.query(sql, limit_s=HANG_S).rows[0][0] if store.path.exists() else 0


FINISHED = """SELECT count(*) FROM prompts p WHERE EXISTS (FROM revision_chains e WHERE e.prompt_id = p.prompt_id)
              AND EXISTS (FROM preferences j WHERE j.prompt_id = p.prompt_id)"""


def check_results(settings, prompts=PROMPTS):
    """Require one response and one label for each prompt, one end for each chain, no duplicates and no missing parents."""
    assert query_value(settings, "SELECT sum(duplicates) FROM pipeline_status") == 0
    assert (
        query_value(settings, "SELECT count(*) FROM responses")
        == prompts
        == query_value(settings, "SELECT count(*) FROM preferences")
    )
    assert query_value(settings, "SELECT count(DISTINCT response_id) FROM revision_chains") == prompts
    assert query_value(settings, "SELECT count(*) FROM revision_chains") == prompts
    orphans = """WITH created AS (FROM responses SELECT record_id UNION FROM critiques SELECT record_id
                               UNION FROM revisions SELECT record_id),
                      named AS (FROM critiques SELECT unnest(parent_ids) AS id UNION FROM revisions SELECT unnest(parent_ids))
                 SELECT count(*) FROM named WHERE id NOT IN (FROM created)"""
    assert query_value(settings, orphans) == 0
    assert query_value(settings, "SELECT count(*) FROM critiques WHERE NOT final") == query_value(
        settings, "SELECT count(*) FROM revisions"
    )


def test_every_prompt_passes_every_stage_once(settings):
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: query_value(settings, FINISHED) == PROMPTS, host)
    check_results(settings)
    trace = open_store(settings).query_dicts("SELECT * FROM traces WHERE revisions IS NOT NULL LIMIT 1")[0]
    assert trace["responses"] and trace["critiques"] and trace["preferences"] and trace["final_response"]
    assert query_value(settings, "SELECT count(*) FROM runs") == 1
    bus.close()


def test_restart_in_mid_run_changes_no_result(settings):
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    for target in (3, 20):
        with make_host(settings, bus, STAGES, sink=True) as host:
            wait_until(lambda target=target: query_value(settings, "SELECT count(*) FROM responses") >= target, host)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: query_value(settings, FINISHED) == PROMPTS, host)
    check_results(settings)
    bus.close()


def test_duplicate_delivery_is_marked_and_trained_on_once(tmp_path):
    settings = make_settings(tmp_path)
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=10)
    duplicates = [ProducerRecord("prompts", m.key, m.value, m.headers) for m in read_topic(bus, "prompts")]
    bus.publish(duplicates)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: query_value(settings, FINISHED) == 10, host)
        # The policy responds to each prompt once. Other duplicates are processed, and the database marks them.
        bus.publish([ProducerRecord("responses", m.key, m.value, m.headers) for m in read_topic(bus, "responses")])
        wait_until(
            lambda: (
                query_value(settings, "SELECT sum(records + duplicates) FROM pipeline_status WHERE topic = 'preferences'") == 20
            ),
            host,
        )
        wait_until(lambda: set(compute_lags(bus, "r", settings).values()) == {0}, host)
        assert [worker.num_duplicates for worker in host.workers] == [10, 0, 0, 0, 0]
    for table in ("prompts", "responses", "preferences"):
        assert query_value(settings, f"SELECT duplicates FROM pipeline_status WHERE topic = '{table}'") == 10
        assert query_value(settings, f"SELECT content_mismatches FROM pipeline_status WHERE topic = '{table}'") == 0
    assert (
        query_value(settings, "SELECT count(*) FROM sft_examples")
        == 10
        == query_value(settings, "SELECT count(*) FROM preference_pairs")
    )
    bus.close()


def test_poisoned_prompt_becomes_a_dead_letter_and_the_others_finish(tmp_path):
    settings = make_settings(tmp_path / "data")
    bus = connect_bus(settings)
    lines = tmp_path / "p.jsonl"
    lines.write_text(f'"fine"\n"{POISON_TEXT}"\n"also fine"\n')
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(lines))
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(
            lambda: query_value(settings, FINISHED) == 2 and query_value(settings, "SELECT count(*) FROM dead_letters") == 1,
            host,
        )
    assert (
        query_value(settings, "SELECT stage || ' ' || kind || ' ' || source_topic FROM dead_letters")
        == "respond PERMANENT prompts"
    )
    bus.close()


RUN_SCRIPT = """
    import sys
    from charter.connect import connect_bus
    from charter.pipeline import STAGES, make_host
    from engine.settings import load_settings
    settings = load_settings({"data.folder": sys.argv[1], "models.policy": "scripted", "run.id": "r", "prompts.eval_fraction": "0"})[0]
    with make_host(settings, connect_bus(settings), STAGES, sink=True) as host:
        print("running", flush=True)
        host.failure_event.wait()
"""


def test_sigkill_loses_and_duplicates_nothing(tmp_path):
    settings = make_settings(tmp_path)
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH))
    for rows in (1, 30, 90):
        command = [sys.executable, "-c", textwrap.dedent(RUN_SCRIPT), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "running\n"
            wait_until(lambda rows=rows: sum(bus.end_offsets(["responses", "critiques", "preferences"]).values()) >= rows)
            os.kill(process.pid, signal.SIGKILL)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: query_value(settings, FINISHED) == 72, host)
    check_results(settings, 72)
    bus.close()


def test_two_processes_share_a_stage(tmp_path):
    settings = make_settings(tmp_path)
    bus = connect_bus(settings)
    first = make_host(settings, bus, STAGES, sink=True, instance="a")
    second = make_host(settings, bus, ["respond", "judge"], sink=False, instance="b")
    with first, second:
        wait_until(
            lambda: all(
                len(w.consumer.assignment()) == 6 for h in (first, second) for w in h.workers if w.stage.name == "respond"
            )
        )
        FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
        wait_until(lambda: query_value(settings, FINISHED) == PROMPTS, first)
    assert all(w.num_committed for h in (first, second) for w in h.workers if w.stage.name == "respond")
    check_results(settings)
    bus.close()
