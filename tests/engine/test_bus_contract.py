"""One contract, two buses: the embedded log and a real Apache Kafka."""

import threading
import time
import uuid

import pytest

from engine.bus import open_bus
from engine.bus.embedded import choose_partition
from engine.bus.port import ProducerRecord, TopicPartition
from engine.bus.read import read_topic, read_values
from engine.errors import PartitionLost, UsageError, WriterFenced
from schemas.records import PolicyUpdate, Prompt, Response
from schemas.topics import TopicSpec

WITHIN_S = 30
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
    opened = open_bus(address, prefix=prefix)
    opened.create_topics(SPECS)
    yield opened
    opened.close()


def keyed(topic, numbers):
    return [ProducerRecord(topic, f"k{n % 7}".encode(), str(n).encode(), (("run", b"r"),)) for n in numbers]


def values(bus, topic):
    return sorted(int(value) for value in read_values(bus, topic))


def until(condition, *keep_alive):
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        # At the same time, as members are: a join needs all of them, and a client finishes one only while it polls.
        in_threads(*[lambda consumer=consumer: consumer.poll(0.2, 1) for consumer in keep_alive])


def in_threads(*works):
    """Run these at the same time; the first of them that failed is raised."""
    failures = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def hop(bus, consumer, writer, wanted, batch=50):
    """Move messages from `in` to `out` with their offsets until `out` has `wanted` of them."""
    moved = 0
    deadline = time.monotonic() + WITHIN_S
    while moved < wanted and time.monotonic() < deadline:
        moved += hop_once(consumer, writer, batch)
    return moved


def committed(writer, outputs, offsets, consumer, epochs):
    """Commit what is still assigned, unless the group is just sharing out its partitions: then after another poll."""
    assert epochs == {place: consumer.assignment()[place] for place in epochs}
    try:
        writer.commit(outputs, offsets, consumer=consumer, epochs=epochs)
    except PartitionLost:
        return False
    return True


def hop_once(consumer, writer, batch=50):
    messages = consumer.poll(0.2, batch)
    if not messages:
        return 0
    offsets, epochs = {}, consumer.assignment()
    for message in messages:
        offsets[TopicPartition(message.topic, message.partition)] = message.offset + 1
    outputs = [ProducerRecord("out", m.key, m.value, m.headers) for m in messages]
    try:
        writer.commit(outputs, offsets, consumer=consumer, epochs={place: epochs[place] for place in offsets})
    except (PartitionLost, KeyError):
        now = consumer.assignment()  # what has moved is its next owner's to read again; what has stayed is ours
        for message in reversed(messages):
            place = TopicPartition(message.topic, message.partition)
            if epochs.get(place) is not None and now.get(place) == epochs[place]:
                consumer.seek(place, message.offset)
        return 0
    return len(messages)


def test_topics_are_created_once_and_keep_their_id(bus):
    ids = bus.topic_ids(["in", "out"])
    assert bus.create_topics(SPECS) == []
    assert bus.topic_ids(["in", "out"]) == ids and len(set(ids.values())) == 2
    assert (bus.count_partitions("in"), bus.count_partitions("one")) == (4, 1)


def test_topics_that_two_create_at_once_are_created_once(bus, address, prefix):
    specs = [TopicSpec(f"new-{n}", Prompt, num_partitions=2) for n in range(6)]
    buses, created = [open_bus(address, prefix=prefix) for _ in range(3)], []

    def create(opened):
        created.extend(opened.create_topics(specs))
        assert [opened.count_partitions(spec.name) for spec in specs] == [2] * 6

    in_threads(*[lambda opened=opened: create(opened) for opened in buses])
    assert sorted(created) == [spec.name for spec in specs]
    for opened in buses:
        opened.close()


def test_an_unknown_topic_is_an_error_that_names_it(bus):
    with pytest.raises(UsageError, match="nowhere"):
        bus.count_partitions("nowhere")
    with pytest.raises(UsageError, match="nowhere"):
        bus.open_consumer("g", ["in", "nowhere"], member="a")
    assert bus.topic_ids(["nowhere"]) == {}


def test_writing_to_an_unknown_topic_writes_nothing(bus):
    wanted = [ProducerRecord("in", b"k", b"1"), ProducerRecord("nowhere", b"k", b"1")]
    writer = bus.open_writer("w")
    with pytest.raises(UsageError, match="nowhere"):
        bus.publish(wanted)
    with pytest.raises(UsageError, match="nowhere"):
        writer.commit(wanted)
    assert values(bus, "in") == []
    writer.commit(wanted[:1])  # and the writer is still good
    assert values(bus, "in") == [1]
    writer.close()


def test_many_threads_publish_at_once(bus):
    in_threads(*[lambda first=first: bus.publish(keyed("in", range(first, first + 50))) for first in range(0, 400, 50)])
    assert values(bus, "in") == list(range(400))


def test_order_is_kept_for_each_key(bus):
    bus.publish(keyed("in", range(100)))
    seen = {}
    for message in read_topic(bus, "in"):
        seen.setdefault(message.key, []).append((message.partition, message.offset, int(message.value)))
    assert len(seen) == 7
    for items in seen.values():
        assert len({partition for partition, _, _ in items}) == 1
        assert [n for *_, n in items] == sorted(n for *_, n in items)
        assert [offset for _, offset, _ in items] == sorted(offset for _, offset, _ in items)


def test_headers_nulls_and_bytes_survive(bus):
    headers = (("run", b"\x00\xff"), ("trace", b""))
    bus.publish([ProducerRecord("one", b"k", b"\xc3\x01\x00", headers), ProducerRecord("one", b"k", None)])
    first, second = read_topic(bus, "one")
    assert (first.key, first.value, first.headers) == (b"k", b"\xc3\x01\x00", headers)
    assert second.value is None and second.timestamp_ms > 1_600_000_000_000


def test_both_buses_place_keys_alike(bus):
    # Kafka's murmur2: these places are what any Java producer would choose.
    bus.publish([ProducerRecord("in", key, b"x") for key in (b"a", b"b", b"c", b"charter", b"")])
    placed = {m.key: m.partition for m in read_topic(bus, "in")}
    assert placed == {b"a": 0, b"b": 0, b"c": 2, b"charter": 3, b"": 1}
    keys = [str(uuid.uuid4()).encode() for _ in range(200)]
    bus.publish([ProducerRecord("out", key, b"x") for key in keys])
    placed = {m.key: m.partition for m in read_topic(bus, "out")}
    assert placed == {key: choose_partition(key, 4) for key in keys} and set(placed.values()) == {0, 1, 2, 3}


def test_offsets_begin_and_end(bus):
    assert set(bus.beginning_offsets(["in"]).values()) == {0} == set(bus.end_offsets(["in"]).values())
    bus.publish(keyed("in", range(20)))
    assert sum(bus.end_offsets(["in"]).values()) == 20


def test_a_hop_moves_outputs_and_offsets_together(bus):
    bus.publish(keyed("in", range(60)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    assert hop(bus, consumer, writer, 60) == 60
    assert values(bus, "out") == list(range(60))
    until(lambda: sum(bus.committed("g", ["in"]).values()) == 60)
    assert consumer.committed() == {p: o for p, o in bus.end_offsets(["in"]).items() if o}
    consumer.close()
    writer.close()


def test_a_group_goes_on_where_it_committed(bus):
    bus.publish(keyed("in", range(30)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    hop(bus, consumer, writer, 30)
    consumer.close()
    bus.publish(keyed("in", range(30, 40)))
    consumer = bus.open_consumer("g", ["in"], member="a")
    assert hop(bus, consumer, writer, 10) == 10
    assert values(bus, "out") == list(range(40))
    consumer.close()
    writer.close()


def test_what_was_read_but_not_committed_is_read_again(bus):
    bus.publish(keyed("in", range(10)))
    first = bus.open_consumer("g", ["in"], member="a")
    seen = []
    until(lambda: seen.extend(first.poll(0.2, 100)) or len(seen) == 10)
    first.close()
    second = bus.open_consumer("g", ["in"], member="b")
    again = []
    until(lambda: again.extend(second.poll(0.2, 100)) or len(again) == 10)
    second.close()


def test_two_members_share_the_partitions_and_one_takes_over(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    assert not set(first.assignment()) & set(second.assignment())
    second.close()
    until(lambda: len(first.assignment()) == 4, first)
    first.close()


def test_everything_moves_exactly_once_while_members_come_and_go(bus):
    bus.publish(keyed("in", range(200)))
    members = {name: (bus.open_consumer("g", ["in"], member=name), bus.open_writer(f"g.{name}")) for name in ("a", "b")}

    def all_hop(batch=50):
        in_threads(*[lambda c=c, w=w: hop_once(c, w, batch) for c, w in members.values()])

    for round_number in range(12):
        all_hop(10)
        if round_number == 4:
            gone, writer = members.pop("a")
            gone.close()
            writer.close()
        if round_number == 8:
            members["c"] = bus.open_consumer("g", ["in"], member="c"), bus.open_writer("g.c")
    until(lambda: all_hop() or values(bus, "out") == list(range(200)))
    for consumer, writer in members.values():
        consumer.close()
        writer.close()


def test_results_of_a_lost_partition_are_not_written(bus):
    bus.publish(keyed("in", range(20)))
    consumer, writer = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a")
    messages = []
    until(lambda: messages.extend(consumer.poll(0.2, 100)) or len(messages) == 20)
    place = TopicPartition("in", messages[0].partition)
    with pytest.raises(PartitionLost):
        writer.commit([ProducerRecord("out", b"k", b"1")], {place: 1}, consumer=consumer, epochs={place: -5})
    assert values(bus, "out") == [] and bus.committed("g", ["in"]) == {}
    writer.commit([ProducerRecord("out", b"k", b"2")])  # the writer is still good
    until(lambda: values(bus, "out") == [2])
    consumer.close()
    writer.close()


def test_a_second_writer_fences_the_first(bus):
    first = bus.open_writer("w")
    first.commit([ProducerRecord("out", b"k", b"1")])
    second = bus.open_writer("w")
    second.commit([ProducerRecord("out", b"k", b"2")])
    with pytest.raises(WriterFenced):
        first.commit([ProducerRecord("out", b"k", b"3")])
    until(lambda: values(bus, "out") == [1, 2])
    first.close()
    second.close()


def test_paused_partitions_give_nothing_until_resumed(bus):
    consumer = bus.open_consumer("g", ["in"], member="a")
    until(lambda: len(consumer.assignment()) == 4, consumer)
    consumer.pause(list(consumer.assignment()))
    bus.publish(keyed("in", range(10)))
    assert consumer.poll(1.0, 100) == []
    consumer.resume(list(consumer.assignment()))
    seen = []
    until(lambda: seen.extend(consumer.poll(0.2, 100)) or len(seen) == 10)
    consumer.seek(TopicPartition("in", seen[0].partition), seen[0].offset)
    again = []
    until(lambda: again.extend(consumer.poll(0.2, 100)) or again)
    assert again[0].offset == seen[0].offset
    consumer.close()


def test_a_reader_reads_from_positions_and_ends_at_the_end(bus):
    bus.publish(keyed("in", range(40)))
    writer = bus.open_writer("w")
    writer.commit(keyed("in", range(40, 50)))
    ends = bus.end_offsets(["in"])
    reader = bus.open_reader(bus.beginning_offsets(["in"]))
    seen = []
    until(lambda: seen.extend(reader.poll(0.2, 15)) or all(reader.positions()[p] >= e for p, e in ends.items()))
    assert sorted(int(m.value) for m in seen) == list(range(50))
    late = bus.open_reader({place: max(0, end - 1) for place, end in bus.end_offsets(["one"]).items()})
    bus.publish([ProducerRecord("one", b"k", b"new")])
    found = []
    until(lambda: found.extend(late.poll(0.2, 10)) or found)
    assert found[0].value == b"new"
    for opened in (reader, late, writer):
        opened.close()


def test_what_a_writer_has_committed_it_reads_at_once(bus):
    writer = bus.open_writer("w")
    for n in range(5):
        writer.commit([ProducerRecord("one", b"k", str(n).encode())])
        assert values(bus, "one") == list(range(n + 1))
    writer.close()


def test_prefixes_keep_two_charters_apart(bus, address):
    other = open_bus(address, prefix="other" + uuid.uuid4().hex[:6])
    other.create_topics(SPECS)
    bus.publish(keyed("in", range(5)))
    assert values(other, "in") == [] and other.committed("g", ["in"]) == {}
    other.close()


def test_a_reopened_bus_has_everything(bus, address, prefix):
    bus.publish(keyed("in", range(9)))
    again = open_bus(address, prefix=prefix)
    assert again.cluster_id == bus.cluster_id and again.topic_ids(["in"]) == bus.topic_ids(["in"])
    assert values(again, "in") == list(range(9))
    again.close()


def test_one_transaction_reaches_many_topics_or_none(bus):
    writer = bus.open_writer("w")
    writer.commit([*keyed("in", range(5)), *keyed("out", range(7)), ProducerRecord("one", b"k", b"0")])
    assert (values(bus, "in"), values(bus, "out"), values(bus, "one")) == (list(range(5)), list(range(7)), [0])
    writer.commit([])
    writer.close()


def test_a_member_cannot_commit_what_has_moved_to_another(bus):
    bus.publish(keyed("in", range(40)))
    first, writer, read = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a"), []
    until(lambda: read.extend(first.poll(0.2, 100)) or len(read) == 40)
    before = first.assignment()
    second = bus.open_consumer("g", ["in"], member="b")
    until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    kept, (moved, *_) = first.assignment(), second.assignment()
    with pytest.raises(PartitionLost):
        writer.commit([ProducerRecord("out", b"k", b"1")], {moved: 1}, consumer=first, epochs={moved: before[moved]})
    with pytest.raises(PartitionLost):  # as well without saying since when
        writer.commit([ProducerRecord("out", b"k", b"1")], {moved: 1}, consumer=first)
    assert all(kept[place] == before[place] for place in kept)  # what stayed has kept its epoch, and can be committed
    until(lambda: committed(writer, [ProducerRecord("out", b"k", b"2")], dict.fromkeys(kept, 1), first, kept), first, second)
    assert values(bus, "out") == [2] and first.committed() == dict.fromkeys(kept, 1)
    until(lambda: bus.committed("g", ["in"]) == dict.fromkeys(kept, 1))
    for opened in (first, second, writer):
        opened.close()


def test_partitions_that_arrive_do_not_disturb_those_that_are_being_read(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    bus.publish(keyed("in", range(60)))
    ends, read = bus.end_offsets(["in"]), []
    mine = first.assignment()
    until(lambda: read.extend(first.poll(0.2, 7)) or len(read) == sum(ends[place] for place in mine))
    second.close()  # having committed nothing
    until(lambda: read.extend(first.poll(0.2, 7)) or len(first.assignment()) == 4)
    until(lambda: read.extend(first.poll(0.2, 7)) or len(read) >= 60)
    read += first.poll(0.5, 100)
    assert sorted(int(m.value) for m in read) == list(range(60))  # each once: nobody went back
    first.close()


def test_a_pause_lasts_while_the_partition_stays(bus):
    first, second = bus.open_consumer("g", ["in"], member="a"), bus.open_consumer("g", ["in"], member="b")
    until(lambda: len(first.assignment()) == 2 and len(second.assignment()) == 2, first, second)
    kept = first.assignment()
    first.pause(list(kept))
    second.close()
    until(lambda: len(first.assignment()) == 4, first)
    bus.publish(keyed("in", range(60)))
    ends, read = bus.end_offsets(["in"]), []
    until(lambda: read.extend(first.poll(0.2, 100)) or len(read) == sum(ends[p] for p in ends if p not in kept))
    assert not {TopicPartition("in", m.partition) for m in [*read, *first.poll(0.3, 100)]} & set(kept)
    first.close()


def test_only_assigned_partitions_can_be_sought(bus):
    consumer = bus.open_consumer("g", ["in"], member="a")
    with pytest.raises(PartitionLost, match=r"in\[2\]"):
        consumer.seek(TopicPartition("in", 2), 0)
    consumer.pause([TopicPartition("in", 2)])
    consumer.resume([TopicPartition("in", 2)])
    consumer.close()


def test_a_reader_may_begin_with_nothing_and_be_given_more(bus):
    bus.publish([*keyed("in", range(10)), ProducerRecord("one", b"k", b"99")])
    reader, seen = bus.open_reader({}), []
    assert reader.poll(0.05, 10) == [] and reader.positions() == {}
    reader.add_partitions({TopicPartition("one", 0): 0})
    until(lambda: seen.extend(reader.poll(0.2, 10)) or seen)
    reader.add_partitions(bus.beginning_offsets(["in"]))
    until(lambda: seen.extend(reader.poll(0.2, 3)) or len(seen) == 11)
    assert sorted(int(m.value) for m in seen) == [*range(10), 99]
    assert reader.positions() == bus.end_offsets(["in", "one"])
    reader.close()


def test_a_reader_sees_no_more_than_it_asked_for_and_starves_nothing(bus):
    bus.publish(keyed("in", range(400)))
    reader, seen = bus.open_reader(bus.beginning_offsets(["in"])), []
    while len(seen) < 400:
        found = reader.poll(0.2, 13)
        assert len(found) <= 13
        seen += found
    for place, end in bus.end_offsets(["in"]).items():
        assert [m.offset for m in seen if m.partition == place.partition] == list(range(end))
    reader.close()


def test_offsets_are_found_by_time(bus):
    bus.publish([ProducerRecord("one", b"k", b"1"), ProducerRecord("one", b"k", b"2")])
    stamps = [m.timestamp_ms for m in read_topic(bus, "one")]
    until(lambda: time.time() * 1000 > stamps[-1] + 2)
    bus.publish([ProducerRecord("one", b"k", b"3")])
    newest = [m.timestamp_ms for m in read_topic(bus, "one")][-1]
    place = TopicPartition("one", 0)
    assert bus.offsets_for_time(["one"], 0) == {place: 0}
    assert bus.offsets_for_time(["one"], newest) == {place: 2}
    assert bus.offsets_for_time(["one"], newest + 100_000) == bus.end_offsets(["one"])


def test_a_group_begins_where_it_is_told_and_only_before_it_has_committed(bus):
    bus.publish(keyed("in", range(30)))
    ends = bus.end_offsets(["in"])
    bus.initialize_group_offsets("g", ends)
    bus.publish(keyed("in", range(30, 60)))
    consumer, writer, seen = bus.open_consumer("g", ["in"], member="a"), bus.open_writer("g.a"), []
    until(lambda: seen.extend(consumer.poll(0.2, 100)) or len(seen) == 30)
    assert sorted(int(m.value) for m in seen) == list(range(30, 60))
    assert consumer.positions() == bus.end_offsets(["in"])
    place = TopicPartition("in", seen[0].partition)
    writer.commit([], {place: ends[place] + 1}, consumer=consumer)
    consumer.close()
    writer.close()
    bus.initialize_group_offsets("g", dict.fromkeys(ends, 0))
    assert bus.committed("g", ["in"]) == ends | {place: ends[place] + 1}


def test_topics_are_described(bus):
    (described,) = bus.describe_topics(["one", "nowhere"])
    assert (described.name, described.partitions, described.replicas, described.in_sync_replicas) == ("one", 1, 1, 1)
    assert described.topic_id == bus.topic_ids(["one"])["one"]
