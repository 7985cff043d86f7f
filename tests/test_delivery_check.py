"""The check of every scenario notices what it must notice: an output too many, a missing output, a record that does not decode."""

import pytest

from engine.bus.port import ProducerRecord
from engine.bus.read import read_topic as read_with_charter
from tests.chaos.delivery import check_delivery, read_topic
from tests.chaos.system import InvariantViolation, SystemUnderTest, is_caught_up, read_texts, wait_until, write_prompts
from tests.support.raw_log import decode_value

FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "bus.partitions": "3"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a system on the embedded log that has finished four prompts, and their texts."""
    folder = tmp_path_factory.mktemp("delivery")
    (path,) = write_prompts(folder, 4, 1, 0)
    with SystemUnderTest(folder / "system", setting_overrides=FLAGS, batch_delay_s=0.0) as system:
        system.publish_file(path)
        system.start_pipeline()
        wait_until(lambda: system.count_finished_prompts() == 4 and is_caught_up(system), "the prompts are finished")
        assert system.stop_process("all") == 0
        yield system, read_texts(path)


def test_finished_prompts_pass_and_a_missing_one_is_found(finished):
    system, texts = finished
    check_delivery(system, texts)
    with pytest.raises(InvariantViolation, match="responses on the topics: 1 of 5 prompts have none"):
        check_delivery(system, [*texts, "another prompt"])
    with pytest.raises(InvariantViolation, match="1 belong to no prompt"):
        check_delivery(system, texts[:3])


def test_records_are_decoded_without_the_codec(finished):
    system, _ = finished
    with pytest.raises(ValueError, match=r"^a record of prompts begins with c301"):
        decode_value("prompts", b"\xc3\x01" + bytes(20))
    assert all(record.key == record.fields["prompt_id"].encode() for record in read_topic(system, "responses"))


def test_second_output_is_found(finished):
    """This test changes the topics, so it is the last one. The check compares responses first and judgments last."""
    system, texts = finished
    for topic, name in (("preferences", "judgments"), ("critiques", "chain ends"), ("responses", "responses")):
        with system.connect_bus() as bus:
            final = {(raw.partition, raw.offset) for raw in read_topic(system, topic) if raw.fields.get("final", True)}
            first = next(record for record in read_with_charter(bus, topic) if (record.partition, record.offset) in final)
            bus.publish([ProducerRecord(topic, first.key, first.value)])
        with pytest.raises(InvariantViolation, match=f"^{name} on the topics: 1 prompts have several"):
            check_delivery(system, texts)
