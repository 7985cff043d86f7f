"""`charter replay` and `run --until-done` on a broker with the default join delay: finished means that everything is processed."""

import os
import uuid
from collections import Counter

import pytest

from charter.connect import connect_bus
from engine.bus.read import read_topic
from schemas.codec import decode_record
from schemas.records import Preference
from tests.support.deployment import PROMPTS, Deployment, finished_deployment
from tests.support.fork_server import CHARTER_MODULES, get_fork_server
from tests.support.waiting import HANG_S, wait_until

pytestmark = pytest.mark.kafka


@pytest.fixture
def deployment(tmp_path, default_kafka_address):
    return Deployment(tmp_path / "data", default_kafka_address, f"r{uuid.uuid4().hex[:8]}.")


def count_judgments(deployment, run_id):
    """Return how often each response was judged in a run, from the topic."""
    bus = connect_bus(deployment.settings())
    records = [
        decode_record(raw.value, Preference)
        for raw in read_topic(bus, "preferences")
        if ("run", run_id.encode()) in raw.headers
    ]
    bus.close()
    return Counter(record.parent_ids[0] for record in records)


def start_replay(deployment, name):
    flags = [word for key, value in deployment.flags.items() for word in ("--set", f"{key}={value}")]
    arguments = ["replay", "--stage", "judge", "--as", name, *flags]
    folder, output = deployment.folder.parent, deployment.folder.parent / "replay.log"
    server = get_fork_server(*CHARTER_MODULES)
    return server.start("charter.__main__:main", arguments, folder=folder, environment=os.environ, output=output)


def test_replay_waits_until_its_groups_have_joined(deployment):
    finished_deployment(deployment)
    output = deployment.call("replay", "--stage", "judge", "--as", "again")
    assert f"selected {PROMPTS}, done {PROMPTS}, skipped 0, dead letters 0" in output
    assert sorted(count_judgments(deployment, "again").values()) == [1] * PROMPTS


def test_killed_replay_continues_at_its_first_bounds(deployment):
    finished_deployment(deployment)
    for _ in range(2):  # killed while its groups join, and again
        process = start_replay(deployment, "killed")
        bus = connect_bus(deployment.settings())
        wait_until(lambda bus=bus: any(("run", b"killed") in raw.headers for raw in read_topic(bus, "responses")))
        bus.close()
        process.kill()
        process.wait(HANG_S)
    deployment.publish("A prompt that came later")
    deployment.stream(PROMPTS + 1)
    assert start_replay(deployment, "killed").wait(HANG_S) == 0
    assert sorted(count_judgments(deployment, "killed").values()) == [1] * PROMPTS
    output = deployment.call("replay", "--stage", "judge", "--from", "run:killed", "--as", "replay-of-replay")
    assert f"selected {PROMPTS}, done {PROMPTS}" in output
    assert sorted(count_judgments(deployment, "replay-of-replay").values()) == [1] * PROMPTS


def test_until_done_processes_everything(deployment):
    deployment.publish("One?", "Two?", "Three?")
    deployment.call("run", "--until-done")
    assert deployment.sql("SELECT count(*), count(end_reason), count(preferences) FROM traces") == [(3, 3, 3)]
