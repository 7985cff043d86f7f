"""The other ways in which things break: paused processes, members that come and go, full disks, held files, hostile bytes."""

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

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "8"}
_PROCESS_COMMANDS = (
    ("respond", "run", "--stage", "respond"),
    ("chains", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
)


# The commit that says yes although nothing was written


def _make_prompt(text: str) -> Prompt:
    messages = [ChatMessage(role="user", content=text)]
    key = ids.compute_prompt_id(messages)
    return Prompt(record_id=key, prompt_id=key, run_id="r", stage="produce", messages=messages, source="chaos")


def _echo_prompts(records: list[Record]) -> list[list[Record]]:
    return [[make_response(record)] for record in records if isinstance(record, Prompt)]


@contextmanager
def _shorten_delivery_timeout(timeout_ms: int) -> Iterator[None]:
    """Producers give up on a batch after `ms`, which is less than a broker's outage."""
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
    """When armed, the broker dies after a transaction's messages were sent, before anyone has looked whether they arrived."""
    real, dead = engine.bus.kafka.require_delivered, threading.Event()

    def settled(producer: object, futures: list[object]) -> None:
        if futures and armed.is_set():
            armed.clear()
            broker.kill()
            dead.set()
        real(producer, futures)

    engine.bus.kafka.require_delivered = settled
    try:
        yield dead
    finally:
        engine.bus.kafka.require_delivered = real


def run_silent_commit(
    broker: Broker, num_outages: int, *, prompts_per_outage: int = 40, outage_s: float = 4.0
) -> Iterator[str]:
    """Kill the broker in mid-transaction with a delivery timeout shorter than the outage, again and again."""
    armed, bus = threading.Event(), open_bus(f"kafka://{broker.address}", prefix=f"silent{time.time_ns()}.")
    bus.create_topics(list(TOPICS.values()))
    with _shorten_delivery_timeout(2000), _kill_broker_in_transaction(broker, armed) as dead:
        stage, begun = Stage("respond", ("prompts",), ("responses",), 0, 8, _echo_prompts), threading.Event()
        worker = Worker(bus, stage, ModelExecutor("chaos"), run_id="r", instance="0", can_admit=begun.is_set)
        with Host([worker]) as host:
            for number in range(num_outages):
                begun.clear()
                bus.publish([to_producer_record(_make_prompt(f"{number} {n}")) for n in range(prompts_per_outage)])
                armed.set()
                begun.set()
                wait_until(dead.is_set, "a transaction begins", interval_s=0.01)
                dead.clear()
                time.sleep(outage_s)  # the outage itself
                broker.start()
                wanted = (number + 1) * prompts_per_outage
                wait_until(lambda wanted=wanted: worker.num_committed >= wanted, f"outage {number} is over", interval_s=0.05)
                host.raise_if_failed()
                yield f"outage {number + 1}: {worker.num_committed} passed"
    found = [decode_record(value, Response).completions[0].text for value in read_values(bus, "responses")]
    require(not read_values(bus, "dead-letters"), "there are dead letters")
    require(
        len(found) == len(set(found)) == num_outages * prompts_per_outage,
        f"{len(found)} outputs, {len(set(found))} different, of {wanted}",
    )
    bus.close()


# Members that pause, come and go


def run_zombie(folder: Path, address: str, *, prompts: int = 120, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """A copy that is stopped for longer than its session, and wakes when another has done its work, cannot commit."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with SystemUnderTest(
        folder / "world", address, _SETTING_FLAGS | {"worker.call_timeout_s": "300"}, prefix, batch_delay_s=0.3
    ) as world:
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        world.publish_file(path)
        wait_until(lambda: _count_responses(world) > 0, "the first copy works")
        world.start_process("another", "run", "--stage", "respond")
        world.processes["respond"].send_signal(signal.SIGSTOP)
        before = _count_responses(world)
        wait_until(
            lambda: world.count_finished_prompts() == prompts, "another copy does its work"
        )  # that is: the first one's session is over
        yield f"stopped after {before} of {prompts}; the other copy has done the rest"
        world.processes["respond"].send_signal(signal.SIGCONT)
        world.stop_process("another")
        more = write_prompts(folder / "more", prompts // 4, 1, seed + 1)[0]
        world.publish_file(more)  # and it, or what a supervisor starts in its place, goes on
        wanted = prompts + prompts // 4
        wait_until(
            lambda: not world.revive_process("respond") and world.count_finished_prompts() == wanted, "the woken copy goes on"
        )
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, wanted)


def _count_responses(system: SystemUnderTest) -> int:
    with system.connect_bus() as bus:
        return len(read_values(bus, "responses"))


def run_membership_storm(
    folder: Path, address: str, *, prompts: int, num_changes: int, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Copies of the stages join and leave, politely or not, every few seconds while work goes on."""
    chance = random.Random(seed)
    paths = write_prompts(folder / "prompts", prompts, 4, seed)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.05) as world:
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        copies = {"respond": _PROCESS_COMMANDS[0][1:], "chains": _PROCESS_COMMANDS[1][1:], "judge": _PROCESS_COMMANDS[2][1:]}
        for number in range(num_changes):
            if number * 4 // num_changes >= 4 - len(paths):
                world.publish_file(paths.pop(0))
            name = f"{chance.choice(list(copies))}-{chance.randrange(3)}"
            if name not in world.processes:
                world.start_process(name, *copies[name.split("-")[0]])
            elif chance.random() < 0.5:
                world.stop_process(name)
            else:
                world.kill_process(name)
                del world.processes[name]
            time.sleep(chance.uniform(0.5, 2.5))  # the rhythm of the changes
        yield f"{num_changes} changes of membership; {world.count_finished_prompts()} of {prompts} prompts are ended"
        while paths:
            world.publish_file(paths.pop(0))
        wait_until(lambda: world.count_finished_prompts() == prompts, "every prompt is ended and judged")
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)


# Storage


@contextmanager
def _mount_small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A small file system at `folder`, and a function that changes its size; raises PermissionError if that is not allowed."""
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
    """The database's disk fills up: the sink waits, the stages go on, and with more room everything arrives."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = _SETTING_FLAGS | {"data.folder": str(folder / "small")} | ({} if address else {"bus.address": str(folder / "log")})
    with (
        _mount_small_disk(folder / "small", 4) as resize,
        SystemUnderTest(folder / "world", address, flags, prefix, batch_delay_s=0.0) as world,
    ):
        world.publish_file(path)
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        log = folder / "world" / "sink.log"
        wait_until(lambda: "is full" in log.read_text() or world.revive_process("sink"), "the disk is full")
        wait_until(lambda: _count_preferences(world) == prompts, "the stages go on")
        yield f"the disk is full at {world.count_finished_prompts()} of {prompts} prompts; the stages have gone on"
        require(world.processes["sink"].poll() is None, f"the sink has ended: {world.read_log_tail('sink')}")
        resize(200)
        wait_until(lambda: world.count_finished_prompts() == prompts, "the sink goes on by itself")
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)


def _count_preferences(system: SystemUnderTest) -> int:
    with system.connect_bus() as bus:
        return len(read_values(bus, "preferences"))


def run_full_log_disk(folder: Path, *, prompts: int = 400, seed: int = 0) -> Iterator[str]:
    """The embedded log's disk fills up: everybody waits, and with more room everything goes on."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = _SETTING_FLAGS | {"bus.address": str(folder / "log")}
    with (
        _mount_small_disk(folder / "log", 2) as resize,
        SystemUnderTest(folder / "world", setting_overrides=flags, batch_delay_s=0.0) as world,
    ):
        world.start_process("produce", "produce", str(path))
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        log = folder / "world" / "respond.log"
        wait_until(
            lambda: "is unreachable" in log.read_text() or "committed offsets again" in log.read_text(), "the disk is full"
        )
        yield f"the log's disk is full at {world.count_finished_prompts()} of {prompts} prompts"
        resize(200)
        wait_until(lambda: world.revive_process("produce"), "the producer goes on")
        for name, *_ in _PROCESS_COMMANDS:
            world.revive_process(name)
        wait_until(lambda: world.count_finished_prompts() == prompts, "everything goes on")
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)
        yield from world.unexpected_exits


def run_full_broker_disk(folder: Path, *, prompts: int = 3000, seed: int = 0) -> Iterator[str]:
    """The disk of the only broker fills up, and the broker gives up: everybody waits until it is back with more room."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with ExitStack() as stack:
        resize = stack.enter_context(_mount_small_disk(folder / "small", 5))
        broker = stack.enter_context(Broker(get_kafka_home(), folder / "small"))
        world = stack.enter_context(
            SystemUnderTest(folder / "world", f"kafka://{broker.address}", _SETTING_FLAGS, batch_delay_s=0.0)
        )
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        world.start_process("produce", "produce", str(path))
        wait_until(lambda: bool(broker.process and broker.process.poll() is not None), "the broker's disk is full")
        yield f"the broker has ended at {world.count_finished_prompts()} of {prompts} prompts"
        resize(500)
        broker.start()
        wait_until(lambda: world.revive_process("produce"), "the producer goes on")
        wait_until(
            lambda: (
                all(not world.revive_process(name) for name, *_ in _PROCESS_COMMANDS)
                and world.count_finished_prompts() == prompts
            ),
            "everything goes on",
        )
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)
        yield from world.unexpected_exits


def run_locked_database(
    folder: Path, address: str = "", *, prompts: int = 200, hold_s: float = 60.0, prefix: str = ""
) -> Iterator[str]:
    """Another program holds the database for a minute while work goes on: the sink waits and says who it is."""
    paths = write_prompts(folder / "prompts", prompts, 2, 0)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.0) as world:
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        world.publish_file(paths[0])
        wait_until(lambda: world.count_finished_prompts() == prompts // 2, "the first half is in")
        code = f"import duckdb, sys\ndb = duckdb.connect({str(world.open_store().path)!r})\nprint('held', flush=True)\nsys.stdin.read()"
        holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert holder.stdout and holder.stdin
            holder.stdout.readline()
            world.publish_file(paths[1])
            time.sleep(hold_s)  # the failure itself
            said = (folder / "world" / "sink.log").read_text()
            require(f"PID {holder.pid}" in said, f"the sink does not say who holds the file: {said[-500:]}")
            yield f"held for {hold_s:.0f} s by process {holder.pid}, which the sink names"
            holder.stdin.close()
        finally:
            holder.wait(10)
        wait_until(lambda: world.count_finished_prompts() == prompts, "the second half comes in")
        wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)


# A model server that goes away


class _FakeJudgeHandler(BaseHTTPRequestHandler):
    """A FAKE model server: it always prefers A, and says so in log-probabilities."""

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
    """The fake server, on a port of the loopback."""
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
    """The judge's model server is away for a while under load: no dead letter, nothing lost, and work goes on by itself."""
    paths = write_prompts(folder / "prompts", prompts, 2, seed)
    with _serve_fake_judge() as port:
        flags = _SETTING_FLAGS | {
            "models.judge": f"http://127.0.0.1:{port}/v1#fake",
            "worker.max_consecutive_dead_letters": "10",
        }
        world = SystemUnderTest(folder / "world", address, flags, prefix, batch_delay_s=0.0)
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        world.publish_file(paths[0])
        wait_until(lambda: _count_preferences(world) > 0, "the judge works")
    with world:
        world.publish_file(paths[1])
        time.sleep(outage_s)  # the outage itself
        before = _count_preferences(world)
        require(not world.read_dead_letters(), "the outage has made dead letters")
        require(world.processes["judge"].poll() is None, f"the judge has ended: {world.read_log_tail('judge')}")
        yield f"the server was away for {outage_s:.0f} s at {before} of {prompts} judgements; no dead letter"
        with _serve_fake_judge(port):
            wait_until(lambda: world.count_finished_prompts() == prompts, "the judge goes on by itself")
            wait_until(lambda: is_caught_up(world), "everything is read")
        check_exactly_once(world, prompts)
        require(world.query_count("SELECT count(*) FROM preferences WHERE outcome <> 'OK'") == 0, "a label is missing")


# Hostile bytes


def _make_hostile_messages(count: int, seed: int) -> list[ProducerRecord]:
    """Messages that are no records: cut, unknown, huge by their own account, not UTF-8, deeply nested, of another topic."""
    chance = random.Random(seed)
    good = encode_record(make_response(_make_prompt("a good one")))
    body = encode_record(_make_prompt("text that is long enough to be cut anywhere"))
    made = []
    topics = ["prompts", "responses", "critiques", "revisions", "preferences"]
    while len(made) < count:
        kind = chance.randrange(7)
        topic = chance.choice(topics)
        if kind == 0:
            value = body[: chance.randrange(len(body))]
        elif kind == 1:
            value = body[:2] + chance.randbytes(8) + body[10:]
        elif kind == 2:  # a length of up to 2**62
            value = body[:10] + bytes([0xFE] * chance.randrange(1, 9)) + b"\x7f" + body[20:]
        elif kind == 3:
            place = chance.randrange(60, len(body))
            value = body[:place] + b"\xff\xfe\xc0" + body[place + 3 :]
        elif kind == 4:
            value = b"[" * chance.randrange(1, 20_000)
        elif kind == 5:
            value, topic = good, "prompts"
        else:
            value = chance.randbytes(chance.randrange(0, 300))
        if not _is_record(value, topic):
            made.append(ProducerRecord(topic, chance.randbytes(8), value))
    return made


def _is_record(value: bytes, topic: str) -> bool:
    """Whether the bytes happen to be a record all the same."""
    from schemas.codec import RecordError

    try:
        decode_record(value, TOPICS[topic].record_class)
    except RecordError:
        return False
    return True


def run_hostile_bytes(
    folder: Path, address: str = "", *, num_messages: int, prompts: int = 20, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Every message that is no record is accounted for by a dead letter of each reader, and the good ones go through."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    messages = _make_hostile_messages(num_messages, seed)
    with SystemUnderTest(folder / "world", address, _SETTING_FLAGS, prefix, batch_delay_s=0.0) as world:
        world.publish_file(path)
        with world.connect_bus() as bus:
            for first in range(0, num_messages, 500):
                bus.publish(messages[first : first + 500])
        for name, *arguments in _PROCESS_COMMANDS:
            world.start_process(name, *arguments)
        sql = "SELECT count(*) FROM dead_letters WHERE stage = 'sink' AND kind = 'DECODE'"
        wait_until(
            lambda: _is_finished(world, prompts) and world.query_count(sql) == num_messages,
            "everything is accounted for by the sink",
            300,
        )
        wait_until(lambda: is_caught_up(world), "everything is read")
        with world.connect_bus() as bus:
            letters = [decode_record(value, DeadLetter) for value in read_values(bus, "dead-letters")]
        readers = {"prompts": 1, "responses": 2, "critiques": 1, "revisions": 1, "preferences": 0}
        wanted = sum(readers[message.topic] for message in messages)
        require(len(letters) == wanted, f"{len(letters)} dead letters of the stages, not {wanted}")
        places = {(letter.stage, letter.source_topic, letter.source_partition, letter.source_offset) for letter in letters}
        require(len(places) == wanted, "a message has two dead letters of one stage")
        originals = {message.value for message in messages if readers[message.topic]}
        require({letter.value for letter in letters} == originals, "a dead letter has other bytes than came")
        require(all(process.poll() is None for process in world.processes.values()), "a process has ended")
        yield f"{num_messages} hostile messages, {num_messages} dead letters of the sink, {wanted} of the stages; {prompts} prompts done"


def _is_finished(system: SystemUnderTest, num_prompts: int) -> bool:
    return system.count_finished_prompts() == num_prompts
