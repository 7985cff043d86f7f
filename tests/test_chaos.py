"""Killed and stopped processes, concurrent producers, changing group membership: scenarios of `python -m tests.chaos` at a small size."""

import os
import uuid

import pytest

from tests.chaos import faults, signals
from tests.chaos.clock_steps import run_clock_steps
from tests.chaos.concurrent_producers import run_concurrent_producers
from tests.chaos.damaged_database import run_damaged_database
from tests.chaos.process_kills import KillScenario, kill_everything
from tests.chaos.system import make_broker
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
    progress = run(kill_everything(tmp_path, KillScenario(num_prompts=60, num_kills=6, seed=3), on_kafka=False))
    assert progress[-1] == "every table equals that of the undisturbed run"


@pytest.mark.kafka
@needs_kafka_home
def test_killing_every_process_and_a_broker_while_policies_are_published_loses_nothing(tmp_path):
    sizes = KillScenario(num_prompts=40, num_kills=3, num_broker_kills=1, seed=4, publish_policies=True)
    progress = run(kill_everything(tmp_path, sizes, on_kafka=True))
    assert "responses by version" in progress[-1]


@pytest.mark.kafka
@needs_kafka_home
def test_commit_that_lost_its_records_is_repeated(tmp_path):
    with make_broker(tmp_path) as broker:
        assert len(run(faults.run_silent_commit(broker, 1))) == 1


@pytest.mark.kafka
def test_instance_that_lost_its_partitions_while_stopped_writes_nothing(tmp_path, default_kafka_address, prefix):
    run(faults.run_zombie(tmp_path, default_kafka_address, prompts=24, prefix=prefix))


@pytest.mark.kafka
def test_instances_join_and_leave_under_load(tmp_path, default_kafka_address, prefix):
    run(faults.run_membership_storm(tmp_path, default_kafka_address, prompts=40, num_changes=5, prefix=prefix))


@pytest.mark.kafka
def test_killed_producers_with_shared_prompts_cause_one_response_per_prompt(tmp_path, default_kafka_address, prefix):
    run(run_concurrent_producers(tmp_path, default_kafka_address, prompts=120, num_producers=2, num_kills=3, prefix=prefix))


def test_damaged_database_gets_every_row_once(tmp_path):
    run(run_damaged_database(tmp_path, prompts=4, num_damages=1))


def test_steps_of_the_wall_clock_change_nothing(tmp_path):
    run(run_clock_steps(tmp_path, prompts=12, num_steps=1))


def test_pairs_of_stop_signals_end_every_process(tmp_path):
    run(signals.run_signal_storm(tmp_path, num_pairs=2, num_parallel=2))


def test_ends_during_slow_generations_bury_no_record(tmp_path):
    run(signals.run_slow_generation_kills(tmp_path))
