"""The bus contract, for the embedded log and a real Apache Kafka."""

import threading
import time
import uuid

import pytest

from engine.bus import open_bus
from engine.bus.partitioner import choose_partition
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_topic, read_values
from engine.errors import PartitionLost, TopicChanged, UsageError, WriterFenced
from schemas.records import PolicyUpdate, Prompt, Response
from schemas.topics import TopicSpec
from tests.support.waiting import HANG_S

SPECS = [
    TopicSpec("in", Prompt, num_partitions=4),
    TopicSpec("out", Response, num_partitions=4),
    TopicSpec("one", PolicyUpdate, True, 1),
]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def address(request, tmp_path):
    return str(tmp_path / "log") if request.param == "embedded" else request.getfixturevalue("kafka_address")


@pytest.fixture
def prefix():
    return f"t{uuid.uuid4().hex[:8]}."


@pytest.fixture
def bus(address, prefix):
    bus = open_bus(address, prefix=prefix)
    bus.create_topics(SPECS)
    yield bus
    bus.close()


def make_records(topic, numbers):
    return [ProducerRecord(topic, f"k{n % 7}".encode(), str(n).encode(), (("run", b"r"),)) for n in numbers]


def read_committed(consumer):
    return {tp: committed.offset for tp, committed in consumer.committed().items()}


def read_numbers(bus, topic):
    return sorted(int(value) for value in read_values(bus, topic))


def poll_until(condition, *keep_alive):
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        # Concurrently, because a rebalance needs all members, and a client completes it only while it polls.
        run_in_threads(*[lambda consumer=consumer: consumer.poll(0.2, 1) for consumer in keep_alive])


def run_in_threads(*functions):
    """Run the functions concurrently; raise the first failure."""
    failures = []

    def run(function):
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def move_records(bus, consumer, writer, count, batch=50):
    """Move `count` records from `in` to `out` with their offsets; return the number of moved records."""
    num_moved = 0
    deadline = time.monotonic() + HANG_S
    while num_moved < count and time.monotonic() < deadline:
        num_moved += move_batch(consumer, writer, batch)
    return num_moved


def try_commit(writer, outputs, offsets, consumer, epochs):
    """Commit the offsets of assigned partitions; return False if the group is rebalancing."""
    assert epochs == {partition_key: consumer.assignment()[partition_key] for partition_key in epochs}
    try:
        writer.commit(outputs, offsets, consumer=consumer, epochs=epochs)
    except PartitionLost:
        return False
    return True


def move_batch(consumer, writer, batch=50):
    messages = consumer.poll(0.2, batch)
    if not messages:
        return 0
    offsets, epochs = {}, consumer.assignment()
    for message in messages:
        offsets[TopicPartition(message.topic, message.partition)] = message.offset + 1
    outputs = [ProducerRecord("out", m.key, m.value, m.headers) for m in messages]
    try:
        writer.commit(
            outputs, offsets, consumer=consumer, epochs={partition_key: epochs[partition_key] for partition_key in offsets}
        )
    except (PartitionLost, KeyError):
        current = consumer.assignment()  # the new owner reads a moved partition again; the others are read again here
        for message in reversed(messages):
            partition_key = TopicPartition(message.topic, message.partition)
            if epochs.get(partition_key) is not None and current.get(partition_key) == epochs[partition_key]:
                consumer.seek(partition_key, message.offset)
        return 0
    return len(messages)


def test_create_topics_is_idempotent(bus):
    ids = bus.topic_ids(["in", "out"])
    assert bus.create_topics(SPECS) == []
    assert bus.topic_ids(["in", "out"]) == ids and len(set(ids.values())) == 2
    assert (bus.count_partitions("in"), bus.count_partitions("one")) == (4, 1)


def test_concurrent_creation_creates_each_topic_once(bus, address, prefix):
    specs = [TopicSpec(f"new-{n}", Prompt, num_partitions=2) for n in range(6)]
    buses, created = [open_bus(address, prefix=prefix) for _ in range(3)], []

    def create(opened):
        created.extend(opened.create_topics(specs))
        assert [opened.count_partitions(spec.name) for spec in specs] == [2] * 6

    run_in_threads(*[lambda opened=opened: create(opened) for opened in buses])
    assert sorted(created) == [spec.name for spec in specs]
    for opened in buses:
        opened.close()


def test_error_for_an_unknown_topic_names_it(bus):
    with pytest.raises(UsageError, match="nowhere"):
        bus.count_partitions("nowhere")
    with pytest.raises(UsageError, match="nowhere"):
        bus.open_consumer("g", ["in", "nowhere"], member="a")
    assert bus.topic_ids(["nowhere"]) == {}


def test_writing_to_an_unknown_topic_writes_nothing(bus):
    records = [ProducerRecord("in", b"k", b"1"), ProducerRecord("nowhere", b"k", b"1")]
    writer = bus.open_writer("w")
    with pytest.raises(UsageError, match="nowhere"):
        bus.publish(records)
    with pytest.raises(UsageError, match="nowhere"):
        writer.commit(records)
    assert read_numbers(bus, "in") == []
    writer.commit(records[:1])  # the writer is still usable
    assert read_numbers(bus, "in") == [1]
    writer.close()


def test_many_threads_publish_concurrently(bus):
    run_in_threads(
        *[lambda first=first: bus.publish(make_records("in", range(first, first + 50))) for first in range(0, 400, 50)]
    )
    assert read_numbers(bus, "in") == list(range(400))


def test_order_of_each_key_is_kept(bus):
    bus.publish(make_records("in", range(100)))
    items_by_key = {}
    for message in read_topic(bus, "in"):
        items_by_key.setdefault(message.key, []).append((message.partition, message.offset, int(message.value)))
    assert len(items_by_key) == 7
    for items in items_by_key.values():
        assert len({partition for partition, _, _ in items}) == 1
        assert [n for *_, n in items] == sorted(n for *_, n in items)
        assert [offset for _, offset, _ in items] == sorted(offset for _, offset, _ in items)


def test_headers_nulls_and_bytes_round_trip(bus):
    headers = (("run", b"\x00\xff"), ("trace", b""))
    bus.publish([ProducerRecord("one", b"k", b"\xc3\x01\x00", headers), ProducerRecord("one", b"k", None)])
    first, second = read_topic(bus, "one")
    assert (first.key, first.value, first.headers) == (b"k", b"\xc3\x01\x00", headers)
    assert second.value is None and second.timestamp_ms > 1_600_000_000_000


def test_erased_values_are_read_as_none_and_offsets_stay(bus, address):
    """Kafka cannot delete single records, and returns the number 0 instead of doing something else."""
    bus.publish([*make_records("in", range(7)), ProducerRecord("in", b"other", b"about k3")])
    ends, before = bus.end_offsets(["in"]), {record.key: record.value for record in read_topic(bus, "in")}
    is_kafka = address.startswith("kafka://")
    assert bus.erase_values(["in"], [b"k3"]) == (0 if is_kafka else 2)
    after = {record.key: record.value for record in read_topic(bus, "in")}
    assert after == (before if is_kafka else before | {b"k3": None, b"other": None}) and bus.end_offsets(["in"]) == ends
    bus.publish([ProducerRecord("in", b"k3", b"later")])  # only an erasure on the topic `erasures` also covers later records
    assert b"later" in {record.value for record in read_topic(bus, "in")}


def test_both_buses_choose_the_same_partition_for_a_key(bus):
    # Kafka's murmur2: a Java producer chooses the same partitions.
    bus.publish([ProducerRecord("in", key, b"x") for key in (b"a", b"b", b"c", b"charter", b"")])
    partitions = {m.key: m.partition for m in read_topic(bus, "in")}
    assert partitions == {b"a": 0, b"b": 0, b"c": 2, b"charter": 3, b"": 1}
    keys = [str(uuid.uuid4()).encode() for _ in range(200)]
    bus.publish([ProducerRecord("out", key, b"x") for key in keys])
    partitions = {m.key: m.partition for m in read_topic(bus, "out")}
    assert partitions == {key: choose_partition(key, 4) for key in keys} and set(partitions.values()) == {0, 1, 2, 3}


def test_beginning_and_end_offsets(bus):
    assert set(bus.beginning_offsets(["in"]).values()) == {0} == set(bus.end_offsets(["in"]).values())
    bus.publish(make_records("in", range(20)))
    assert sum(bus.end_offsets(["in"]).values()) == 20


def test_commit_writes_outputs_and_offsets_atomically(bus):
    bus.publish(make_records("in", range(60)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    assert move_records(bus, consumer, writer, 60) == 60
    assert read_numbers(bus, "out") == list(range(60))
    poll_until(lambda: sum(bus.committed("g", ["in"]).values()) == 60)
    assert read_committed(consumer) == {p: o for p, o in bus.end_offsets(["in"]).items() if o}
    consumer.close()
    writer.close()


def test_group_continues_at_its_committed_offsets(bus):
    bus.publish(make_records("in", range(30)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    move_records(bus, consumer, writer, 30)
    consumer.close()
    bus.publish(make_records("in", range(30, 40)))
    consumer = bus.open_consumer("g", ["in"], member="a")
    assert move_records(bus, consumer, writer, 10) == 10
    assert read_numbers(bus, "out") == list(range(40))
    consumer.close()
    writer.close()


def test_uncommitted_records_are_read_again(bus):
    bus.publish(make_records("in", range(10)))
    first = bus.open_consumer("g", ["in"], member="a")
    seen = []
    poll_until(lambda: seen.extend(first.poll(0.2, 100)) or len(seen) == 10)
    first.close()
    second = bus.open_consumer("g", ["in"], member="b")
    again = []
    poll_until(lambda: again.extend(second.poll(0.2, 100)) or len(again) == 10)
    second.close()


def test_two_members_share_the_partitions_until_one_leaves(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    poll_until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    assert not set(first.assignment()) & set(second.assignment())
    second.close()
    poll_until(lambda: len(first.assignment()) == 4, first)
    first.close()


def test_records_move_exactly_once_while_members_join_and_leave(bus):
    bus.publish(make_records("in", range(200)))
    members = {name: (bus.open_consumer("g", ["in"], member=name), bus.open_writer(f"g.{name}")) for name in ("a", "b")}

    def move_on_all_members(batch=50):
        run_in_threads(*[lambda c=c, w=w: move_batch(c, w, batch) for c, w in members.values()])

    for round_number in range(12):
        move_on_all_members(10)
        if round_number == 4:
            leaving, writer = members.pop("a")
            leaving.close()
            writer.close()
        if round_number == 8:
            members["c"] = bus.open_consumer("g", ["in"], member="c"), bus.open_writer("g.c")
    poll_until(lambda: move_on_all_members() or read_numbers(bus, "out") == list(range(200)))
    for consumer, writer in members.values():
        consumer.close()
        writer.close()


def test_nothing_is_written_if_the_check_before_the_commit_fails(bus):
    bus.publish(make_records("in", range(20)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    messages = []
    poll_until(lambda: messages.extend(consumer.poll(0.2, 100)) or len(messages) == 20)
    offsets = {TopicPartition("in", messages[0].partition): 1}

    def fail():
        raise TopicChanged("the topic in was created again", "", "")

    with pytest.raises(TopicChanged):
        writer.commit(make_records("out", range(10)), offsets, consumer=consumer, before_commit=fail)
    assert read_numbers(bus, "out") == [] and bus.committed("g", ["in"]) == {}
    calls = []
    writer.commit(make_records("out", [7]), offsets, consumer=consumer, before_commit=lambda: calls.append(1))
    poll_until(lambda: read_numbers(bus, "out") == [7])
    assert calls == [1] and bus.committed("g", ["in"]) == offsets
    consumer.close()
    writer.close()


def test_outputs_of_a_lost_partition_are_not_written(bus):
    bus.publish(make_records("in", range(20)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    messages = []
    poll_until(lambda: messages.extend(consumer.poll(0.2, 100)) or len(messages) == 20)
    partition_key = TopicPartition("in", messages[0].partition)
    with pytest.raises(PartitionLost):
        writer.commit([ProducerRecord("out", b"k", b"1")], {partition_key: 1}, consumer=consumer, epochs={partition_key: -5})
    assert read_numbers(bus, "out") == [] and bus.committed("g", ["in"]) == {}
    writer.commit([ProducerRecord("out", b"k", b"2")])  # the writer is still usable
    poll_until(lambda: read_numbers(bus, "out") == [2])
    consumer.close()
    writer.close()


def test_second_writer_fences_the_first(bus):
    first = bus.open_writer("w")
    first.commit([ProducerRecord("out", b"k", b"1")])
    second = bus.open_writer("w")
    second.commit([ProducerRecord("out", b"k", b"2")])
    with pytest.raises(WriterFenced):
        first.commit([ProducerRecord("out", b"k", b"3")])
    poll_until(lambda: read_numbers(bus, "out") == [1, 2])
    first.close()
    second.close()


def test_paused_partition_returns_no_record_until_resumed(bus):
    consumer = bus.open_consumer("g", ["in"], member="a")
    poll_until(lambda: len(consumer.assignment()) == 4, consumer)
    consumer.pause(list(consumer.assignment()))
    bus.publish(make_records("in", range(10)))
    assert consumer.poll(1.0, 100) == []
    consumer.resume(list(consumer.assignment()))
    seen = []
    poll_until(lambda: seen.extend(consumer.poll(0.2, 100)) or len(seen) == 10)
    consumer.seek(TopicPartition("in", seen[0].partition), seen[0].offset)
    again = []
    poll_until(lambda: again.extend(consumer.poll(0.2, 100)) or again)
    assert again[0].offset == seen[0].offset
    consumer.close()


def test_reader_starts_at_its_offsets_and_reaches_the_end(bus):
    bus.publish(make_records("in", range(40)))
    writer = bus.open_writer("w")
    writer.commit(make_records("in", range(40, 50)))
    ends = bus.end_offsets(["in"])
    reader = bus.open_reader(bus.beginning_offsets(["in"]))
    seen = []
    poll_until(lambda: seen.extend(reader.poll(0.2, 15)) or all(reader.positions()[p] >= e for p, e in ends.items()))
    assert sorted(int(m.value) for m in seen) == list(range(50))
    late = bus.open_reader({partition_key: max(0, end - 1) for partition_key, end in bus.end_offsets(["one"]).items()})
    bus.publish([ProducerRecord("one", b"k", b"new")])
    records = []
    poll_until(lambda: records.extend(late.poll(0.2, 10)) or records)
    assert records[0].value == b"new"
    for opened in (reader, late, writer):
        opened.close()


def test_committed_records_are_readable_immediately(bus):
    writer = bus.open_writer("w")
    for n in range(5):
        writer.commit([ProducerRecord("one", b"k", str(n).encode())])
        assert read_numbers(bus, "one") == list(range(n + 1))
    writer.close()


def test_prefixes_separate_two_deployments(bus, address):
    other = open_bus(address, prefix="other" + uuid.uuid4().hex[:6])
    other.create_topics(SPECS)
    bus.publish(make_records("in", range(5)))
    assert read_numbers(other, "in") == [] and other.committed("g", ["in"]) == {}
    other.close()


def test_reopened_bus_has_the_same_topics_and_records(bus, address, prefix):
    bus.publish(make_records("in", range(9)))
    again = open_bus(address, prefix=prefix)
    assert again.cluster_id == bus.cluster_id and again.topic_ids(["in"]) == bus.topic_ids(["in"])
    assert read_numbers(again, "in") == list(range(9))
    again.close()


def test_transaction_writes_to_several_topics(bus):
    writer = bus.open_writer("w")
    writer.commit([*make_records("in", range(5)), *make_records("out", range(7)), ProducerRecord("one", b"k", b"0")])
    assert (read_numbers(bus, "in"), read_numbers(bus, "out"), read_numbers(bus, "one")) == (
        list(range(5)),
        list(range(7)),
        [0],
    )
    writer.commit([])
    writer.close()


def test_member_cannot_commit_a_partition_that_moved(bus):
    bus.publish(make_records("in", range(40)))
    first, writer, read = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a"), []
    poll_until(lambda: read.extend(first.poll(0.2, 100)) or len(read) == 40)
    before = first.assignment()
    second = bus.open_consumer("g", ["in"], member="b")
    poll_until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    kept, (moved, *_) = first.assignment(), second.assignment()
    with pytest.raises(PartitionLost):
        writer.commit([ProducerRecord("out", b"k", b"1")], {moved: 1}, consumer=first, epochs={moved: before[moved]})
    with pytest.raises(PartitionLost):  # also without epochs
        writer.commit([ProducerRecord("out", b"k", b"1")], {moved: 1}, consumer=first)
    assert all(
        kept[partition_key] == before[partition_key] for partition_key in kept
    )  # partitions that stayed keep their epoch and can be committed
    poll_until(
        lambda: try_commit(writer, [ProducerRecord("out", b"k", b"2")], dict.fromkeys(kept, 1), first, kept), first, second
    )
    assert read_numbers(bus, "out") == [2] and read_committed(first) == dict.fromkeys(kept, 1)
    poll_until(lambda: bus.committed("g", ["in"]) == dict.fromkeys(kept, 1))
    for opened in (first, second, writer):
        opened.close()


def test_newly_assigned_partitions_do_not_rewind_the_others(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    poll_until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    bus.publish(make_records("in", range(60)))
    ends, read = bus.end_offsets(["in"]), []
    assigned = first.assignment()
    poll_until(lambda: read.extend(first.poll(0.2, 7)) or len(read) == sum(ends[partition_key] for partition_key in assigned))
    second.close()  # without a commit
    poll_until(lambda: read.extend(first.poll(0.2, 7)) or len(first.assignment()) == 4)
    poll_until(lambda: read.extend(first.poll(0.2, 7)) or len(read) >= 60)
    read += first.poll(0.5, 100)
    assert sorted(int(m.value) for m in read) == list(range(60))  # each once: no partition was rewound
    first.close()


def test_paused_partition_stays_paused_after_a_rebalance(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    poll_until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    kept = first.assignment()
    first.pause(list(kept))
    second.close()
    poll_until(lambda: len(first.assignment()) == 4, first)
    bus.publish(make_records("in", range(60)))
    ends, read = bus.end_offsets(["in"]), []
    poll_until(lambda: read.extend(first.poll(0.2, 100)) or len(read) == sum(ends[p] for p in ends if p not in kept))
    assert not {TopicPartition("in", m.partition) for m in [*read, *first.poll(0.3, 100)]} & set(kept)
    first.close()


def test_seek_requires_an_assigned_partition(bus):
    consumer = bus.open_consumer("g", ["in"], member="a")
    with pytest.raises(PartitionLost, match=r"in\[2\]"):
        consumer.seek(TopicPartition("in", 2), 0)
    consumer.pause([TopicPartition("in", 2)])
    consumer.resume([TopicPartition("in", 2)])
    consumer.close()


def test_reader_accepts_partitions_later(bus):
    bus.publish([*make_records("in", range(10)), ProducerRecord("one", b"k", b"99")])
    reader, seen = bus.open_reader({}), []
    assert reader.poll(0.05, 10) == [] and reader.positions() == {}
    reader.add_partitions({TopicPartition("one", 0): 0})
    poll_until(lambda: seen.extend(reader.poll(0.2, 10)) or seen)
    reader.add_partitions(bus.beginning_offsets(["in"]))
    poll_until(lambda: seen.extend(reader.poll(0.2, 3)) or len(seen) == 11)
    assert sorted(int(m.value) for m in seen) == [*range(10), 99]
    assert reader.positions() == bus.end_offsets(["in", "one"])
    reader.close()


def test_reader_respects_the_poll_limit_and_reads_every_partition(bus):
    bus.publish(make_records("in", range(400)))
    reader, seen = bus.open_reader(bus.beginning_offsets(["in"])), []
    while len(seen) < 400:
        records = reader.poll(0.2, 13)
        assert len(records) <= 13
        seen += records
    for partition_key, end in bus.end_offsets(["in"]).items():
        assert [m.offset for m in seen if m.partition == partition_key.partition] == list(range(end))
    reader.close()


def test_offsets_for_time_returns_the_first_later_record(bus):
    bus.publish([ProducerRecord("one", b"k", b"1"), ProducerRecord("one", b"k", b"2")])
    timestamps = [m.timestamp_ms for m in read_topic(bus, "one")]
    poll_until(lambda: time.time() * 1000 > timestamps[-1] + 2)
    bus.publish([ProducerRecord("one", b"k", b"3")])
    newest = [m.timestamp_ms for m in read_topic(bus, "one")][-1]
    partition_key = TopicPartition("one", 0)
    assert bus.offsets_for_time(["one"], 0) == {partition_key: 0}
    assert bus.offsets_for_time(["one"], newest) == {partition_key: 2}
    assert bus.offsets_for_time(["one"], newest + 100_000) == bus.end_offsets(["one"])


def test_offsets_of_a_group_without_members_can_be_set_and_deleted(bus):
    bus.publish(make_records("in", range(30)))
    ends = bus.end_offsets(["in"])
    bus.set_committed("g", ends)
    assert bus.list_committed("g", ["in"]) == {tp: (end, bus.topic_ids(["in"])["in"]) for tp, end in ends.items()}
    bus.publish(make_records("in", range(30, 60)))
    consumer, seen = bus.open_consumer("g", ["in"], member="a"), []
    poll_until(lambda: seen.extend(consumer.poll(0.2, 100)) or len(seen) == 30)
    assert sorted(int(m.value) for m in seen) == list(range(30, 60))
    assert consumer.positions() == bus.end_offsets(["in"])
    for change in (lambda: bus.set_committed("g", ends), lambda: bus.delete_committed("g", ["in"])):
        with pytest.raises(UsageError, match=r"the offsets of g cannot be changed\n.*the group has members"):
            change()
    consumer.close()
    bus.delete_committed("g", ["in"])
    assert bus.committed("g", ["in"]) == {}


def test_held_partition_is_read_from_its_start_offset(bus):
    bus.publish(make_records("in", range(40)))
    ends = bus.end_offsets(["in"])
    consumer, seen = bus.open_consumer("g", ["in"], member="a", hold_new=True), []
    assert consumer.topic_ids == bus.topic_ids(["in"])
    poll_until(lambda: seen.extend(consumer.poll(0.2, 100)) or set(consumer.held()) == set(ends))
    consumer.resume(ends)
    assert consumer.poll(0.2, 100) == [] == seen
    started = max(ends, key=ends.get)
    consumer.start(started, 2)
    poll_until(lambda: seen.extend(consumer.poll(0.2, 100)) or len(seen) == ends[started] - 2)
    assert {TopicPartition(m.topic, m.partition) for m in seen} == {started} and seen[0].offset == 2
    assert set(consumer.held()) == set(ends) - {started}
    consumer.close()


def test_record_is_written_to_its_partition(bus):
    bus.publish([ProducerRecord("in", b"k", b"x", partition=number) for number in (0, 1, 3)])
    assert {tp.partition: end for tp, end in bus.end_offsets(["in"]).items()} == {0: 1, 1: 1, 2: 0, 3: 1}


def test_describe_topics_returns_existing_topics(bus):
    (description,) = bus.describe_topics(["one", "nowhere"])
    assert (description.name, description.partitions, description.replicas, description.in_sync_replicas) == ("one", 1, 1, 1)
    assert description.topic_id == bus.topic_ids(["one"])["one"]


def test_members_of_groups_are_listed_until_they_leave(bus):
    bus.publish(make_records("in", range(4)))
    members = {
        group: bus.open_consumer(group, ["in"], member=member)
        for group, member in (("run.a", "one"), ("run.b", "two"), ("x.a", "3"))
    }
    expected = {"run.a": ["one"], "run.b": ["two"]}
    poll_until(lambda: bus.list_members(["run."]) == expected, *members.values())
    assert bus.list_members(["run.a", "x."]) == {"run.a": ["one"], "x.a": ["3"]}
    members["run.a"].close()
    poll_until(lambda: bus.list_members(["run."]) == {"run.b": ["two"]}, members["run.b"])
    assert bus.list_members(["nothing."]) == {}
    for group in ("run.b", "x.a"):
        members[group].close()
