"""`charter offsets`: each verb, the positions that it sets, and what it refuses."""

import uuid

import pytest

from engine.bus import open_bus
from engine.bus.port import TopicPartition
from engine.errors import UsageError
from engine.host import Host
from tests.support.deployment import Deployment
from tests.support.kafka_operator import KafkaOperator
from tests.support.respond_worker import SPECS, make_worker, name_prompts, publish, read_answered, run_until_done
from tests.support.waiting import wait_until

VERBS = [["accept"], ["restore"], ["set", "--to", "latest"], ["set", "--to", "earliest"]]


class OffsetsCommand:
    """A log with run "r" of the stage respond, and `charter offsets` on it. `operator` is another program, on Kafka only."""

    def __init__(self, folder, address, prefix):
        self.deployment = Deployment(folder, address, prefix)
        self.bus = open_bus(address, prefix=prefix)
        self.bus.create_topics(SPECS)
        self.operator = KafkaOperator(self.bus.servers, prefix) if address.startswith("kafka://") else None

    def call(self, *words, run="r"):
        return self.deployment.call("offsets", *words, "--stage", "respond", "--run", run)

    def fails(self, match, *words, run="r"):
        self.deployment.fails(UsageError, match, "offsets", *words, "--stage", "respond", "--run", run)

    def reset(self, compute_offset):
        """Change the committed offsets to a function of the end offsets, as another program does."""
        self.operator.alter_offsets("r.respond", {tp: compute_offset(end) for tp, end in self.end_offsets().items()})

    def end_offsets(self):
        return self.bus.end_offsets(["prompts"])

    def list_committed(self):
        return self.bus.list_committed("r.respond", ["prompts"])


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def command(request, tmp_path):
    address = str(tmp_path / "log") if request.param == "embedded" else request.getfixturevalue("kafka_address")
    command = OffsetsCommand(tmp_path / "data", address, f"o{uuid.uuid4().hex[:8]}.")
    yield command
    command.bus.close()


@pytest.fixture
def kafka_command(tmp_path, kafka_address):
    command = OffsetsCommand(tmp_path / "data", kafka_address, f"o{uuid.uuid4().hex[:8]}.")
    publish(command.bus, name_prompts(0, 9))
    run_until_done(command.bus)
    yield command
    command.bus.close()


@pytest.mark.kafka
@pytest.mark.parametrize("compute_offset", [lambda end: 0, lambda end: end, lambda end: end + 100])
def test_restore_continues_after_the_last_outputs(kafka_command, compute_offset):
    publish(kafka_command.bus, name_prompts(9, 12))
    kafka_command.reset(compute_offset)
    with pytest.raises(UsageError, match=r"charter offsets restore --run r --stage respond"):
        run_until_done(kafka_command.bus)
    assert kafka_command.call("restore").startswith("respond continues at prompts[0]@")
    topic_id = kafka_command.bus.topic_ids(["prompts"])["prompts"]
    assert {committed.topic_id for committed in kafka_command.list_committed().values()} == {topic_id}
    run_until_done(kafka_command.bus)
    assert read_answered(kafka_command.bus) == name_prompts(0, 12)


@pytest.mark.kafka
def test_accept_continues_at_the_offsets_of_another_program(kafka_command):
    kafka_command.reset(lambda end: 0)
    assert "prompts[0]@0, prompts[1]@0, prompts[2]@0" in kafka_command.call("accept")
    run_until_done(kafka_command.bus)
    assert read_answered(kafka_command.bus) == sorted(2 * name_prompts(0, 9))  # the offsets repeat all work


@pytest.mark.kafka
def test_accept_skips_records_below_a_later_offset(kafka_command):
    publish(kafka_command.bus, name_prompts(9, 12))
    kafka_command.reset(lambda end: end)
    kafka_command.call("accept")
    publish(kafka_command.bus, name_prompts(12, 15))
    run_until_done(kafka_command.bus)
    assert read_answered(kafka_command.bus) == [*name_prompts(0, 9), *name_prompts(12, 15)]


@pytest.mark.kafka
def test_accept_refuses_offsets_beyond_the_end(kafka_command):
    kafka_command.reset(lambda end: end + 100)
    before = kafka_command.list_committed()
    kafka_command.fails(r"is not on the log\nthe log has the offsets 0 to \d+\ntype: charter offsets restore", "accept")
    assert kafka_command.list_committed() == before


@pytest.mark.kafka
def test_accept_refuses_offsets_below_the_beginning(kafka_command):
    kafka_command.operator.delete_records("prompts")
    kafka_command.reset(lambda end: 0)
    kafka_command.fails(r"the offset 0 of prompts\[\d\] is not on the log", "accept")


@pytest.mark.kafka
def test_restore_refuses_an_unknown_position(kafka_command):
    kafka_command.reset(lambda end: 0)
    kafka_command.operator.delete_records("responses")
    kafka_command.fails(r"the position of respond in prompts\[\d\] is unknown\n.*\n.*charter offsets set", "restore")


def test_accept_without_changed_offsets_is_refused(command):
    publish(command.bus, name_prompts(0, 3))
    command.fails("no offsets to accept", "accept")
    run_until_done(command.bus)
    command.fails("no offsets to accept\nno other program has changed its offsets", "accept")


def test_set_skips_or_repeats_records(command):
    publish(command.bus, name_prompts(0, 3), run="older")
    publish(command.bus, name_prompts(0, 3))
    command.call("set", "--to", "latest")
    assert {tp: committed.offset for tp, committed in command.list_committed().items()} == command.end_offsets()
    publish(command.bus, name_prompts(3, 6))
    run_until_done(command.bus)
    assert read_answered(command.bus) == name_prompts(3, 6)
    command.call("set", "--to", "earliest")
    worker = run_until_done(command.bus)
    assert read_answered(command.bus) == sorted([*name_prompts(0, 6), *name_prompts(3, 6)])
    assert not worker.num_of_other_runs  # the run starts after the records of the older run


def test_restore_without_a_change_repeats_nothing(command, caplog):
    publish(command.bus, name_prompts(0, 6))
    run_until_done(command.bus)
    command.call("restore")
    assert "has no committed offsets" not in caplog.text  # nothing is lost
    run_until_done(command.bus)
    assert read_answered(command.bus) == name_prompts(0, 6)


@pytest.mark.parametrize("verb", VERBS[1:])
def test_unknown_run_is_refused(command, verb):
    command.fails("there is no run other on the log", *verb, run="other")
    assert not command.bus.list_committed("other.respond", ["prompts"])


def test_offsets_of_a_running_stage_are_refused(command):
    publish(command.bus, name_prompts(0, 6))
    worker = make_worker(command.bus)
    with Host([worker]) as host:
        wait_until(lambda: command.bus.committed("r.respond", ["prompts"]) == command.end_offsets(), host)
        before = command.list_committed()
        for verb in VERBS[1:]:
            command.fails(r"offsets of r\.respond cannot be changed\n.*\nstop the processes of this stage first", *verb)
        assert command.list_committed() == before
        publish(command.bus, name_prompts(6, 9))
        wait_until(lambda: command.bus.committed("r.respond", ["prompts"]) == command.end_offsets(), host)
    host.raise_if_failed()
    assert read_answered(command.bus) == name_prompts(0, 9)


def test_offsets_of_one_partition_can_differ_from_the_others(command):
    publish(command.bus, name_prompts(0, 9))
    run_until_done(command.bus)
    command.bus.delete_committed("r.respond", ["prompts"])
    command.bus.set_committed("r.respond", {TopicPartition("prompts", 0): command.end_offsets()[TopicPartition("prompts", 0)]})
    publish(command.bus, name_prompts(9, 12))
    run_until_done(command.bus)
    assert read_answered(command.bus) == name_prompts(0, 12)
