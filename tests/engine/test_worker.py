"""The worker loop: faults are sorted, nothing finished twice, other runs left alone, later stages first."""

import sys
import threading
import time

import pytest

from engine.bus.port import ProducerRecord
from engine.bus.read import read_values
from engine.crash_journal import CrashJournal
from engine.errors import (
    BusUnreachable,
    CommitUncertain,
    ModelUnreachable,
    PermanentRecordError,
    TooManyDeadLetters,
    UsageError,
)
from engine.host import Host
from engine.watchdog import CallTracker, Watchdog
from engine.worker import TARGET_STAGE_HEADER, ModelExecutor, Stage, Worker, WorkerLimits, to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ChatMessage, Completion, DeadLetter, DeadLetterKind, Prompt, Response

WITHIN_S = 20


def prompt(text, run="r"):
    messages = [ChatMessage(role="user", content=text)]
    key = ids.compute_prompt_id(messages)
    return Prompt(record_id=key, prompt_id=key, run_id=run, stage="produce", messages=messages, source="test")


def answer(record):
    text = record.messages[0].content.upper()
    return Response(
        record_id=ids.compute_record_id("respond", [record.record_id], "f"), prompt_id=record.prompt_id, run_id=record.run_id,
        stage="respond", messages=record.messages, source="test", completions=[Completion(index=0, text=text)],
    )  # fmt: skip


def echo(records):
    return [[answer(record)] for record in records]


def worker(bus, work, *, lane=None, name="respond", inputs=("prompts",), outputs=("responses",), rank=0, batch=8, **more):
    stage = Stage(name, inputs, outputs, rank, batch, work)
    return Worker(bus, stage, lane or ModelExecutor("test", downstream_wait_s=0.0), run_id="r", instance="0", **more)


def run_until(workers, condition):
    with Host(workers) as host:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            host.raise_if_failed()
            assert time.monotonic() < deadline, "the condition was not met in time"
            host.failure_event.wait(0.01)


def responses(bus):
    return sorted(decode_record(value, Response).completions[0].text for value in read_values(bus, "responses"))


def letters(bus):
    return [decode_record(value, DeadLetter) for value in read_values(bus, "dead-letters")]


def publish(bus, *records):
    bus.publish([to_producer_record(record) for record in records])


def test_every_record_is_worked_once_and_committed(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(50)))
    run_until([worker(bus, echo)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 50)
    assert responses(bus) == [f"P{n:02}" for n in range(50)]
    run_until([worker(bus, echo)], lambda: True)
    assert len(responses(bus)) == 50


def test_a_poisoned_record_becomes_a_dead_letter_and_its_neighbours_do_not(bus):
    def work(records):
        for record in records:
            if record.messages[0].content == "p05":
                raise PermanentRecordError("cannot be done", "the test says so", "")
        return echo(records)

    publish(bus, *(prompt(f"p{n:02}") for n in range(10)))
    run_until([worker(bus, work)], lambda: len(responses(bus)) == 9 and len(letters(bus)) == 1)
    (letter,) = letters(bus)
    assert (letter.kind, letter.error_class, letter.source_topic) == (
        DeadLetterKind.PERMANENT,
        "PermanentRecordError",
        "prompts",
    )
    assert decode_record(letter.value, Prompt).messages[0].content == "p05"
    assert letter.headers[0].value == b"r"


def test_a_bug_is_tried_again_and_then_a_dead_letter(bus, monkeypatch):
    monkeypatch.setattr("engine.worker.BACKOFF_S", (0.01, 0.05))
    tries = []

    def work(records):
        tries.append(len(records))
        raise ZeroDivisionError("a bug")

    publish(bus, prompt("p"))
    run_until([worker(bus, work, limits=WorkerLimits(max_attempts=3))], lambda: len(letters(bus)) == 1)
    (letter,) = letters(bus)
    assert (letter.kind, letter.attempts, tries) == (DeadLetterKind.EXHAUSTED, 3, [1, 1, 1])


def test_bytes_that_are_no_record_become_a_dead_letter_untouched(bus):
    bus.publish([ProducerRecord("prompts", b"k", b"rubbish", (("h", b"v"),))])
    publish(bus, prompt("good"))
    run_until([worker(bus, echo)], lambda: len(letters(bus)) == 1 and responses(bus) == ["GOOD"])
    (letter,) = letters(bus)
    assert (letter.kind, letter.value, letter.source_key) == (DeadLetterKind.DECODE, b"rubbish", b"k")


def test_a_dependency_that_is_away_makes_no_dead_letter_and_loses_nothing(bus, monkeypatch):
    monkeypatch.setattr("engine.worker.BACKOFF_S", (0.01, 0.05))
    away = [3]

    def work(records):
        if away[0]:
            away[0] -= 1
            raise ModelUnreachable("the server is down", "", "")
        return echo(records)

    publish(bus, *(prompt(f"p{n}") for n in range(5)))
    run_until([worker(bus, work)], lambda: len(responses(bus)) == 5)
    assert letters(bus) == []


def test_a_wrong_setting_stops_the_stage_with_nothing_committed(bus):
    def work(records):
        raise UsageError("a setting is wrong", "", "")

    publish(bus, prompt("p"))
    with pytest.raises(UsageError):
        run_until([worker(bus, work)], lambda: False)
    assert bus.committed("r.respond", ["prompts"]) == {} and letters(bus) == []


def test_other_runs_records_are_passed_over(bus):
    publish(bus, prompt("mine"), prompt("theirs", run="another"))
    run_until([worker(bus, echo)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 2)
    assert responses(bus) == ["MINE"]


def test_an_output_that_is_too_large_is_a_dead_letter(bus):
    def work(records):
        return [[answer(r).model_copy(update={"completions": [Completion(index=0, text="x" * 5_000_000)]})] for r in records]

    publish(bus, prompt("p"))
    run_until([worker(bus, work)], lambda: len(letters(bus)) == 1)
    assert letters(bus)[0].kind is DeadLetterKind.TOO_LARGE


def test_after_a_commit_in_doubt_nothing_is_worked_or_written_twice(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(20)))
    worked = []

    def work(records):
        worked.extend(record.messages[0].content for record in records)
        return echo(records)

    doubtful = worker(bus, work)
    real, left = doubtful.writer.commit, [2]

    def commit(outputs, *arguments, **more):
        # The worst case twice: the transaction did land, and the answer was lost.
        real(outputs, *arguments, **more)
        if left[0] and outputs:
            left[0] -= 1
            raise CommitUncertain("the answer was lost")

    doubtful.writer.commit = commit
    run_until([doubtful], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 20)
    assert responses(bus) == [f"P{n:02}" for n in range(20)] and len(worked) == len(set(worked)) == 20


def test_a_full_stage_reads_no_more_than_its_bound(bus):
    gate = threading.Event()

    def work(records):
        gate.wait(WITHIN_S)
        return echo(records)

    publish(bus, *(prompt(f"p{n}") for n in range(300)))
    bounded = worker(bus, work, limits=WorkerLimits(max_in_flight=20))
    with Host([bounded]):
        deadline = time.monotonic() + WITHIN_S
        while bounded.num_in_flight < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert bounded.num_in_flight == 20
        gate.set()
        while len(responses(bus)) < 300 and time.monotonic() < deadline:
            assert bounded.num_in_flight <= 21
    assert len(responses(bus)) == 300


def test_a_lane_serves_the_later_stage_first(bus):
    order, lane = [], ModelExecutor("test", downstream_wait_s=0.5)

    def early(records):
        order.append("early")
        return echo(records)

    def late(records):
        order.append("late")
        return [[] for _ in records]

    publish(bus, *(prompt(f"p{n}") for n in range(4)))
    workers = [
        worker(bus, early, lane=lane, batch=1),
        worker(bus, late, lane=lane, name="judge", inputs=("responses",), outputs=("preferences",), rank=3, batch=1),
    ]
    run_until(workers, lambda: len(order) == 8)
    assert order == ["early", "late"] * 4


def test_while_it_is_in_doubt_a_worker_commits_nothing(bus):
    """The log goes away between the doubt and the answer: what landed must not be written again before it is known."""
    publish(bus, *(prompt(f"p{n:02}") for n in range(20)))
    doubtful = worker(bus, echo)
    real, state = doubtful.writer.commit, {"doubts": 0, "away": 3}

    def commit(outputs, *arguments, **more):
        real(outputs, *arguments, **more)
        if outputs and not state["doubts"]:
            state["doubts"] = 1
            raise CommitUncertain("the answer was lost")

    committed = doubtful.consumer.committed

    def away():
        if state["doubts"] and state["away"]:
            state["away"] -= 1
            raise BusUnreachable("the log is away")
        return committed()

    doubtful.writer.commit, doubtful.consumer.committed = commit, away
    run_until(
        [doubtful], lambda: state == {"doubts": 1, "away": 0} and not doubtful.commit_uncertain and doubtful.num_in_flight == 0
    )
    assert responses(bus) == [f"P{n:02}" for n in range(20)]


def fail_for(wrong, error=PermanentRecordError):
    def work(records):
        for record in records:
            if wrong(record.messages[0].content):
                raise error("cannot be done", "the test says so", "")
        return echo(records)

    return work


def test_many_dead_letters_of_one_class_in_a_row_stop_the_stage_and_are_not_committed(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(30)))
    with pytest.raises(TooManyDeadLetters, match=r"10 records in a row.*PermanentRecordError"):
        run_until([worker(bus, fail_for(lambda text: True))], lambda: False)
    assert bus.committed("r.respond", ["prompts"]) == {} and letters(bus) == []
    run_until([worker(bus, echo)], lambda: len(responses(bus)) == 30)  # mended: every one of them is worked
    assert letters(bus) == []


def test_dead_letters_that_good_records_interrupt_are_only_dead_letters(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(40)))
    run_until(
        [worker(bus, fail_for(lambda text: int(text[1:]) % 2), batch=1)],
        lambda: len(letters(bus)) == 20 and len(responses(bus)) == 20,
    )


def test_a_few_dead_letters_are_committed_when_nothing_else_is_left_to_do(bus):
    publish(bus, *(prompt(f"p{n}") for n in range(9)))
    run_until([worker(bus, fail_for(lambda text: True))], lambda: len(letters(bus)) == 9)
    assert sum(bus.committed("r.respond", ["prompts"]).values()) == 9


def test_the_limit_in_a_row_can_be_turned_off(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(30)))
    unlimited = worker(bus, fail_for(lambda text: True), limits=WorkerLimits(max_consecutive_dead_letters=0))
    run_until([unlimited], lambda: len(letters(bus)) == 30)


def test_a_message_for_one_stage_alone_is_passed_over_by_the_others(bus):
    only = to_producer_record(prompt("again"))
    bus.publish([ProducerRecord(only.topic, only.key, only.value, (*only.headers, (TARGET_STAGE_HEADER, b"respond")))])
    other = worker(bus, echo, name="other")
    run_until([other], lambda: sum(bus.committed("r.other", ["prompts"]).values()) == 1)
    assert responses(bus) == []
    run_until([worker(bus, echo)], lambda: responses(bus) == ["AGAIN"])


def test_a_record_at_which_processes_die_is_worked_alone_and_then_a_dead_letter(bus, tmp_path):
    """Three processes die with the poison in hand; a process that dies is one whose journal was not ended."""
    publish(bus, *(prompt(f"p{n}") for n in range(6)))
    batches = []

    class Dies(BaseException):
        pass

    def work(records):
        batches.append(sorted(record.messages[0].content for record in records))
        if any(record.messages[0].content == "p3" for record in records):
            raise Dies
        return echo(records)

    for _ in range(3):
        dying = worker(bus, work, journal=DyingJournal(tmp_path / "journal", "0"))
        with pytest.raises(Dies):
            run_until([dying], lambda: False)
    assert len(batches[0]) > 1 and batches[-1] == ["p3"]
    last = worker(bus, work, journal=CrashJournal(tmp_path / "journal", "0"))
    run_until([last], lambda: len(responses(bus)) == 5 and len(letters(bus)) == 1)
    (letter,) = letters(bus)
    assert (letter.kind, letter.attempts) == (DeadLetterKind.CRASH, 3)
    assert CrashJournal(tmp_path / "journal", "0").crash_counts() == {}


class DyingJournal(CrashJournal):
    """The journal of a process that is killed at work: its last entry stays."""

    def mark_finished(self, messages):
        if sys.exc_info()[0] is None:
            super().mark_finished(messages)


def test_a_watchdog_ends_a_process_whose_call_hangs():
    calls, ended, stop = CallTracker("stage"), [], threading.Event()
    watchdog = Watchdog([calls], 0.05, ended.append)
    with calls.track("commit"):
        watchdog.run(stop)  # returns once it has ended the process
    assert ended == [3]


def test_a_watchdog_leaves_calls_alone_that_come_back():
    calls, ended, stop = CallTracker("stage"), [], threading.Event()
    thread = threading.Thread(target=Watchdog([calls], 5.0, ended.append).run, args=(stop,))
    thread.start()
    for _ in range(100):
        with calls.track("poll"):
            pass
    stop.set()
    thread.join()
    assert ended == []


def test_stopping_waits_for_a_slow_model_only_so_long_and_loses_nothing(bus, tmp_path):
    publish(bus, prompt("slow"))
    begun, released = threading.Event(), threading.Event()

    def work(records):
        begun.set()
        released.wait(WITHIN_S)
        return echo(records)

    journal = CrashJournal(tmp_path / "journal", "0")
    host = Host([worker(bus, work, journal=journal)], shutdown_timeout_s=0.5)
    host.start()
    assert begun.wait(WITHIN_S)
    started = time.monotonic()
    host.close()
    assert time.monotonic() - started < 5 and host.abandoned_threads == ["test-0"]
    released.set()
    assert CrashJournal(tmp_path / "journal", "0").crash_counts() == {}  # it was not the record that ended the process
    run_until([worker(bus, echo)], lambda: responses(bus) == ["SLOW"])


def test_partitions_that_arrive_at_a_full_stage_are_held_back_too(bus):
    gate = threading.Event()

    def work(records):
        gate.wait(WITHIN_S)
        return echo(records)

    publish(bus, *(prompt(f"p{n}") for n in range(300)))
    leaving = bus.open_consumer("r.respond", ["prompts"], member="another")
    leaving.poll(0.1, 1)
    bounded = worker(bus, work, limits=WorkerLimits(max_in_flight=20))
    with Host([bounded]):
        deadline = time.monotonic() + WITHIN_S
        while bounded.num_in_flight < 20 and time.monotonic() < deadline:
            leaving.poll(0.01, 1)
        before = len(bounded.consumer.assignment())
        leaving.close()
        while len(bounded.consumer.assignment()) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(bounded.consumer.assignment()) > before and bounded.num_in_flight <= 21
        gate.set()


def test_what_is_held_is_bounded_in_bytes(bus):
    gate = threading.Event()

    def work(records):
        gate.wait(WITHIN_S)
        return echo(records)

    publish(bus, *(prompt(f"{n}" + "x" * 10_000) for n in range(200)))
    bounded = worker(bus, work, limits=WorkerLimits(max_in_flight=50, max_in_flight_bytes=100_000))
    with Host([bounded]):
        deadline = time.monotonic() + WITHIN_S
        while bounded.in_flight_bytes < 100_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        polls = bounded.num_in_flight
        time.sleep(0.2)
        assert bounded.num_in_flight == polls <= 50
        gate.set()
        while len(responses(bus)) < 200 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(responses(bus)) == 200
