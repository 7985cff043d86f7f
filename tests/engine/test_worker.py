"""The worker loop: handling of faults, exactly-once processing, separation of runs, and priority of later stages."""

import sys
import threading
import time
from collections import Counter

import pytest

from engine.bus.port import ProducerRecord
from engine.bus.read import read_values
from engine.crash_journal import CrashJournal
from engine.errors import (
    BusUnreachable,
    CommitUncertain,
    ModelUnreachable,
    PermanentRecordError,
    RequestFailed,
    TooManyDeadLetters,
    UsageError,
)
from engine.host import Host
from engine.positions import TARGET_STAGE_HEADER
from engine.watchdog import CallTracker, Watchdog
from engine.worker import ModelExecutor, PauseReport, Stage, Worker, WorkerLimits, to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ChatMessage, Completion, DeadLetter, DeadLetterKind, Prompt, Response
from tests.support.waiting import HANG_S, wait_until


def make_prompt(text, run="r"):
    messages = [ChatMessage(role="user", content=text)]
    prompt_id = ids.compute_prompt_id(messages)
    return Prompt(record_id=prompt_id, prompt_id=prompt_id, run_id=run, stage="produce", messages=messages, source="test")


def make_response(record):
    text = record.messages[0].content.upper()
    return Response(
        record_id=ids.compute_record_id("respond", [record.record_id], "f"), prompt_id=record.prompt_id, run_id=record.run_id,
        stage="respond", messages=record.messages, source="test", completions=[Completion(index=0, text=text)],
    )  # fmt: skip


def echo(records):
    return [[make_response(record)] for record in records]


def make_worker(
    bus, work, *, executor=None, name="respond", inputs=("prompts",), outputs=("responses",), priority=0, batch=8, **options
):
    stage = Stage(name, inputs, outputs, priority, batch, work)
    return Worker(bus, stage, executor or ModelExecutor("test", downstream_wait_s=0.0), run_id="r", instance="0", **options)


def run_until(workers, condition):
    with Host(workers) as host:
        wait_until(condition, host, interval_s=0.01)


def read_responses(bus):
    return sorted(decode_record(value, Response).completions[0].text for value in read_values(bus, "responses"))


def read_dead_letters(bus):
    return [decode_record(value, DeadLetter) for value in read_values(bus, "dead-letters")]


def publish(bus, *records):
    bus.publish([to_producer_record(record) for record in records])


def test_worker_processes_and_commits_each_record_once(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(50)))
    run_until([make_worker(bus, echo)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 50)
    assert read_responses(bus) == [f"P{n:02}" for n in range(50)]
    # A second worker of the group reads only what comes later.
    publish(bus, make_prompt("p50"))
    processed = []
    run_until(
        [make_worker(bus, lambda records: processed.extend(records) or echo(records))],
        lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 51,
    )
    assert [record.messages[0].content for record in processed] == ["p50"] and len(read_responses(bus)) == 51


def test_permanent_error_makes_a_dead_letter_of_one_record_only(bus):
    def work(records):
        for record in records:
            if record.messages[0].content == "p05":
                raise PermanentRecordError("cannot be done", "raised by the test", "")
        return echo(records)

    publish(bus, *(make_prompt(f"p{n:02}") for n in range(10)))
    run_until([make_worker(bus, work)], lambda: len(read_responses(bus)) == 9 and len(read_dead_letters(bus)) == 1)
    (dead_letter,) = read_dead_letters(bus)
    assert (dead_letter.kind, dead_letter.error_class, dead_letter.source_topic) == (
        DeadLetterKind.PERMANENT,
        "PermanentRecordError",
        "prompts",
    )
    assert decode_record(dead_letter.value, Prompt).messages[0].content == "p05"
    assert dead_letter.headers[0].value == b"r"


def test_results_of_a_batch_count_one_by_one(bus, monkeypatch):
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.05))
    seen, errors = Counter(), {
        "p03": [PermanentRecordError("rejected", "", "")],
        "p05": [RequestFailed("fails alone", "", "")] * 9,
        "p07": [ModelUnreachable("down", "", "")] * 4,
    }  # fmt: skip

    def work(records):
        results = []
        for record in records:
            text = record.messages[0].content
            seen[text] += 1
            results.append(errors[text].pop() if errors.get(text) else [make_response(record)])
        return results

    publish(bus, *(make_prompt(f"p{n:02}") for n in range(10)))
    limits = WorkerLimits(max_attempts=3)
    run_until(
        [make_worker(bus, work, batch=10, limits=limits)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 10
    )
    assert read_responses(bus) == [f"P{n:02}" for n in range(10) if n not in (3, 5)]
    assert seen == {f"p{n:02}": 1 for n in range(10)} | {"p05": 3, "p07": 5}  # no other record is processed twice
    kinds = {decode_record(d.value, Prompt).messages[0].content: (d.kind, d.attempts) for d in read_dead_letters(bus)}
    assert kinds == {"p03": (DeadLetterKind.PERMANENT, 1), "p05": (DeadLetterKind.EXHAUSTED, 3)}


def test_many_failures_beside_successes_do_not_stop_the_stage(bus):
    def work(records):
        return [
            PermanentRecordError("rejected", "", "")
            if record.messages[0].content.startswith("bad")
            else [make_response(record)]
            for record in records
        ]

    publish(bus, *(make_prompt(f"bad{n}") for n in range(12)), make_prompt("good"))
    limits = WorkerLimits(max_consecutive_dead_letters=3)
    run_until([make_worker(bus, work, batch=13, limits=limits)], lambda: len(read_dead_letters(bus)) == 12)
    assert read_responses(bus) == ["GOOD"]
    publish(bus, *(make_prompt(f"bad again {n}") for n in range(5)))
    with pytest.raises(TooManyDeadLetters):  # without a success, they have a common cause
        run_until([make_worker(bus, work, batch=13, limits=limits)], lambda: False)


def test_unexpected_error_is_retried_before_a_dead_letter(bus, monkeypatch):
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.05))
    attempts = []

    def work(records):
        attempts.append(len(records))
        raise ZeroDivisionError("a bug")

    publish(bus, make_prompt("p"))
    run_until([make_worker(bus, work, limits=WorkerLimits(max_attempts=3))], lambda: len(read_dead_letters(bus)) == 1)
    (dead_letter,) = read_dead_letters(bus)
    assert (dead_letter.kind, dead_letter.attempts, attempts) == (DeadLetterKind.EXHAUSTED, 3, [1, 1, 1])


def test_undecodable_record_becomes_a_dead_letter_with_its_bytes(bus):
    bus.publish([ProducerRecord("prompts", b"k", b"garbage", (("h", b"v"),))])
    publish(bus, make_prompt("good"))
    run_until([make_worker(bus, echo)], lambda: len(read_dead_letters(bus)) == 1 and read_responses(bus) == ["GOOD"])
    (dead_letter,) = read_dead_letters(bus)
    assert (dead_letter.kind, dead_letter.value, dead_letter.source_key) == (DeadLetterKind.DECODE, b"garbage", b"k")


def test_unreachable_model_causes_retries_and_no_dead_letter(bus, monkeypatch):
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.05))
    remaining_failures = [3]

    def work(records):
        if remaining_failures[0]:
            remaining_failures[0] -= 1
            raise ModelUnreachable("the server is down", "", "")
        return echo(records)

    publish(bus, *(make_prompt(f"p{n}") for n in range(5)))
    run_until([make_worker(bus, work)], lambda: len(read_responses(bus)) == 5)
    assert read_dead_letters(bus) == []


def test_usage_error_stops_the_stage_without_a_commit(bus):
    def work(records):
        raise UsageError("a setting is wrong", "", "")

    publish(bus, make_prompt("p"))
    with pytest.raises(UsageError):
        run_until([make_worker(bus, work)], lambda: False)
    assert not any(bus.committed("r.respond", ["prompts"]).values()) and read_dead_letters(bus) == []


def test_worker_skips_records_of_other_runs(bus):
    publish(bus, make_prompt("mine"), make_prompt("theirs", run="another"))
    run_until([make_worker(bus, echo)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 2)
    assert read_responses(bus) == ["MINE"]


def test_too_large_output_makes_a_dead_letter(bus):
    def work(records):
        return [
            [make_response(r).model_copy(update={"completions": [Completion(index=0, text="x" * 5_000_000)]})] for r in records
        ]

    publish(bus, make_prompt("p"))
    run_until([make_worker(bus, work)], lambda: len(read_dead_letters(bus)) == 1)
    assert read_dead_letters(bus)[0].kind is DeadLetterKind.TOO_LARGE


def test_uncertain_commit_does_not_repeat_work_or_writes(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(20)))
    processed = []

    def work(records):
        processed.extend(record.messages[0].content for record in records)
        return echo(records)

    uncertain = make_worker(bus, work)
    real_commit, remaining = uncertain.writer.commit, [2]

    def commit(outputs, *arguments, **options):
        # The worst case, twice: the transaction is committed, but the confirmation is lost.
        real_commit(outputs, *arguments, **options)
        if remaining[0] and outputs:
            remaining[0] -= 1
            raise CommitUncertain("the answer was lost")

    uncertain.writer.commit = commit
    run_until([uncertain], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 20)
    assert read_responses(bus) == [f"P{n:02}" for n in range(20)] and len(processed) == len(set(processed)) == 20
    # The records whose commit was uncertain are counted, too.
    run_until([uncertain], lambda: uncertain.num_committed == uncertain.num_written == 20)


def block_commits(worker):
    """Make the commits with outputs wait for an event. Return the event, and the list of the numbers of open commits."""
    real_commit, release, open_commits, num_open = worker.writer.commit, threading.Event(), set(), []

    def commit(outputs, *arguments, **options):
        if not outputs:
            return real_commit(outputs, *arguments, **options)
        open_commits.add(threading.get_ident())
        num_open.append(len(open_commits))
        try:
            release.wait(HANG_S)
            return real_commit(outputs, *arguments, **options)
        finally:
            open_commits.remove(threading.get_ident())

    worker.writer.commit = commit
    return release, num_open


def test_model_works_while_a_transaction_is_open(bus):
    processed = []

    def work(records):
        processed.extend(record.messages[0].content for record in records)
        return echo(records)

    publish(bus, *(make_prompt(f"p{n:03}") for n in range(300)))
    worker = make_worker(bus, work, limits=WorkerLimits(max_in_flight=60, max_uncommitted=40))
    release, num_open = block_commits(worker)
    with Host([worker]) as host:
        # The transaction has at most the first batches. A worker that waits for it would process no others.
        wait_until(lambda: num_open and len(processed) >= 40, host)
        wait_until(lambda: worker.num_in_flight == 60, host)
        assert len(processed) < 40 + 8 and worker.num_queued >= 60 - 48, "more records were finished than the limit allows"
        assert read_responses(bus) == []
        release.set()
        wait_until(lambda: len(read_responses(bus)) == 300, host)
    assert set(num_open) == {1}, "a second transaction began while the first one was open"
    assert sorted(processed) == [f"p{n:03}" for n in range(300)]
    assert read_responses(bus) == [f"P{n:03}" for n in range(300)]


def test_partition_is_lost_while_a_transaction_is_open(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(40)))
    worker = make_worker(bus, echo)
    release, num_open = block_commits(worker)
    with Host([worker]) as host:
        wait_until(lambda: num_open, host)
        before = len(worker.consumer.assignment())
        other = bus.open_consumer("r.respond", ["prompts"], member="another")
        wait_until(lambda: other.poll(0.01, 1) is not None and other.assignment(), host, interval_s=0.0)
        assert 0 < len(worker.consumer.assignment()) < before
        release.set()
        kept = set(worker.consumer.assignment())
        ends = bus.end_offsets(["prompts"])
        wait_until(lambda: all(bus.committed("r.respond", ["prompts"]).get(tp, 0) == ends[tp] for tp in kept), host)
        lost = set(ends) - kept
        assert len(read_responses(bus)) == sum(ends[tp] for tp in kept), f"records of {lost} are not committed"
        other.close()
        wait_until(lambda: len(read_responses(bus)) == 40, host)
    assert read_responses(bus) == [f"P{n:02}" for n in range(40)]


def test_worker_stops_only_after_its_transaction(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(10)))
    worker = make_worker(bus, echo)
    release, num_open = block_commits(worker)
    with Host([worker]) as host:
        wait_until(lambda: num_open, host)
        threading.Timer(0.2, release.set).start()
    assert not host.abandoned_threads and read_responses(bus) == [f"P{n:02}" for n in range(10)]


def test_full_stage_stops_reading_at_its_limit(bus):
    release = threading.Event()

    def work(records):
        release.wait(HANG_S)
        return echo(records)

    publish(bus, *(make_prompt(f"p{n}") for n in range(300)))
    bounded = make_worker(bus, work, limits=WorkerLimits(max_in_flight=20))
    with Host([bounded]):
        wait_until(lambda: bounded.num_in_flight >= 20)
        assert bounded.num_in_flight == 20
        release.set()
        in_flight = []
        wait_until(lambda: in_flight.append(bounded.num_in_flight) or len(read_responses(bus)) == 300)
        assert max(in_flight) <= 20
    assert len(read_responses(bus)) == 300


def test_records_that_wait_for_a_retry_are_bounded(bus, monkeypatch, caplog):
    """Two records fail and wait. The records of their partition after them cannot be committed, and a crash would repeat them."""
    monkeypatch.setattr("engine.worker.compute_backoff", lambda attempts: HANG_S)
    finished = []

    def work(records):
        if any(record.messages[0].content in ("p000", "p001") for record in records):
            raise ValueError("fails")
        finished.extend(record.messages[0].content for record in records)
        return echo(records)

    bus.publish([to_producer_record(make_prompt(f"p{n:03}"))._replace(partition=0) for n in range(100)])
    worker = make_worker(bus, work, limits=WorkerLimits(max_uncommitted=16, max_attempts=2))
    with Host([worker]) as host:
        wait_until(lambda: len(finished) >= 16 and worker.num_queued == 100 - 2 - len(finished), host)
        wait_until(lambda: worker.num_waits_for_retry == 1, host)
        first, second = sorted(worker.retry_queue, key=lambda item: item.consumer_record.offset)
        assert len(finished) < 16 + 8 and worker.take_batch() == [] and read_responses(bus) == []
        assert sum("finished records cannot be committed before it" in line for line in caplog.messages) == 1
        second.retry_at = 0.0  # it need not wait for the other retry
        wait_until(lambda: worker.num_dead_letters == 1, host)
        first.retry_at = 0.0
        wait_until(lambda: len(read_dead_letters(bus)) + len(read_responses(bus)) == 100, host)
        assert len(read_dead_letters(bus)) == 2


def test_limit_of_uncommitted_records_never_stops_the_stage(bus):
    """The dead letters of one class are held until the other records are finished, so these must be processed."""
    bus.publish([to_producer_record(make_prompt(f"p{n:02}"))._replace(partition=0) for n in range(30)])
    work = fail_for(lambda text: text < "p05")
    limits = WorkerLimits(max_uncommitted=2, max_attempts=1, max_consecutive_dead_letters=10)
    run_until(
        [make_worker(bus, work, batch=1, limits=limits)],
        lambda: len(read_dead_letters(bus)) == 5 and len(read_responses(bus)) == 25,
    )


def test_executor_serves_the_later_stage_first(bus):
    order, executor = [], ModelExecutor("test", downstream_wait_s=60.0)  # a slow machine needs more than the default

    def early(records):
        order.append("early")
        return echo(records)

    def late(records):
        order.append("late")
        return [[] for _ in records]

    publish(bus, *(make_prompt(f"p{n}") for n in range(4)))
    workers = [
        make_worker(bus, early, executor=executor, batch=1),
        make_worker(
            bus, late, executor=executor, name="judge", inputs=("responses",), outputs=("preferences",), priority=3, batch=1
        ),
    ]
    run_until(workers, lambda: len(order) == 8)
    assert order == ["early", "late"] * 4


def test_worker_commits_nothing_while_a_commit_is_uncertain(bus):
    """The log is unreachable after an uncertain commit: its outputs must not be written again before the result is known."""
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(20)))
    uncertain = make_worker(bus, echo)
    real_commit, state = uncertain.writer.commit, {"uncertain": 0, "unreachable": 3}

    def commit(outputs, *arguments, **options):
        real_commit(outputs, *arguments, **options)
        if outputs and not state["uncertain"]:
            state["uncertain"] = 1
            raise CommitUncertain("the answer was lost")

    real_committed = uncertain.consumer.committed

    def committed():
        if state["uncertain"] and state["unreachable"]:
            state["unreachable"] -= 1
            raise BusUnreachable("the log is unreachable")
        return real_committed()

    uncertain.writer.commit, uncertain.consumer.committed = commit, committed
    run_until(
        [uncertain],
        lambda: state == {"uncertain": 1, "unreachable": 0} and not uncertain.commit_uncertain and uncertain.num_in_flight == 0,
    )
    assert read_responses(bus) == [f"P{n:02}" for n in range(20)]


def fail_for(predicate, error=PermanentRecordError):
    def work(records):
        for record in records:
            if predicate(record.messages[0].content):
                raise error("cannot be done", "raised by the test", "")
        return echo(records)

    return work


def test_many_consecutive_dead_letters_stop_the_stage_without_a_commit(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(30)))
    with pytest.raises(TooManyDeadLetters, match=r"10 consecutive records.*PermanentRecordError"):
        run_until([make_worker(bus, fail_for(lambda text: True))], lambda: False)
    assert not any(bus.committed("r.respond", ["prompts"]).values()) and read_dead_letters(bus) == []
    run_until([make_worker(bus, echo)], lambda: len(read_responses(bus)) == 30)  # after the fix all records are processed
    assert read_dead_letters(bus) == []


def test_dead_letters_between_successful_records_do_not_stop_the_stage(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(40)))
    run_until(
        [make_worker(bus, fail_for(lambda text: int(text[1:]) % 2), batch=1)],
        lambda: len(read_dead_letters(bus)) == 20 and len(read_responses(bus)) == 20,
    )


def test_few_dead_letters_are_committed_when_the_input_ends(bus):
    publish(bus, *(make_prompt(f"p{n}") for n in range(9)))
    run_until([make_worker(bus, fail_for(lambda text: True))], lambda: len(read_dead_letters(bus)) == 9)
    assert sum(bus.committed("r.respond", ["prompts"]).values()) == 9


def test_limit_of_consecutive_dead_letters_can_be_disabled(bus):
    publish(bus, *(make_prompt(f"p{n:02}") for n in range(30)))
    unlimited = make_worker(bus, fail_for(lambda text: True), limits=WorkerLimits(max_consecutive_dead_letters=0))
    run_until([unlimited], lambda: len(read_dead_letters(bus)) == 30)


def test_record_for_one_stage_is_skipped_by_the_others(bus):
    record = to_producer_record(make_prompt("again"))
    bus.publish([ProducerRecord(record.topic, record.key, record.value, (*record.headers, (TARGET_STAGE_HEADER, b"respond")))])
    other = make_worker(bus, echo, name="other")
    run_until([other], lambda: sum(bus.committed("r.other", ["prompts"]).values()) == 1)
    assert read_responses(bus) == []
    run_until([make_worker(bus, echo)], lambda: read_responses(bus) == ["AGAIN"])


class Crash(BaseException):
    pass


@pytest.mark.parametrize(("had_fault", "ends"), [(True, 3), (False, 6)])
def test_record_that_ends_processes_is_retried_alone_and_then_a_dead_letter(bus, tmp_path, monkeypatch, had_fault, ends):
    """Processes end at the record; an end is simulated by a journal whose last entry is not finished."""
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.02))
    publish(bus, *(make_prompt(f"p{n}") for n in range(6)))
    batches, topic_ids = [], bus.topic_ids(["prompts"])

    def work(records):
        batches.append(sorted(record.messages[0].content for record in records))
        if any(record.messages[0].content == "p3" for record in records):
            raise Crash
        return echo(records)

    # The first process ends at a batch of several records, which counts for none of them.
    for _ in range(1 + ends):
        journal = CrashingJournal(tmp_path / "journal", "0", topic_ids=topic_ids, had_fault=had_fault)
        crashing = make_worker(bus, work, journal=journal)
        with pytest.raises(Crash):
            run_until([crashing], lambda: False)
        crashing.journal.close()
    assert len(batches[0]) > 1 and batches[-1] == ["p3"]
    journal = CrashJournal(tmp_path / "journal", "0", topic_ids=topic_ids, had_fault=had_fault)
    last = make_worker(bus, work, journal=journal)
    run_until([last], lambda: len(read_responses(bus)) == 5 and len(read_dead_letters(bus)) == 1)
    last.journal.close()
    (dead_letter,) = read_dead_letters(bus)
    assert (dead_letter.kind, dead_letter.attempts) == (DeadLetterKind.CRASH, ends)
    assert f"{ends} processes ended while processing it" in dead_letter.error_message
    assert CrashJournal(tmp_path / "journal", "0", topic_ids=bus.topic_ids(["prompts"])).crash_counts() == {}


@pytest.mark.parametrize("reason", ["a stop signal came first", "its process is alive", "another instance finished the record"])
def test_end_of_a_process_is_not_the_fault_of_a_record(bus, tmp_path, reason):
    publish(bus, make_prompt("p0"))

    def work(records):
        if reason == "a stop signal came first":
            journal.note_stop()
        raise Crash

    journal = CrashingJournal(tmp_path / "journal", "0", topic_ids=bus.topic_ids(["prompts"]))
    worker = make_worker(bus, work, journal=journal)
    with pytest.raises(Crash):
        run_until([worker], lambda: False)
    if reason != "its process is alive":
        journal.close()
    if reason == "another instance finished the record":
        run_until([make_worker(bus, echo)], lambda: read_responses(bus) == ["P0"])
    restarted = make_worker(bus, echo, journal=CrashJournal(tmp_path / "journal", "0", topic_ids=bus.topic_ids(["prompts"])))
    assert not any(count.ends for count in restarted.poison_candidates.values())
    assert restarted.poison_candidates == {} or reason == "a stop signal came first"
    restarted.consumer.close()


class CrashingJournal(CrashJournal):
    """The journal of a process that is killed while it works: its last entry remains."""

    def mark_finished(self, messages):
        if sys.exc_info()[0] is None:
            super().mark_finished(messages)


def test_watchdog_ends_a_process_with_a_hanging_call():
    calls, exit_codes, stop = CallTracker("stage"), [], threading.Event()
    watchdog = Watchdog([calls], 0.05, exit_codes.append)
    with calls.track("commit"):
        watchdog.run(stop)  # returns after it has ended the process
    assert exit_codes == [3]


def test_watchdog_ignores_calls_that_return():
    calls, exit_codes, stop = CallTracker("stage"), [], threading.Event()
    thread = threading.Thread(target=Watchdog([calls], 5.0, exit_codes.append).run, args=(stop,))
    thread.start()
    for _ in range(100):
        with calls.track("poll"):
            pass
    stop.set()
    thread.join()
    assert exit_codes == []


def test_shutdown_waits_for_a_slow_model_up_to_its_timeout_and_loses_no_record(bus, tmp_path):
    publish(bus, make_prompt("slow"))
    started_work, released = threading.Event(), threading.Event()

    def work(records):
        started_work.set()
        released.wait(HANG_S)
        return echo(records)

    journal = CrashJournal(tmp_path / "journal", "0", topic_ids=bus.topic_ids(["prompts"]))
    host = Host([make_worker(bus, work, journal=journal)], shutdown_timeout_s=0.5)
    host.start()
    assert started_work.wait(HANG_S)
    host.close()  # returns although the call is not released
    assert host.abandoned_threads == ["test-0"]
    released.set()
    assert (
        CrashJournal(tmp_path / "journal", "0", topic_ids=bus.topic_ids(["prompts"])).crash_counts() == {}
    )  # the record did not cause the end of the process
    run_until([make_worker(bus, echo)], lambda: read_responses(bus) == ["SLOW"])


def test_full_stage_pauses_newly_assigned_partitions(bus):
    release = threading.Event()

    def work(records):
        release.wait(HANG_S)
        return echo(records)

    publish(bus, *(make_prompt(f"p{n}") for n in range(300)))
    leaving = bus.open_consumer("r.respond", ["prompts"], member="another")
    leaving.poll(0.1, 1)
    bounded = make_worker(bus, work, limits=WorkerLimits(max_in_flight=20))
    with Host([bounded]):
        wait_until(lambda: leaving.poll(0.01, 1) is None or bounded.num_in_flight >= 20, interval_s=0.0)
        before = len(bounded.consumer.assignment())
        leaving.close()
        wait_until(lambda: len(bounded.consumer.assignment()) > before)
        assert bounded.num_in_flight <= 21
        release.set()


def test_in_flight_records_are_bounded_in_bytes(bus):
    release = threading.Event()

    def work(records):
        release.wait(HANG_S)
        return echo(records)

    publish(bus, *(make_prompt(f"{n}" + "x" * 10_000) for n in range(200)))
    bounded = make_worker(bus, work, limits=WorkerLimits(max_in_flight=50, max_in_flight_bytes=100_000))
    with Host([bounded]):
        wait_until(lambda: bounded.in_flight_bytes >= 100_000)
        num_in_flight = bounded.num_in_flight
        time.sleep(0.2)
        assert bounded.num_in_flight == num_in_flight <= 50
        release.set()
        wait_until(lambda: len(read_responses(bus)) == 200)


def test_reason_of_consecutive_pauses_is_logged_once(caplog):
    report = PauseReport("respond")
    for _ in range(4):
        report.add("the server redirects", 0.5)
    report.end()
    report.add("the disk is full", 0.5)
    report.end()
    lines = [message.partition(" 0 s")[0] for message in caplog.messages]
    assert lines == [
        "respond pauses 0.5 s: the server redirects", "respond continues after a pause of", "respond pauses 0.5 s: the disk is full"
    ]  # fmt: skip


def test_long_pause_has_a_line_at_intervals(caplog, monkeypatch):
    monkeypatch.setattr("engine.worker._PAUSE_REPORT_INTERVAL_S", 0.0)
    report = PauseReport("respond")
    for _ in range(2):
        report.add("the server redirects", 0.5)
    assert caplog.messages[1] == "respond still pauses after 0 s, for the same reason"
