"""The worker loop: faults are sorted, nothing finished twice, other runs left alone, later stages first."""

import threading
import time

import pytest

from engine.bus.port import Outgoing
from engine.bus.read import read_values
from engine.errors import CommitInDoubt, ModelUnreachable, PermanentRecordError, UsageError
from engine.host import Host
from engine.worker import Lane, Stage, Worker, outgoing
from schemas import ids
from schemas.codec import decode
from schemas.records import Candidate, DeadLetter, DeadLetterKind, Prompt, Response, Turn

WITHIN_S = 20


def prompt(text, run="r"):
    turns = [Turn(role="user", content=text)]
    key = ids.prompt_id(turns)
    return Prompt(record_id=key, prompt_id=key, run_id=run, stage="produce", turns=turns, source="test")


def answer(record):
    text = record.turns[0].content.upper()
    return Response(
        record_id=ids.record_id("respond", [record.record_id], "f"), prompt_id=record.prompt_id, run_id=record.run_id,
        stage="respond", turns=record.turns, source="test", candidates=[Candidate(index=0, text=text)],
    )  # fmt: skip


def echo(records):
    return [[answer(record)] for record in records]


def worker(bus, work, *, lane=None, name="respond", inputs=("prompts",), outputs=("responses",), rank=0, batch=8, **more):
    stage = Stage(name, inputs, outputs, rank, batch, work)
    return Worker(bus, stage, lane or Lane("test", linger_s=0.0), run_id="r", slot="0", **more)


def run_until(workers, condition):
    with Host(workers) as host:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            host.check()
            assert time.monotonic() < deadline, "the condition was not met in time"
            host.failed.wait(0.01)


def responses(bus):
    return sorted(decode(value, Response).candidates[0].text for value in read_values(bus, "responses"))


def letters(bus):
    return [decode(value, DeadLetter) for value in read_values(bus, "dead-letters")]


def publish(bus, *records):
    bus.publish([outgoing(record) for record in records])


def test_every_record_is_worked_once_and_committed(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(50)))
    run_until([worker(bus, echo)], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 50)
    assert responses(bus) == [f"P{n:02}" for n in range(50)]
    run_until([worker(bus, echo)], lambda: True)
    assert len(responses(bus)) == 50


def test_a_poisoned_record_becomes_a_dead_letter_and_its_neighbours_do_not(bus):
    def work(records):
        for record in records:
            if record.turns[0].content == "p05":
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
    assert decode(letter.value, Prompt).turns[0].content == "p05"
    assert letter.headers[0].value == b"r"


def test_a_bug_is_tried_again_and_then_a_dead_letter(bus):
    tries = []

    def work(records):
        tries.append(len(records))
        raise ZeroDivisionError("a bug")

    publish(bus, prompt("p"))
    run_until([worker(bus, work, attempts=3)], lambda: len(letters(bus)) == 1)
    (letter,) = letters(bus)
    assert (letter.kind, letter.attempts, tries) == (DeadLetterKind.EXHAUSTED, 3, [1, 1, 1])


def test_bytes_that_are_no_record_become_a_dead_letter_untouched(bus):
    bus.publish([Outgoing("prompts", b"k", b"rubbish", (("h", b"v"),))])
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
        return [[answer(r).model_copy(update={"candidates": [Candidate(index=0, text="x" * 5_000_000)]})] for r in records]

    publish(bus, prompt("p"))
    run_until([worker(bus, work)], lambda: len(letters(bus)) == 1)
    assert letters(bus)[0].kind is DeadLetterKind.TOO_LARGE


def test_after_a_commit_in_doubt_nothing_is_worked_or_written_twice(bus):
    publish(bus, *(prompt(f"p{n:02}") for n in range(20)))
    worked = []

    def work(records):
        worked.extend(record.turns[0].content for record in records)
        return echo(records)

    doubtful = worker(bus, work)
    real, left = doubtful.writer.commit, [2]

    def commit(outputs, *arguments, **more):
        # The worst case twice: the transaction did land, and the answer was lost.
        real(outputs, *arguments, **more)
        if left[0] and outputs:
            left[0] -= 1
            raise CommitInDoubt("the answer was lost")

    doubtful.writer.commit = commit
    run_until([doubtful], lambda: sum(bus.committed("r.respond", ["prompts"]).values()) == 20)
    assert responses(bus) == [f"P{n:02}" for n in range(20)] and len(worked) == len(set(worked)) == 20


def test_a_full_stage_reads_no_more_than_its_bound(bus):
    gate = threading.Event()

    def work(records):
        gate.wait(WITHIN_S)
        return echo(records)

    publish(bus, *(prompt(f"p{n}") for n in range(300)))
    bounded = worker(bus, work, max_in_flight=20)
    with Host([bounded]):
        deadline = time.monotonic() + WITHIN_S
        while bounded.in_flight < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert bounded.in_flight == 20
        gate.set()
        while len(responses(bus)) < 300 and time.monotonic() < deadline:
            assert bounded.in_flight <= 21
    assert len(responses(bus)) == 300


def test_a_lane_serves_the_later_stage_first(bus):
    order, lane = [], Lane("test", linger_s=0.5)

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
