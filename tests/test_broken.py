"""Scenarios of `python -m tests.chaos` at a small size: full disks, a locked database, a server outage, hostile bytes."""

import uuid

import pytest

from tests.chaos import faults
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.timeout(12 * HANG_S)  # a scenario reports a hang itself, with the condition that it waited for


def run(lines):
    """Run a scenario, which raises if a guarantee does not hold."""
    return list(lines)


def run_with_mounts(scenario):
    try:
        run(scenario)
    except PermissionError as error:
        pytest.skip(f"no permission to mount a small disk: {error}")


def test_sink_waits_while_the_database_disk_is_full(tmp_path):
    run_with_mounts(faults.run_full_sink_disk(tmp_path, prompts=500))


def test_pipeline_waits_while_the_embedded_log_disk_is_full(tmp_path):
    run_with_mounts(faults.run_full_log_disk(tmp_path, prompts=250))


def test_sink_waits_while_another_process_locks_the_database(tmp_path):
    run(faults.run_locked_database(tmp_path, prompts=20, hold_s=4.0))


def test_judge_survives_an_outage_of_its_model_server(tmp_path):
    run(faults.run_server_outage(tmp_path, prompts=20, outage_s=2.0))


@pytest.mark.kafka
def test_hostile_bytes_on_kafka_become_dead_letters(tmp_path, default_kafka_address):
    run(faults.run_hostile_bytes(tmp_path, default_kafka_address, num_messages=1000, prefix=f"c{uuid.uuid4().hex[:8]}."))
