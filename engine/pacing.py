"""Let a training loop limit how many completions the responders sample, so that few completions are dropped.

The trainer publishes allowances (topic `allowances`). An allowance is the number of completions that may follow a position of the
topic `responses`. Responders count the completions after this position on the log, because a responder on another machine has no
database. A copy of the stage also counts its own completions that it has not read from the log yet, and starts a further batch only
after it has read them. So all copies together exceed an allowance by at most the batch that each other copy processes.

A responder holds prompts only while all of these conditions are true:

* the newest allowance has a limit, and it is used up;
* the training loop runs: it is a member of the group `TRAINER_GROUP`. Its membership ends when it stops, or about ten seconds after
  it was killed. Responders notice the end within six seconds;
* the RL phase is not paused.

Only prompts of the split TRAIN are held. No other stage holds records. An EVAL prompt is not held, but its response is written
after those of the earlier prompts of its partition, because a stage commits the records of a partition in order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from engine.backoff import compute_backoff
from engine.bus.port import Bus, Reader, TopicPartition
from engine.bus.read import TopicTail
from engine.errors import CommitUncertain, DependencyUnreachable, OffsetsLost
from engine.policy import get_paused_phases
from schemas.codec import RecordError, decode_record
from schemas.records import Allowance, Pause, Prompt, Purpose, Record, Response, Split

logger = logging.getLogger("charter.pacing")

TRAINER_GROUP = "trainer"
_POLL_INTERVAL_S = 1.0
_LEASE_CHECK_INTERVAL_S = 2.0
_MAX_MISSED_CHECKS = 3
# A prompt without a response on the log is counted for this time after the copy has finished it, e.g. as a dead letter.
_MAX_UNSEEN_S = 5.0
_MAX_POLL_RECORDS = 500


def is_held_kind(record: Record) -> bool:
    """Return whether a prompt may be held. Prompts for evaluation are never held."""
    return isinstance(record, Prompt) and record.split is Split.TRAIN


def is_rl_prompt(prompt: Prompt | Response) -> bool:
    """Return whether RL can train on the completions of a prompt. Only such completions use up an allowance."""
    return prompt.split is Split.TRAIN and prompt.purpose is not Purpose.REWARD


# The same condition for the table `responses`.
IS_RL_PROMPT_SQL = "split = 'TRAIN' AND purpose <> 'REWARD'"


class TrainingLoopLease:
    """Shows that a training loop runs, to processes on any machine, until `close` or the end of the process.

    A thread is a member of the group `TRAINER_GROUP`. It reads nothing.
    """

    def __init__(self, bus: Bus, member: str) -> None:
        self.bus, self.member, self.stop = bus, member, threading.Event()
        self.thread = threading.Thread(target=self.run, name="training-loop-lease", daemon=True)
        self.thread.start()

    def run(self) -> None:
        failures = 0
        while not self.stop.is_set():
            try:
                consumer = self.bus.open_consumer(TRAINER_GROUP, [Allowance.topic], member=self.member, hold_new=True)
                try:
                    while not self.stop.is_set():
                        consumer.poll(_POLL_INTERVAL_S, 1)
                        failures = 0
                finally:
                    with suppress(DependencyUnreachable):  # then the membership expires
                        consumer.close()
            except (DependencyUnreachable, CommitUncertain, OffsetsLost) as error:
                logger.warning("responders may not see this training loop: %s", error)
                self.stop.wait(compute_backoff(failures))
                failures += 1

    def close(self) -> None:
        self.stop.set()
        self.thread.join()


def is_training_loop_running(bus: Bus) -> bool:
    """Return whether a training loop runs on this log, on any machine."""
    return bool(bus.list_members([TRAINER_GROUP]).get(TRAINER_GROUP))


class TrainingLoopHistory:
    """Finds out whether a training loop has ever run on this log. From then on, prompts for RL need no labels."""

    def __init__(self, bus: Bus) -> None:
        self.tail = TopicTail(bus, Allowance.topic)
        self.has_run, self.next_check_at = False, 0.0

    def __call__(self) -> bool:
        if not self.has_run and time.monotonic() >= self.next_check_at:
            self.has_run = bool(self.tail.read_new())
            self.next_check_at = time.monotonic() + _POLL_INTERVAL_S
        return self.has_run


class PacedAdmission:
    """Decides which prompts one copy of the respond stage may start now.

    One thread calls `refresh`. The threads of the executor call `admit`. The caller holds the lock of the stage when it calls
    `admit` or `set_pending`. `num_completions` is the number of completions of a response. `max_pending` is the number of prompts
    that the copy processes at once.
    """

    def __init__(self, bus: Bus, num_completions: int) -> None:
        self.bus, self.num_completions = bus, num_completions
        self.tail = TopicTail(bus, Allowance.topic, Pause.topic)
        self.pauses: list[Pause] = []
        self.allowance: Allowance | None = None
        self.reader: Reader | None = None
        self.num_counted = 0  # completions after the position of the allowance
        self.next_refresh_at = self.next_lease_check_at = 0.0
        self.is_loop_running, self.num_missed_checks = False, 0
        self.remaining: int | None = None  # completions that may still be started; None means no limit
        self.max_pending = 1
        # The prompts that this copy has started and whose responses it has not read. The value is the time since when they are no
        # longer in progress, on the monotonic clock, or None.
        self.unseen: dict[str, float | None] = {}
        self.costs: dict[str, int] = {}  # of the prompts in `unseen`, in completions
        self.num_refused = 0  # since the last call of `set_pending`
        self.held_since = 0.0  # on the monotonic clock; 0 means that no prompt is held
        self.num_holds, self.total_held_s = 0, 0.0

    # Reading the log

    def refresh(self) -> None:
        """Read new allowances once a second. Read new responses at each call while responses of this copy are not read yet."""
        now = time.monotonic()
        if now < self.next_refresh_at:
            if any(list(self.unseen.values())):  # the executor may add a prompt at the same time
                self.count_new_responses()
            return
        self.next_refresh_at = now + _POLL_INTERVAL_S
        for message in self.tail.read_new():
            if message.topic == Pause.topic:
                self.pauses.append(decode_record(message.value or b"", Pause))
            else:
                self.set_allowance(decode_record(message.value or b"", Allowance))
        if self.allowance and self.allowance.num_completions is not None and now >= self.next_lease_check_at:
            # A busy machine can delay the renewal of a membership, so one missed check does not end a hold.
            self.num_missed_checks = 0 if is_training_loop_running(self.bus) else self.num_missed_checks + 1
            self.is_loop_running = self.num_missed_checks < (_MAX_MISSED_CHECKS if self.is_loop_running else 1)
            self.next_lease_check_at = now + _LEASE_CHECK_INTERVAL_S
        self.count_new_responses()

    def set_allowance(self, allowance: Allowance) -> None:
        """Use a new allowance. The responses after its position are counted again."""
        if self.allowance is None or self.allowance.num_completions is None:
            self.next_lease_check_at = 0.0
        self.close()
        self.allowance, self.num_counted = allowance, 0
        if allowance.num_completions is not None:
            positions = {TopicPartition(Response.topic, n): offset for n, offset in enumerate(allowance.offsets)}
            beginnings = self.bus.beginning_offsets([Response.topic])
            self.reader = self.bus.open_reader({tp: max(start, positions.get(tp, 0)) for tp, start in beginnings.items()})

    def count_new_responses(self) -> None:
        if self.reader is None or self.allowance is None:
            return
        ends = self.bus.end_offsets([Response.topic])
        try:
            while any(position < ends.get(tp, 0) for tp, position in self.reader.positions().items()):
                for message in self.reader.poll(_POLL_INTERVAL_S, _MAX_POLL_RECORDS):
                    if message.value is not None:  # the response of an erased prompt has no value
                        self.count_response(message.value, self.allowance.min_policy_version)
        except OffsetsLost as error:
            logger.warning(
                "respond does not follow this allowance, because the responses since then cannot be counted: %s", error
            )
            self.close()

    def count_response(self, value: bytes, min_policy_version: int) -> None:
        """Count the completions of a response that use up an allowance."""
        try:
            response = decode_record(value, Response)
        except RecordError:  # the stages that read this topic make a dead letter of the record
            return
        if is_rl_prompt(response) and response.policy_version is not None and response.policy_version >= min_policy_version:
            self.num_counted += len(response.completions)
        for prompt_id in response.parent_ids:
            self.unseen.pop(prompt_id, None)

    def has_limit(self) -> bool:
        """Return whether the newest allowance limits this responder now."""
        allowance = self.allowance
        return (
            allowance is not None
            and self.reader is not None
            and self.is_loop_running
            and allowance.phase not in get_paused_phases(self.pauses)
        )

    # Deciding

    def set_pending(self, started: Iterable[Record]) -> None:
        """Compute how many completions may be started. `started` are the prompts in progress."""
        self.remaining, now = None, time.monotonic()
        if self.has_limit():
            assert self.allowance is not None and self.allowance.num_completions is not None
            in_progress = {record.record_id: self.get_cost(record) for record in started}
            self.costs |= in_progress
            finished = {key: since or now for key, since in self.unseen.items() if key not in in_progress}
            self.unseen = dict.fromkeys(in_progress) | {
                k: since for k, since in finished.items() if now - since < _MAX_UNSEEN_S
            }
            self.costs = {key: self.costs[key] for key in self.unseen}
            self.remaining = self.allowance.num_completions - self.num_counted - sum(self.costs.values())
        else:
            self.unseen, self.costs = {}, {}
        self.report_hold()
        self.num_refused = 0

    def get_cost(self, record: Record) -> int:
        return self.num_completions if isinstance(record, Prompt) and is_rl_prompt(record) else 0

    def admit(self, record: Record) -> bool:
        """Return whether a prompt may be started now, and count it if it may."""
        if self.remaining is None or not is_held_kind(record):
            return True
        if self.remaining <= 0:
            self.num_refused += 1
            return False
        if len(self.unseen) >= self.max_pending:
            return False
        self.unseen[record.record_id], self.costs[record.record_id] = None, self.get_cost(record)
        self.remaining -= self.costs[record.record_id]
        return True

    # Reporting

    def report_hold(self) -> None:
        """Log when a hold begins and when it ends. A hold begins when a prompt is refused, and ends when there is no reason for it."""
        may_start = self.remaining is None or self.remaining > 0
        if not self.held_since and self.num_refused and not may_start:
            self.held_since = time.monotonic()
            self.num_holds += 1
            more = " (further holds have the level INFO, and are counted: charter_holds_total)" if self.num_holds == 1 else ""
            logger.log(self.get_log_level(), "respond holds new prompts: %s%s", self.get_reason(), more)
        elif self.held_since and may_start:
            held_s = time.monotonic() - self.held_since
            self.total_held_s += held_s
            self.held_since = 0.0
            logger.log(self.get_log_level(), "respond continues after %.0f s: %s", held_s, self.get_reason())

    def get_log_level(self) -> int:
        """Return the level of the lines about a hold. The first hold is always shown; a busy stream has one for each update."""
        return logging.WARNING if self.num_holds == 1 else logging.INFO

    def get_reason(self) -> str:
        """Return why prompts are held, or why they are not held."""
        if self.allowance is None:
            return "no training loop has limited it"
        if self.allowance.num_completions is None:
            return self.allowance.reason
        if not self.is_loop_running:
            return "no training loop runs"
        if self.allowance.phase in get_paused_phases(self.pauses):
            return f"{self.allowance.phase} is paused"
        return self.allowance.reason

    def find_hold(self) -> str | None:
        """Read the log, and return why a copy without own work holds new prompts. Return None if it does not."""
        self.refresh()
        self.set_pending([])
        return self.get_reason() if self.remaining is not None and self.remaining <= 0 else None

    def get_held_s(self) -> float:
        """Return the total time in seconds in which prompts were held."""
        return self.total_held_s + (time.monotonic() - self.held_since if self.held_since else 0.0)

    def close(self) -> None:
        if self.reader:
            self.reader.close()
            self.reader = None
