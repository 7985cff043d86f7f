"""Charter while its parts are killed, stopped and moved: scenarios of `python -m tests.chaos`, small."""

import os
import uuid
from pathlib import Path

import pytest

from tests.chaos import faults
from tests.chaos.process_kills import KillScenario, kill_everything
from tests.support.kafka import Broker

pytestmark = pytest.mark.timeout(3600)  # what hangs ends by the scenario's own patience, and says what it waited for
own_broker = pytest.mark.skipif(not os.environ.get("KAFKA_HOME"), reason="no Apache Kafka to kill: set KAFKA_HOME")


def run(lines):
    """A scenario raises when a promise did not hold."""
    return list(lines)


@pytest.fixture
def prefix():
    return f"c{uuid.uuid4().hex[:8]}."


def test_kill_9_over_every_part_on_the_embedded_log(tmp_path):
    said = run(kill_everything(tmp_path, KillScenario(num_prompts=80, num_kills=6, seed=3), on_kafka=False))
    assert said[-1] == "every table equals the undisturbed run's"


@pytest.mark.kafka
@own_broker
def test_kill_9_over_every_part_and_a_broker_while_policies_are_published(tmp_path):
    sizes = KillScenario(num_prompts=100, num_kills=5, num_broker_kills=1, seed=4, publish_policies=True)
    said = run(kill_everything(tmp_path, sizes, on_kafka=True))
    assert "answers by version" in said[-1]


@pytest.mark.kafka
@own_broker
def test_a_commit_that_says_yes_although_nothing_was_written(tmp_path):
    with Broker(Path(os.environ["KAFKA_HOME"]), tmp_path) as broker:
        assert len(run(faults.run_silent_commit(broker, 1))) == 1


@pytest.mark.kafka
def test_a_copy_that_wakes_after_its_partitions_moved_writes_nothing(tmp_path, kafka_address, prefix):
    run(faults.run_zombie(tmp_path, kafka_address, prompts=60, prefix=prefix))


@pytest.mark.kafka
def test_copies_join_and_leave_while_work_goes_on(tmp_path, kafka_address, prefix):
    run(faults.run_membership_storm(tmp_path, kafka_address, prompts=40, num_changes=5, prefix=prefix))
