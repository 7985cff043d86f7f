"""Charter with a full disk, a held database, a server that is away and hostile bytes: `python -m tests.chaos`, small."""

import uuid

import pytest

from tests.chaos import faults

pytestmark = pytest.mark.timeout(600)


def run(lines):
    """A scenario raises when a promise did not hold."""
    return list(lines)


def mounted(scenario):
    try:
        run(scenario)
    except PermissionError as error:
        pytest.skip(f"no small disk to fill: {error}")


def test_a_full_disk_under_the_database(tmp_path):
    mounted(faults.run_full_sink_disk(tmp_path, prompts=500))


def test_a_full_disk_under_the_embedded_log(tmp_path):
    mounted(faults.run_full_log_disk(tmp_path, prompts=250))


def test_a_database_that_another_program_holds(tmp_path):
    run(faults.run_locked_database(tmp_path, prompts=20, hold_s=4.0))


def test_a_model_server_that_goes_away(tmp_path):
    run(faults.run_server_outage(tmp_path, prompts=20, outage_s=2.0))


@pytest.mark.kafka
def test_hostile_bytes_on_kafka(tmp_path, kafka_address):
    run(faults.run_hostile_bytes(tmp_path, kafka_address, num_messages=1000, prefix=f"c{uuid.uuid4().hex[:8]}."))
