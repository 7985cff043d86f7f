"""Where a stage starts: with offsets that were deleted, changed by another program, or of a topic that was created again."""

import uuid
from contextlib import closing

import pytest

from engine.bus import open_bus
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_between, read_topic
from engine.errors import OffsetsLost, TopicChanged, UsageError
from engine.host import Host
from engine.positions import TARGET_STAGE_HEADER, PositionFinder, parse_source
from engine.run_starts import ensure_run_start, read_start_positions
from engine.worker import to_producer_record
from schemas.codec import decode_record
from schemas.records import DeadLetter
from tests.support.kafka_operator import KafkaOperator
from tests.support.respond_worker import (
    SPECS,
    make_prompt,
    make_worker,
    name_prompts,
    publish,
    read_answered,
    run_until_done,
)
from tests.support.waiting import wait_until


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def bus(request, tmp_path):
    address = str(tmp_path / "log") if request.param == "embedded" else request.getfixturevalue("kafka_address")
    bus = open_bus(address, prefix=f"p{uuid.uuid4().hex[:8]}.")
    bus.create_topics(SPECS)
    yield bus
    bus.close()


@pytest.fixture
def kafka_bus(kafka_address):
    bus = open_bus(kafka_address, prefix=f"p{uuid.uuid4().hex[:8]}.")
    bus.create_topics(SPECS)
    yield bus
    bus.close()


@pytest.fixture
def operator(kafka_bus):
    return KafkaOperator(kafka_bus.servers, kafka_bus.prefix)


def test_outputs_name_their_source(bus):
    publish(bus, ["one", "it fails"])
    run_until_done(bus)
    topic_id = bus.topic_ids(["prompts"])["prompts"]
    sources = {("respond", topic_id, raw.partition, raw.offset) for raw in read_topic(bus, "prompts")}
    outputs = [*read_topic(bus, "responses"), *read_topic(bus, "dead-letters")]
    assert len(outputs) == 2 and {parse_source(raw.headers) for raw in outputs} == sources


def test_worker_without_offsets_continues_after_its_outputs(bus):
    publish(bus, ["it fails", *name_prompts(0, 20)])
    run_until_done(bus)
    bus.delete_committed("r.respond", ["prompts"])
    publish(bus, name_prompts(20, 30))
    run_until_done(bus)
    assert read_answered(bus) == name_prompts(0, 30)
    letters = [decode_record(raw.value, DeadLetter) for raw in read_topic(bus, "dead-letters")]
    assert [letter.kind for letter in letters] == ["EXHAUSTED"]


def test_run_starts_at_its_first_record_and_skips_older_records(bus):
    publish(bus, name_prompts(0, 10), run="old")
    bus.publish([to_producer_record(make_prompt("early", "r"))])  # a program that does not know run starts
    bus.publish([to_producer_record(make_prompt(f"between {n}", "old")) for n in range(9)])
    start = ensure_run_start(bus, "r")
    (early,) = [raw for raw in read_topic(bus, "prompts") if ("run", b"r") in raw.headers]
    assert start.offsets[TopicPartition("prompts", early.partition)] == early.offset
    others = {tp: end for tp, end in bus.end_offsets(["prompts"]).items() if tp.partition != early.partition}
    assert {tp: start.offsets[tp] for tp in others} == others
    publish(bus, ["late"])
    worker = run_until_done(bus)
    assert read_answered(bus) == ["early", "late"]
    assert worker.num_of_other_runs.total() < 19


def test_undecodable_record_without_a_run_is_not_skipped(bus):
    bus.publish([ProducerRecord("prompts", b"k", b"garbage")])
    run_until_done(bus)
    assert len(list(read_topic(bus, "dead-letters"))) == 1


def test_first_start_of_a_run_counts(bus):
    first = ensure_run_start(bus, "r")
    publish(bus, ["one"])
    (raw,) = list(read_topic(bus, "run-starts"))
    bus.publish([ProducerRecord("run-starts", raw.key, raw.value)])
    assert ensure_run_start(bus, "r") == first == read_start_positions(bus, "r")
    assert len(list(read_topic(bus, "run-starts"))) == 2
    assert read_start_positions(bus, "another") is None


def test_only_the_first_record_of_a_key_is_processed(bus):
    publish(bus, ["one", "two"])
    publish(bus, ["two", "three"])
    publish(bus, ["one"], run="another")
    assert run_until_done(bus, first=True).num_duplicates == 1
    publish(bus, ["one", "two", "four"])
    retried = to_producer_record(make_prompt("three"))
    bus.publish([ProducerRecord("prompts", retried.key, retried.value, (*retried.headers, (TARGET_STAGE_HEADER, b"respond")))])
    assert run_until_done(bus, first=True).num_duplicates == 2  # a new process knows the keys of earlier records
    assert read_answered(bus) == ["four", "one", "three", "three", "two"]


def test_records_with_equal_foreign_keys_are_all_processed(bus):
    ensure_run_start(bus, "r")
    records = [to_producer_record(make_prompt(text)) for text in ("one", "two")]
    bus.publish([ProducerRecord(record.topic, b"same", record.value, record.headers) for record in records])
    run_until_done(bus, first=True)
    assert read_answered(bus) == ["one", "two"]


def test_lookup_stops_with_the_worker(bus):
    publish(bus, ["one"])
    run_until_done(bus)
    finder = PositionFinder(bus, ensure_run_start(bus, "r"), "respond", bus.topic_ids(["prompts"]), ("responses",))
    finder.cancelled.set()
    with pytest.raises(InterruptedError):
        finder.recover(list(bus.end_offsets(["prompts"])))


@pytest.mark.kafka
def test_offset_of_another_program_is_refused(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 9))
    run_until_done(kafka_bus)
    ends = kafka_bus.end_offsets(["prompts"])
    stamp = f"charter:{kafka_bus.topic_ids(['prompts'])['prompts']}:9999"  # kept by a tool that changes only the offsets
    changes = (dict.fromkeys(ends, 0), ""), (ends, ""), ({tp: end + 100 for tp, end in ends.items()}, ""), (ends, stamp)
    for changed, metadata in changes:
        operator.alter_offsets("r.respond", changed, metadata)
        with pytest.raises(UsageError, match=r"of respond in prompts\[\d\] was not written by Charter\n.*r\.respond"):
            run_until_done(kafka_bus)
    kafka_bus.delete_committed("r.respond", ["prompts"])
    publish(kafka_bus, name_prompts(9, 12))
    run_until_done(kafka_bus)
    assert read_answered(kafka_bus) == name_prompts(0, 12)


@pytest.mark.kafka
def test_recreated_topic_is_read_from_its_beginning(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    run_until_done(kafka_bus)
    operator.recreate_topics("prompts")
    publish(kafka_bus, name_prompts(30, 40))
    run_until_done(kafka_bus)
    assert read_answered(kafka_bus) == name_prompts(0, 40)


@pytest.mark.kafka
def test_running_worker_ends_when_its_topic_is_recreated(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    worker = make_worker(kafka_bus)
    with Host([worker]) as host:
        wait_until(lambda: kafka_bus.committed("r.respond", ["prompts"]) == kafka_bus.end_offsets(["prompts"]), host)
        operator.recreate_topics("prompts")
        publish(kafka_bus, name_prompts(30, 90))
        host.failure_event.wait(60)
    with pytest.raises(TopicChanged, match="topic prompts was deleted") as caught:
        host.raise_if_failed()
    assert caught.value.exit_code == 3
    run_until_done(kafka_bus)
    assert read_answered(kafka_bus) == name_prompts(0, 90)


@pytest.mark.kafka
def test_records_deleted_before_a_stage_has_read_them_are_reported(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    operator.delete_records("prompts", 4)
    with pytest.raises(OffsetsLost, match=r"prompts\[\d\]@0 no longer exists: the log begins at 4\n.*respond has not read"):
        run_until_done(kafka_bus)
    publish(kafka_bus, name_prompts(30, 40), run="later")  # a run that begins after the deletion
    run_until_done(kafka_bus, "later")
    assert read_answered(kafka_bus, "later") == name_prompts(30, 40)


@pytest.mark.kafka
def test_read_of_a_whole_topic_skips_records_that_are_deleted_meanwhile(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    starts, ends = kafka_bus.beginning_offsets(["prompts"]), kafka_bus.end_offsets(["prompts"])
    operator.delete_records("prompts", 4)
    with pytest.raises(OffsetsLost, match="start the command again"):
        list(read_between(kafka_bus, starts, ends))
    records = list(read_between(kafka_bus, starts, ends, skip_deleted=True))
    assert len(records) == 30 - 3 * 4 and min(record.offset for record in records) == 4


@pytest.mark.kafka
def test_records_deleted_under_a_running_stage_are_reported_with_the_command_for_this_stage(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    operator.delete_records("prompts", 4)
    with closing(kafka_bus.open_consumer("run.1.respond", ["prompts"], member="a")) as consumer:
        wait_until(lambda: len(consumer.assignment()) == 3 or consumer.poll(0.1, 1))
        with pytest.raises(OffsetsLost, match=r"charter offsets set --run run\.1 --stage respond --to earliest"):
            for tp in consumer.assignment():
                consumer.seek(tp, 0)
                consumer.poll(5.0, 1)


@pytest.mark.kafka
def test_position_without_offsets_and_outputs_is_refused(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 30))
    run_until_done(kafka_bus)
    kafka_bus.delete_committed("r.respond", ["prompts"])
    operator.delete_records("responses")
    with pytest.raises(UsageError, match=r"the position of respond in prompts\[\d\] is unknown"):
        run_until_done(kafka_bus)


@pytest.mark.kafka
def test_added_partitions_do_not_move_the_keys_of_a_run(kafka_bus, operator):
    publish(kafka_bus, name_prompts(0, 20))
    operator.add_partitions(7, "prompts", "responses")
    start = ensure_run_start(kafka_bus, "r")
    kafka_bus.publish([start.assign_partition(to_producer_record(make_prompt(text))) for text in name_prompts(0, 40)])
    assert run_until_done(kafka_bus, first=True).num_duplicates == 20
    assert read_answered(kafka_bus) == name_prompts(0, 40)
    for topic in ("prompts", "responses"):
        assert {raw.partition for raw in read_topic(kafka_bus, topic)} <= {0, 1, 2}
    later = ensure_run_start(kafka_bus, "later")
    records = [later.assign_partition(to_producer_record(make_prompt(text, "later"))) for text in name_prompts(0, 60)]
    assert {record.partition for record in records} == set(range(7))
