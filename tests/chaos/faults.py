"""Faults other than kills: paused processes, changing group membership, full disks, a locked database, hostile bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import engine.bus.kafka
from benchmarks.hop_quixstreams import make_response
from engine.bus import open_bus
from engine.bus.port import ProducerRecord
from engine.bus.read import read_values
from engine.host import Host
from engine.worker import ModelExecutor, Stage, Worker, to_producer_record
from schemas import ids
from schemas.codec import decode_record, encode_record
from schemas.records import ChatMessage, DeadLetter, Prompt, Record, Response
from schemas.topics import TOPICS
from tests.chaos.system import (
    SystemUnderTest,
    check_exactly_once,
    get_kafka_home,
    is_caught_up,
    require,
    wait_until,
    write_prompts,
)
from tests.support.kafka import Broker
from tests.support.waiting import HANG_S

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "8"}
_PROCESS_COMMANDS = (
    ("respond", "run", "--stage", "respond"),
    ("chains", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
)


# A commit that succeeds although its records were not written


def _make_prompt(text: str) -> Prompt:
    messages = [ChatMessage(role="user", content=text)]
    key = ids.compute_prompt_id(messages)
    return Prompt(record_id=key, prompt_id=key, run_id="r", stage="produce", messages=messages, source="chaos")


def _echo_prompts(records: list[Record]) -> list[list[Record]]:
    return [[make_response(record)] for record in records if isinstance(record, Prompt)]


@contextmanager
def _shorten_delivery_timeout(timeout_ms: int) -> Iterator[None]:
    """Set the producers' delivery timeout to `timeout_ms`, which is shorter than a broker's outage."""
    real = engine.bus.kafka.make_producer_options
    engine.bus.kafka.make_producer_options = lambda: (
        real() | {"delivery_timeout_ms": timeout_ms, "request_timeout_ms": timeout_ms // 2}
    )
    try:
        yield
    finally:
        engine.bus.kafka.make_producer_options = real


@contextmanager
def _kill_broker_in_transaction(broker: Broker, armed: threading.Event) -> Iterator[threading.Event]:
    """When armed, kill the broker after a transaction's records are sent and before their delivery is checked."""
    real, killed = engine.bus.kafka.require_delivered, threading.Event()

    def kill_then_require_delivered(producer: object, futures: list[object]) -> None:
        if futures and armed.is_set():
            armed.clear()
            broker.kill()
            killed.set()
        real(producer, futures)

    engine.bus.kafka.require_delivered = kill_then_require_delivered
    try:
        yield killed
    finally:
        engine.bus.kafka.require_delivered = real


def run_silent_commit(
    broker: Broker, num_outages: int, *, prompts_per_outage: int = 40, outage_s: float = 4.0
) -> Iterator[str]:
    """Kill the broker in mid-transaction, repeatedly, with a delivery timeout shorter than the outage."""
    armed, bus = threading.Event(), open_bus(f"kafka://{broker.address}", prefix=f"silent{time.time_ns()}.")
    bus.create_topics(list(TOPICS.values()))
    with _shorten_delivery_timeout(2000), _kill_broker_in_transaction(broker, armed) as killed:
        stage, admitting = Stage("respond", ("prompts",), ("responses",), 0, 8, _echo_prompts), threading.Event()
        worker = Worker(bus, stage, ModelExecutor("chaos"), run_id="r", instance="0", can_admit=admitting.is_set)
        with Host([worker]) as host:
            for number in range(num_outages):
                admitting.clear()
                bus.publish([to_producer_record(_make_prompt(f"{number} {n}")) for n in range(prompts_per_outage)])
                armed.set()
                admitting.set()
                wait_until(killed.is_set, "a transaction begins", interval_s=0.01)
                killed.clear()
                time.sleep(outage_s)  # the outage itself
                broker.start()
                expected = (number + 1) * prompts_per_outage
                wait_until(
                    lambda expected=expected: host.raise_if_failed() or worker.num_committed >= expected,
                    f"outage {number} is over",
                    interval_s=0.05,
                )
                yield f"outage {number + 1}: {worker.num_committed} records committed"
    texts = [decode_record(value, Response).completions[0].text for value in read_values(bus, "responses")]
    require(not read_values(bus, "dead-letters"), "there are dead letters")
    require(
        len(texts) == len(set(texts)) == num_outages * prompts_per_outage,
        f"{len(texts)} outputs, {len(set(texts))} distinct, of {expected}",
    )
    bus.close()


# Group membership


def run_zombie(folder: Path, address: str, *, prompts: int = 120, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """Stop an instance for longer than its session, let another do its work, and check that the first cannot commit."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with SystemUnderTest(
        folder / "world", address, _SETTING_FLAGS | {"worker.call_timeout_s": "300"}, prefix, batch_delay_s=0.3
    ) as system:
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        system.publish_file(path)
        wait_until(lambda: _count_responses(system) > 0, "the first instance works")
        system.start_process("another", "run", "--stage", "respond")
        system.processes["respond"].send_signal(signal.SIGSTOP)
        before = _count_responses(system)
        wait_until(
            lambda: system.count_finished_prompts() == prompts, "another instance does its work"
        )  # which implies that the first instance's session has expired
        yield f"stopped after {before} of {prompts}; the other instance has done the rest"
        system.processes["respond"].send_signal(signal.SIGCONT)
        system.stop_process("another")
        more = write_prompts(folder / "more", prompts // 4, 1, seed + 1)[0]
        system.publish_file(more)  # the first instance, or its restarted process, processes these
        expected = prompts + prompts // 4
        wait_until(
            lambda: not system.revive_process("respond") and system.count_finished_prompts() == expected,
            "the stopped instance continues",
        )
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, expected)


def _count_responses(system: SystemUnderTest) -> int:
    with system.connect_bus() as bus:
        return len(read_values(bus, "responses"))


def run_membership_storm(
    folder: Path, address: str, *, prompts: int, num_changes: int, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Start, stop and kill instances of the stages while prompts are processed. Between two changes there is progress."""
    rng = random.Random(seed)
    paths = write_prompts(folder / "prompts", prompts, 4, seed)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.05) as system:
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        copies = {"respond": _PROCESS_COMMANDS[0][1:], "chains": _PROCESS_COMMANDS[1][1:], "judge": _PROCESS_COMMANDS[2][1:]}
        for number in range(num_changes):
            if number * 4 // num_changes >= 4 - len(paths):
                system.publish_file(paths.pop(0))
            name = f"{rng.choice(list(copies))}-{rng.randrange(3)}"
            if name not in system.processes:
                system.start_process(name, *copies[name.split("-")[0]])
            elif rng.random() < 0.5:
                system.stop_process(name)
            else:
                system.kill_process(name)
                del system.processes[name]
            num_finished = rng.uniform(0, prompts / num_changes)
            _wait_for_progress(system, num_finished, prompts * (4 - len(paths)) // 4)
        yield f"{num_changes} changes of membership; {system.count_finished_prompts()} of {prompts} prompts are finished"
        while paths:
            system.publish_file(paths.pop(0))
        wait_until(lambda: system.count_finished_prompts() == prompts, "every prompt is finished and judged")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)


def _wait_for_progress(system: SystemUnderTest, num_more: float, num_published: int) -> None:
    """Wait until `num_more` more prompts are finished, or all published prompts."""
    target = min(system.count_finished_prompts() + num_more, num_published)
    wait_until(lambda: system.count_finished_prompts() >= target, "there is progress between two changes")


# Full disks and a locked database


@contextmanager
def _mount_small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a small tmpfs at `folder` and yield a function that resizes it; raise PermissionError if mounting is forbidden."""
    folder.mkdir(parents=True, exist_ok=True)
    _run_mount(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)])
    try:
        yield lambda size: _run_mount(["mount", "-o", f"remount,size={size}m", str(folder)])
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _run_mount(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


def run_full_sink_disk(
    folder: Path, address: str = "", *, prompts: int = 1000, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Fill the database's disk: the sink waits, the stages continue, and once the disk is larger every record arrives.

    The journals of the workers are on another disk: a stage waits if it cannot write there which records it begins.
    """
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = _SETTING_FLAGS | {"data.folder": str(folder / "small")} | ({} if address else {"bus.address": str(folder / "log")})
    with (
        _mount_small_disk(folder / "small", 4) as resize,
        SystemUnderTest(folder / "world", address, flags, prefix, batch_delay_s=0.0) as system,
    ):
        for name in ("instances", "journal", "services"):
            (folder / "world" / name).mkdir()
            (folder / "small" / name).symlink_to(folder / "world" / name)
        system.publish_file(path)
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        log = folder / "world" / "sink.log"
        wait_until(lambda: "is full" in log.read_text() or system.revive_process("sink"), "the disk is full")
        wait_until(lambda: _count_preferences(system) == prompts, "the stages continue")
        yield f"the disk is full at {system.count_finished_prompts()} of {prompts} prompts; the stages have continued"
        require(system.processes["sink"].poll() is None, f"the sink has ended: {system.read_log_tail('sink')}")
        resize(200)
        wait_until(lambda: system.count_finished_prompts() == prompts, "the sink continues without a restart")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)


def _count_preferences(system: SystemUnderTest) -> int:
    with system.connect_bus() as bus:
        return len(read_values(bus, "preferences"))


def run_full_log_disk(folder: Path, *, prompts: int = 400, seed: int = 0) -> Iterator[str]:
    """Fill the embedded log's disk: every process waits, and continues once the disk is larger."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = _SETTING_FLAGS | {"bus.address": str(folder / "log")}
    with (
        _mount_small_disk(folder / "log", 2) as resize,
        SystemUnderTest(folder / "world", setting_overrides=flags, batch_delay_s=0.0) as system,
    ):
        system.start_process("produce", "produce", str(path))
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        log = folder / "world" / "respond.log"
        wait_until(
            lambda: "is unreachable" in log.read_text() or "committed offsets again" in log.read_text(), "the disk is full"
        )
        yield f"the log's disk is full at {system.count_finished_prompts()} of {prompts} prompts"
        resize(200)
        wait_until(lambda: system.revive_process("produce"), "the producer continues")
        for name, *_ in _PROCESS_COMMANDS:
            system.revive_process(name)
        wait_until(lambda: system.count_finished_prompts() == prompts, "every prompt is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)
        yield from system.unexpected_exits


def run_full_broker_disk(folder: Path, *, prompts: int = 3000, seed: int = 0) -> Iterator[str]:
    """Fill the disk of the only broker, which then exits: every process waits until the broker restarts with a larger disk."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with ExitStack() as stack:
        resize = stack.enter_context(_mount_small_disk(folder / "small", 5))
        broker = stack.enter_context(Broker(get_kafka_home(), folder / "small"))
        system = stack.enter_context(
            SystemUnderTest(folder / "world", f"kafka://{broker.address}", _SETTING_FLAGS, batch_delay_s=0.0)
        )
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        system.start_process("produce", "produce", str(path))
        wait_until(lambda: bool(broker.process and broker.process.poll() is not None), "the broker's disk is full")
        yield f"the broker has ended at {system.count_finished_prompts()} of {prompts} prompts"
        resize(500)
        broker.start()
        wait_until(lambda: system.revive_process("produce"), "the producer continues")
        wait_until(
            lambda: (
                all(not system.revive_process(name) for name, *_ in _PROCESS_COMMANDS)
                and system.count_finished_prompts() == prompts
            ),
            "every prompt is finished",
        )
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)
        yield from system.unexpected_exits


def run_locked_database(
    folder: Path, address: str = "", *, prompts: int = 200, hold_s: float = 60.0, prefix: str = ""
) -> Iterator[str]:
    """Lock the database in another process under load: the sink waits and logs which process holds the lock."""
    paths = write_prompts(folder / "prompts", prompts, 2, 0)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.0) as system:
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        system.publish_file(paths[0])
        wait_until(lambda: system.count_finished_prompts() == prompts // 2, "the first half is stored")
        code = f"import duckdb, sys\ndb = duckdb.connect({str(system.open_store().path)!r})\nprint('held', flush=True)\nsys.stdin.read()"
        holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert holder.stdout and holder.stdin
            holder.stdout.readline()
            system.publish_file(paths[1])
            time.sleep(hold_s)  # the duration of the lock
            log_text = (folder / "world" / "sink.log").read_text()
            require(f"PID {holder.pid}" in log_text, f"the sink does not log which process holds the file: {log_text[-500:]}")
            yield f"held for {hold_s:.0f} s by process {holder.pid}; the sink logged its id"
            holder.stdin.close()
        finally:
            holder.wait(HANG_S)
        wait_until(lambda: system.count_finished_prompts() == prompts, "the second half is stored")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)


# An unreachable model server


class _FakeJudgeHandler(BaseHTTPRequestHandler):
    """A FAKE model server that always prefers option A in its log-probabilities."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        top = [{"token": "A", "logprob": -0.3}, {"token": "B", "logprob": -1.4}]
        choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": [{"top_logprobs": top}]}}
        data = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _serve_fake_judge(port: int = 0) -> Iterator[int]:
    """Run the fake server on a port of the loopback interface and yield the port."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _FakeJudgeHandler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_server_outage(
    folder: Path, address: str = "", *, prompts: int = 200, outage_s: float, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Stop the judge's model server under load: no dead letters, no losses, and the judge continues without a restart."""
    paths = write_prompts(folder / "prompts", prompts, 2, seed)
    with _serve_fake_judge() as port:
        flags = _SETTING_FLAGS | {
            "models.judge": f"http://127.0.0.1:{port}/v1#fake",
            "worker.max_consecutive_dead_letters": "10",
        }
        system = SystemUnderTest(folder / "world", address, flags, prefix, batch_delay_s=0.0)
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        system.publish_file(paths[0])
        wait_until(lambda: _count_preferences(system) > 0, "the judge works")
    with system:
        system.publish_file(paths[1])
        time.sleep(outage_s)  # the outage itself
        before = _count_preferences(system)
        require(not system.read_dead_letters(), "the outage has caused dead letters")
        require(system.processes["judge"].poll() is None, f"the judge has ended: {system.read_log_tail('judge')}")
        yield f"the server was down for {outage_s:.0f} s at {before} of {prompts} judgments; no dead letters"
        with _serve_fake_judge(port):
            wait_until(lambda: system.count_finished_prompts() == prompts, "the judge continues without a restart")
            wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        check_exactly_once(system, prompts)
        require(system.query_count("SELECT count(*) FROM preferences WHERE outcome <> 'OK'") == 0, "a label is missing")


# Hostile bytes


def _make_hostile_messages(count: int, seed: int) -> list[ProducerRecord]:
    """Return undecodable records: truncated, unknown schemas, huge lengths, not UTF-8, deeply nested, of another topic."""
    rng = random.Random(seed)
    good = encode_record(make_response(_make_prompt("a good one")))
    body = encode_record(_make_prompt("text that is long enough to be cut anywhere"))
    messages = []
    topics = ["prompts", "responses", "critiques", "revisions", "preferences"]
    while len(messages) < count:
        kind = rng.randrange(7)
        topic = rng.choice(topics)
        if kind == 0:
            value = body[: rng.randrange(len(body))]
        elif kind == 1:
            value = body[:2] + rng.randbytes(8) + body[10:]
        elif kind == 2:  # a length of up to 2**62
            value = body[:10] + bytes([0xFE] * rng.randrange(1, 9)) + b"\x7f" + body[20:]
        elif kind == 3:
            position = rng.randrange(60, len(body))
            value = body[:position] + b"\xff\xfe\xc0" + body[position + 3 :]
        elif kind == 4:
            value = b"[" * rng.randrange(1, 20_000)
        elif kind == 5:
            value, topic = good, "prompts"
        else:
            value = rng.randbytes(rng.randrange(0, 300))
        if not _is_record(value, topic):
            messages.append(ProducerRecord(topic, rng.randbytes(8), value))
    return messages


def _is_record(value: bytes, topic: str) -> bool:
    """Return whether the bytes happen to be a valid record of the topic."""
    from schemas.codec import RecordError

    try:
        decode_record(value, TOPICS[topic].record_class)
    except RecordError:
        return False
    return True


def run_hostile_bytes(
    folder: Path, address: str = "", *, num_messages: int, prompts: int = 20, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Check that each undecodable record gives one dead letter for each of its readers, and that valid prompts finish."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    messages = _make_hostile_messages(num_messages, seed)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.0) as system:
        system.publish_file(path)
        with system.connect_bus() as bus:
            for first in range(0, num_messages, 500):
                bus.publish(messages[first : first + 500])
        for name, *arguments in _PROCESS_COMMANDS:
            system.start_process(name, *arguments)
        sql = "SELECT count(*) FROM dead_letters WHERE stage = 'sink' AND kind = 'DECODE'"
        wait_until(
            lambda: _is_finished(system, prompts) and system.query_count(sql) == num_messages,
            "the sink has a dead letter for every hostile record",
        )
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        with system.connect_bus() as bus:
            dead_letters = [decode_record(value, DeadLetter) for value in read_values(bus, "dead-letters")]
        readers = {"prompts": 1, "responses": 2, "critiques": 1, "revisions": 1, "preferences": 0}
        expected = sum(readers[message.topic] for message in messages)
        require(len(dead_letters) == expected, f"{len(dead_letters)} dead letters of the stages, not {expected}")
        sources = {(d.stage, d.source_topic, d.source_partition, d.source_offset) for d in dead_letters}
        require(len(sources) == expected, "a record has two dead letters of one stage")
        originals = {message.value for message in messages if readers[message.topic]}
        require(
            {dead_letter.value for dead_letter in dead_letters} == originals, "a dead letter's bytes differ from the record's"
        )
        require(all(process.poll() is None for process in system.processes.values()), "a process has exited")
        yield f"{num_messages} hostile messages, {num_messages} dead letters of the sink, {expected} of the stages; {prompts} prompts done"


def _is_finished(system: SystemUnderTest, num_prompts: int) -> bool:
    return system.count_finished_prompts() == num_prompts
