"""Changes to the log that Charter does not make: scenarios of `python -m tests.chaos` at a small size.

The broker has the default join delay of Kafka.
"""

import uuid

import pytest

from tests.chaos import log_changes
from tests.support.waiting import HANG_S

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(12 * HANG_S)]  # a scenario reports a hang itself, with its condition


@pytest.fixture
def place(tmp_path, default_kafka_address):
    """Return the folder, the log and the prefix of a scenario."""
    return {"folder": tmp_path, "address": default_kafka_address, "prefix": f"l{uuid.uuid4().hex[:8]}."}


def run(lines):
    """Run a scenario, which raises if a guarantee does not hold. Return its progress lines."""
    return list(lines)


def test_lost_offsets_cause_no_second_response(place):
    run(log_changes.run_offset_expiry(**place, prompts=18, num_expiries=2, expire=log_changes.delete_groups))


def test_reset_offsets_are_refused_and_restored(place):
    assert len(run(log_changes.run_offset_resets(**place, resets=["beyond the end"], prompts=16))) == 1


def test_deleted_records_are_reported(place):
    assert len(run(log_changes.run_deleted_records(**place, prompts=20))) == 3


@pytest.mark.parametrize("state", ["running", "stopped", "paused"])
def test_recreated_topics_are_read_from_their_beginning(place, state):
    topics = ["prompts"] if state == "running" else log_changes.WORK_TOPICS
    run(log_changes.run_recreated_topics(**place, state=state, topics=topics, prompts=30))


def test_added_partitions_serve_later_runs(place):
    run(log_changes.run_added_partitions(**place, prompts=24, wait_for_discovery=False))
