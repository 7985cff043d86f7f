"""Pacing of the responders: what they hold and when they release it, on the embedded log and on a real Apache Kafka."""

import logging
import uuid
from contextlib import closing
from itertools import count

import pytest

from charter.lag import CompletionCheck
from engine.bus import open_bus
from engine.bus.embedded import EmbeddedBus
from engine.bus.read import read_topic
from engine.host import Host
from engine.pacing import (
    TRAINER_GROUP,
    PacedAdmission,
    TrainingLoopHistory,
    TrainingLoopLease,
    is_training_loop_running,
)
from engine.policy import make_pause
from engine.run_starts import ensure_run_start
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import Allowance, Purpose, Response, Split
from schemas.topics import make_topic_table
from tests.support.paced_responder import BATCH_SIZE, answer, make_paced_worker, start_process
from tests.support.respond_worker import make_prompt
from tests.support.waiting import wait_until

SPECS = list(make_topic_table(num_partitions=2).values())
_numbers = count()


@pytest.fixture
def bus(tmp_path):
    bus = EmbeddedBus(tmp_path / "log", lease_timeout_s=1.0)
    bus.create_topics(SPECS)
    ensure_run_start(bus, "r")
    yield bus
    bus.close()


@pytest.fixture
def lease(bus):
    lease = TrainingLoopLease(bus, "trainer")
    wait_until(lambda: is_training_loop_running(bus))
    yield lease
    lease.close()


def publish(bus, *records):
    bus.publish([to_producer_record(record) for record in records])


def publish_prompts(bus, number, **fields):
    prompts = [make_prompt(f"p{next(_numbers)}").model_copy(update=fields) for _ in range(number)]
    publish(bus, *prompts)
    return prompts


def allow(bus, num_completions, **fields):
    """Allow further completions after the present end of the topic, as a trainer does."""
    ends = [offset for _, offset in sorted(bus.end_offsets([Response.topic]).items())]
    publish(
        bus,
        Allowance(
            record_id=ids.compute_id("allowance", next(_numbers)), run_id="r", stage="train", phase="ppo",
            num_completions=num_completions, offsets=ends, reason="the test has enough", **fields,
        ),
    )  # fmt: skip


def count_responses(bus):
    return sum(raw.value is not None for raw in read_topic(bus, Response.topic))


def find_hold(bus):
    with closing(PacedAdmission(bus, 1)) as admission:
        return admission.find_hold()


def wait_for_hold(worker, host):
    """Wait until the copy has read everything and refuses to start the next prompt."""
    wait_until(
        lambda: worker.pacing.held_since and not worker.pacing.num_counted < worker.pacing.allowance.num_completions, host
    )


def test_responder_stops_exactly_at_the_allowance_and_continues_with_the_next(bus, lease, caplog):
    caplog.set_level(logging.INFO, "charter.pacing")
    publish_prompts(bus, 20)
    allow(bus, 5)
    worker = make_paced_worker(bus, batch_size=3)
    with Host([worker]) as host:
        wait_for_hold(worker, host)
        assert count_responses(bus) == 5
        assert find_hold(bus) == "the test has enough"
        allow(bus, 4)
        wait_until(lambda: count_responses(bus) == 9 and worker.pacing.held_since, host)
        assert count_responses(bus) == 9
        lease.close()
        wait_until(lambda: count_responses(bus) == 20, host)
    assert worker.pacing.num_holds == 2 and worker.pacing.get_held_s() > 0
    messages = [record.message for record in caplog.records]
    assert messages[0].startswith("respond holds new prompts: the test has enough (further holds")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "INFO"]
    assert sum("holds" in message for message in messages) == sum("continues" in message for message in messages) == 2
    assert find_hold(bus) is None


def test_killed_trainer_releases_the_responders_when_its_membership_expires(bus):
    publish_prompts(bus, 6)
    allow(bus, 0)
    consumer = bus.open_consumer(TRAINER_GROUP, [Allowance.topic], member="killed", hold_new=True)
    consumer.poll(0.0, 1)
    worker = make_paced_worker(bus)
    with Host([worker]) as host:
        wait_until(lambda: (consumer.poll(0.05, 1), worker.pacing.held_since)[1], host)
        assert count_responses(bus) == 0
        wait_until(lambda: count_responses(bus) == 6, host)  # the killed trainer does not poll any more


@pytest.mark.parametrize("limit", [None, 0])
def test_nothing_is_held_without_a_training_loop(bus, limit):
    if limit is not None:
        allow(bus, limit)
    publish_prompts(bus, 6)
    worker = make_paced_worker(bus)
    check = CompletionCheck(bus, {worker.group: worker.stage.inputs})
    with Host([worker]) as host:
        wait_until(check.is_done, host)
    assert count_responses(bus) == 6 and worker.pacing.num_holds == 0


def test_run_until_done_ends_after_a_hold(bus, lease):
    allow(bus, 0)
    publish_prompts(bus, 6)
    worker = make_paced_worker(bus)
    check = CompletionCheck(bus, {worker.group: worker.stage.inputs})
    with Host([worker]) as host:
        wait_until(lambda: worker.pacing.held_since, host)
        assert not check.is_done()
        lease.close()
        wait_until(check.is_done, host)
    assert count_responses(bus) == 6


@pytest.mark.parametrize("release", ["paused", "unlimited"])
def test_hold_ends_when_the_phase_is_paused_and_when_there_is_no_limit(bus, lease, release):
    allow(bus, 0)
    publish_prompts(bus, 4)
    worker = make_paced_worker(bus)
    with Host([worker]) as host:
        wait_until(lambda: worker.pacing.held_since, host)
        if release == "paused":
            publish(bus, make_pause("sft", "another phase", run_id="r"), make_pause("ppo", "the test", run_id="r"))
        else:
            allow(bus, None)
        wait_until(lambda: count_responses(bus) == 4, host)


def test_prompts_for_evaluation_are_never_held(bus, lease):
    allow(bus, 0)
    publish_prompts(bus, 3, split=Split.EVAL)
    publish_prompts(bus, 2, split=Split.SUITE)
    publish_prompts(bus, 4)
    with Host([make_paced_worker(bus)]) as host:
        wait_until(lambda: count_responses(bus) == 5, host)


def test_only_completions_for_rl_of_new_enough_policies_use_up_an_allowance(bus, lease):
    def count(**fields):
        publish(bus, *(records[0].model_copy(update=fields) for records in answer([make_prompt(f"c{next(_numbers)}")])))
        admission.next_refresh_at = 0.0
        admission.refresh()
        return admission.num_counted

    allow(bus, 10, min_policy_version=2)
    admission = PacedAdmission(bus, 4)
    admission.refresh()
    assert count(policy_version=2) == 1 and count(policy_version=3) == 2
    for fields in ({"policy_version": 1}, {"policy_version": None}, {"split": Split.EVAL}, {"purpose": Purpose.REWARD}):
        assert count(**({"policy_version": 2} | fields)) == 2
    prompts = [make_prompt("reward").model_copy(update={"purpose": Purpose.REWARD}), make_prompt("rl")]
    admission.max_pending = 8
    admission.set_pending(prompts)
    assert admission.remaining == 10 - 2 - 4
    assert [admission.admit(prompt) for prompt in prompts] == [True, True] and admission.remaining == 0
    assert [admission.admit(prompt) for prompt in prompts] == [False, False]
    admission.close()


def test_history_remembers_that_a_training_loop_has_run(bus, monkeypatch):
    monkeypatch.setattr("engine.pacing._POLL_INTERVAL_S", 0.0)
    has_run = TrainingLoopHistory(bus)
    assert not has_run()
    allow(bus, None)
    assert has_run() and has_run()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def address(request, tmp_path):
    return str(tmp_path / "log") if request.param == "embedded" else request.getfixturevalue("kafka_address")


def test_two_responders_and_a_trainer_are_killed(address):
    prefix, num_prompts, processes = f"t{uuid.uuid4().hex[:8]}.", 24, {}
    bus = open_bus(address, prefix=prefix)
    bus.create_topics(SPECS)
    ensure_run_start(bus, "r")
    publish_prompts(bus, num_prompts)
    allow(bus, 6)

    def start(role, name):
        processes[name] = start_process(role, address, prefix, name)

    def kill(name):
        processes[name].kill()
        processes[name].wait()

    def wait_for_responses(number):
        wait_until(lambda: number <= count_responses(bus) and all(p.poll() in (None, -9) for p in processes.values()))
        return count_responses(bus)

    try:
        start("loop", "trainer")
        wait_until(lambda: is_training_loop_running(bus))
        start("respond", "one")
        start("respond", "two")
        answered = wait_for_responses(6)
        assert answered <= 6 + BATCH_SIZE
        kill("one")
        allow(bus, 4)
        assert answered + 4 <= wait_for_responses(answered + 4) <= answered + 4 + BATCH_SIZE  # the other copy takes over
        start("respond", "one")
        kill("trainer")
        wait_for_responses(num_prompts)
        responses = [decode_record(raw.value, Response).record_id for raw in read_topic(bus, Response.topic)]
        assert len(responses) == len(set(responses)) == num_prompts
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        bus.close()
