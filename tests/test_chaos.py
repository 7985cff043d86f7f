"""Killed and stopped processes, changing group membership: scenarios of `python -m tests.chaos` at a small size."""

import os
import uuid
from pathlib import Path

import pytest

from tests.chaos import faults
from tests.chaos.process_kills import KillScenario, kill_everything
from tests.support.kafka import Broker
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.timeout(20 * HANG_S)  # a scenario reports a hang itself, with the condition that it waited for
needs_kafka_home = pytest.mark.skipif(
    not os.environ.get("KAFKA_HOME"), reason="no Apache Kafka that may be killed: set KAFKA_HOME"
)


def run(lines):
    """Run a scenario, which raises if a guarantee does not hold."""
    return list(lines)


@pytest.fixture
def prefix():
    return f"c{uuid.uuid4().hex[:8]}."


def test_killing_every_process_changes_no_table_on_the_embedded_log(tmp_path):
    progress = run(kill_everything(tmp_path, KillScenario(num_prompts=80, num_kills=6, seed=3), on_kafka=False))
    assert progress[-1] == "every table equals that of the undisturbed run"


@pytest.mark.kafka
@needs_kafka_home
def test_killing_every_process_and_a_broker_while_policies_are_published_loses_nothing(tmp_path):
    sizes = KillScenario(num_prompts=100, num_kills=5, num_broker_kills=1, seed=4, publish_policies=True)
    progress = run(kill_everything(tmp_path, sizes, on_kafka=True))
    assert "responses by version" in progress[-1]


@pytest.mark.kafka
@needs_kafka_home
def test_commit_that_lost_its_records_is_repeated(tmp_path):
    with Broker(Path(os.environ["KAFKA_HOME"]), tmp_path) as broker:
        assert len(run(faults.run_silent_commit(broker, 1))) == 1


@pytest.mark.kafka
def test_instance_that_lost_its_partitions_while_stopped_writes_nothing(tmp_path, kafka_address, prefix):
    run(faults.run_zombie(tmp_path, kafka_address, prompts=60, prefix=prefix))


@pytest.mark.kafka
def test_instances_join_and_leave_under_load(tmp_path, kafka_address, prefix):
    run(faults.run_membership_storm(tmp_path, kafka_address, prompts=40, num_changes=5, prefix=prefix))
