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
from benchmarks.hop_quixstreams import answer
from engine.bus import open_bus
from engine.bus.port import Outgoing
from engine.bus.read import read_values
from engine.host import Host
from engine.worker import Lane, Stage, Worker, outgoing
from schemas import ids
from schemas.codec import decode, encode
from schemas.records import ChatMessage, DeadLetter, Prompt, Record, Response
from schemas.topics import TOPICS
from tests.chaos.world import World, check, check_exactly_once, kafka_home, quiet, until, write_prompts
from tests.support.kafka import Broker

FLAGS = {"critique.rounds": "1", "respond.samples": "2", "models.max_rows": "8"}
PARTS = (
    ("respond", "run", "--stage", "respond"),
    ("chains", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
)


# The commit that says yes although nothing was written


def prompt(text: str) -> Prompt:
    messages = [ChatMessage(role="user", content=text)]
    key = ids.prompt_id(messages)
    return Prompt(record_id=key, prompt_id=key, run_id="r", stage="produce", messages=messages, source="chaos")


def echo(records: list[Record]) -> list[list[Record]]:
    return [[answer(record)] for record in records if isinstance(record, Prompt)]


@contextmanager
def short_delivery(ms: int) -> Iterator[None]:
    """Producers give up on a batch after `ms`, which is less than a broker's outage."""
    real = engine.bus.kafka.writing
    engine.bus.kafka.writing = lambda: real() | {"delivery_timeout_ms": ms, "request_timeout_ms": ms // 2}
    try:
        yield
    finally:
        engine.bus.kafka.writing = real


@contextmanager
def killed_in_mid_transaction(broker: Broker, armed: threading.Event) -> Iterator[threading.Event]:
    """When armed, the broker dies after a transaction's messages were sent, before anyone has looked whether they arrived."""
    real, dead = engine.bus.kafka.settled, threading.Event()

    def settled(producer: object, futures: list[object]) -> None:
        if futures and armed.is_set():
            armed.clear()
            broker.kill()
            dead.set()
        real(producer, futures)

    engine.bus.kafka.settled = settled
    try:
        yield dead
    finally:
        engine.bus.kafka.settled = real


def silent_commit(broker: Broker, times: int, *, per_time: int = 40, outage_s: float = 4.0) -> Iterator[str]:
    """Kill the broker in mid-transaction with a delivery timeout shorter than the outage, again and again."""
    armed, bus = threading.Event(), open_bus(f"kafka://{broker.address}", prefix=f"silent{time.time_ns()}.")
    bus.create_topics(list(TOPICS.values()))
    with short_delivery(2000), killed_in_mid_transaction(broker, armed) as dead:
        stage, begun = Stage("respond", ("prompts",), ("responses",), 0, 8, echo), threading.Event()
        worker = Worker(bus, stage, Lane("chaos"), run_id="r", slot="0", admits=begun.is_set)
        with Host([worker]) as host:
            for number in range(times):
                begun.clear()
                bus.publish([outgoing(prompt(f"{number} {n}")) for n in range(per_time)])
                armed.set()
                begun.set()
                until(dead.is_set, "a transaction begins", every_s=0.01)
                dead.clear()
                time.sleep(outage_s)  # the outage itself
                broker.start()
                wanted = (number + 1) * per_time
                until(lambda wanted=wanted: worker.committed >= wanted, f"outage {number} is over", every_s=0.05)
                host.check()
                yield f"outage {number + 1}: {worker.committed} passed"
    found = [decode(value, Response).completions[0].text for value in read_values(bus, "responses")]
    check(not read_values(bus, "dead-letters"), "there are dead letters")
    check(len(found) == len(set(found)) == times * per_time, f"{len(found)} outputs, {len(set(found))} different, of {wanted}")
    bus.close()


# Members that pause, come and go


def zombie(folder: Path, address: str, *, prompts: int = 120, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """A copy that is stopped for longer than its session, and wakes when another has done its work, cannot commit."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with World(folder / "world", address, FLAGS | {"worker.hang_s": "300"}, prefix, batch_s=0.3) as world:
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        world.produce(path)
        until(lambda: answered(world) > 0, "the first copy works")
        world.start("another", "run", "--stage", "respond")
        world.processes["respond"].send_signal(signal.SIGSTOP)
        before = answered(world)
        until(lambda: world.ended() == prompts, "another copy does its work")  # that is: the first one's session is over
        yield f"stopped after {before} of {prompts}; the other copy has done the rest"
        world.processes["respond"].send_signal(signal.SIGCONT)
        world.stop("another")
        more = write_prompts(folder / "more", prompts // 4, 1, seed + 1)[0]
        world.produce(more)  # and it, or what a supervisor starts in its place, goes on
        wanted = prompts + prompts // 4
        until(lambda: not world.revive("respond") and world.ended() == wanted, "the woken copy goes on")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, wanted)


def answered(world: World) -> int:
    with world.bus() as bus:
        return len(read_values(bus, "responses"))


def storm(folder: Path, address: str, *, prompts: int, changes: int, seed: int = 0, prefix: str = "") -> Iterator[str]:
    """Copies of the stages join and leave, politely or not, every few seconds while work goes on."""
    chance = random.Random(seed)
    paths = write_prompts(folder / "prompts", prompts, 4, seed)
    with World(folder / "world", address, FLAGS, prefix, batch_s=0.05) as world:
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        copies = {"respond": PARTS[0][1:], "chains": PARTS[1][1:], "judge": PARTS[2][1:]}
        for number in range(changes):
            if number * 4 // changes >= 4 - len(paths):
                world.produce(paths.pop(0))
            name = f"{chance.choice(list(copies))}-{chance.randrange(3)}"
            if name not in world.processes:
                world.start(name, *copies[name.split("-")[0]])
            elif chance.random() < 0.5:
                world.stop(name)
            else:
                world.kill(name)
                del world.processes[name]
            time.sleep(chance.uniform(0.5, 2.5))  # the rhythm of the changes
        yield f"{changes} changes of membership; {world.ended()} of {prompts} prompts are ended"
        while paths:
            world.produce(paths.pop(0))
        until(lambda: world.ended() == prompts, "every prompt is ended and judged")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)


# Storage


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A small file system at `folder`, and a function that changes its size; raises PermissionError if that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)])
    try:
        yield lambda size: mount(["mount", "-o", f"remount,size={size}m", str(folder)])
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


def full_disk_of_the_sink(
    folder: Path, address: str = "", *, prompts: int = 1000, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """The database's disk fills up: the sink waits, the stages go on, and with more room everything arrives."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = FLAGS | {"data.folder": str(folder / "small")} | ({} if address else {"bus.address": str(folder / "log")})
    with small_disk(folder / "small", 4) as resize, World(folder / "world", address, flags, prefix, batch_s=0.0) as world:
        world.produce(path)
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        log = folder / "world" / "sink.log"
        until(lambda: "is full" in log.read_text() or world.revive("sink"), "the disk is full")
        until(lambda: judged(world) == prompts, "the stages go on")
        yield f"the disk is full at {world.ended()} of {prompts} prompts; the stages have gone on"
        check(world.processes["sink"].poll() is None, f"the sink has ended: {world.last_words('sink')}")
        resize(200)
        until(lambda: world.ended() == prompts, "the sink goes on by itself")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)


def judged(world: World) -> int:
    with world.bus() as bus:
        return len(read_values(bus, "preferences"))


def full_disk_of_the_log(folder: Path, *, prompts: int = 400, seed: int = 0) -> Iterator[str]:
    """The embedded log's disk fills up: everybody waits, and with more room everything goes on."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    flags = FLAGS | {"bus.address": str(folder / "log")}
    with small_disk(folder / "log", 2) as resize, World(folder / "world", flags=flags, batch_s=0.0) as world:
        world.start("produce", "produce", str(path))
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        log = folder / "world" / "respond.log"
        until(lambda: "does not answer" in log.read_text() or "in doubt" in log.read_text(), "the disk is full")
        yield f"the log's disk is full at {world.ended()} of {prompts} prompts"
        resize(200)
        until(lambda: world.revive("produce"), "the producer goes on")
        for name, *_ in PARTS:
            world.revive(name)
        until(lambda: world.ended() == prompts, "everything goes on")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)
        yield from world.endings


def full_disk_of_a_broker(folder: Path, *, prompts: int = 3000, seed: int = 0) -> Iterator[str]:
    """The disk of the only broker fills up, and the broker gives up: everybody waits until it is back with more room."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    with ExitStack() as stack:
        resize = stack.enter_context(small_disk(folder / "small", 5))
        broker = stack.enter_context(Broker(kafka_home(), folder / "small"))
        world = stack.enter_context(World(folder / "world", f"kafka://{broker.address}", FLAGS, batch_s=0.0))
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        world.start("produce", "produce", str(path))
        until(lambda: bool(broker.process and broker.process.poll() is not None), "the broker's disk is full")
        yield f"the broker has ended at {world.ended()} of {prompts} prompts"
        resize(500)
        broker.start()
        until(lambda: world.revive("produce"), "the producer goes on")
        until(lambda: all(not world.revive(name) for name, *_ in PARTS) and world.ended() == prompts, "everything goes on")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)
        yield from world.endings


def held_file(folder: Path, address: str = "", *, prompts: int = 200, held_s: float = 60.0, prefix: str = "") -> Iterator[str]:
    """Another program holds the database for a minute while work goes on: the sink waits and says who it is."""
    paths = write_prompts(folder / "prompts", prompts, 2, 0)
    with World(folder / "world", address, FLAGS, prefix, batch_s=0.0) as world:
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        world.produce(paths[0])
        until(lambda: world.ended() == prompts // 2, "the first half is in")
        code = (
            f"import duckdb, sys\ndb = duckdb.connect({str(world.store().path)!r})\nprint('held', flush=True)\nsys.stdin.read()"
        )
        holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert holder.stdout and holder.stdin
            holder.stdout.readline()
            world.produce(paths[1])
            time.sleep(held_s)  # the failure itself
            said = (folder / "world" / "sink.log").read_text()
            check(f"PID {holder.pid}" in said, f"the sink does not say who holds the file: {said[-500:]}")
            yield f"held for {held_s:.0f} s by process {holder.pid}, which the sink names"
            holder.stdin.close()
        finally:
            holder.wait(10)
        until(lambda: world.ended() == prompts, "the second half comes in")
        until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)


# A model server that goes away


class FakeJudge(BaseHTTPRequestHandler):
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
def serving(port: int = 0) -> Iterator[int]:
    """The fake server, on a port of the loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", port), FakeJudge)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def server_down(
    folder: Path, address: str = "", *, prompts: int = 200, down_s: float, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """The judge's model server is away for a while under load: no dead letter, nothing lost, and work goes on by itself."""
    paths = write_prompts(folder / "prompts", prompts, 2, seed)
    with serving() as port:
        flags = FLAGS | {"models.judge": f"http://127.0.0.1:{port}/v1#fake", "worker.dead_in_a_row": "10"}
        world = World(folder / "world", address, flags, prefix, batch_s=0.0)
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        world.produce(paths[0])
        until(lambda: judged(world) > 0, "the judge works")
    with world:
        world.produce(paths[1])
        time.sleep(down_s)  # the outage itself
        before = judged(world)
        check(not world.letters(), "the outage has made dead letters")
        check(world.processes["judge"].poll() is None, f"the judge has ended: {world.last_words('judge')}")
        yield f"the server was away for {down_s:.0f} s at {before} of {prompts} judgements; no dead letter"
        with serving(port):
            until(lambda: world.ended() == prompts, "the judge goes on by itself")
            until(lambda: quiet(world), "everything is read")
        check_exactly_once(world, prompts)
        check(world.count("SELECT count(*) FROM preferences WHERE outcome <> 'OK'") == 0, "a label is missing")


# Hostile bytes


def fuzzed(count: int, seed: int) -> list[Outgoing]:
    """Messages that are no records: cut, unknown, huge by their own account, not UTF-8, deeply nested, of another topic."""
    chance = random.Random(seed)
    good = encode(answer(prompt("a good one")))
    body = encode(prompt("text that is long enough to be cut anywhere"))
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
        if not readable(value, topic):
            made.append(Outgoing(topic, chance.randbytes(8), value))
    return made


def readable(value: bytes, topic: str) -> bool:
    """Whether the bytes happen to be a record all the same."""
    from schemas.codec import RecordError

    try:
        decode(value, TOPICS[topic].record)
    except RecordError:
        return False
    return True


def hostile_bytes(
    folder: Path, address: str = "", *, count: int, prompts: int = 20, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Every message that is no record is accounted for by a dead letter of each reader, and the good ones go through."""
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    messages = fuzzed(count, seed)
    with World(folder / "world", address, FLAGS, prefix, batch_s=0.0) as world:
        world.produce(path)
        with world.bus() as bus:
            for first in range(0, count, 500):
                bus.publish(messages[first : first + 500])
        for name, *arguments in PARTS:
            world.start(name, *arguments)
        sql = "SELECT count(*) FROM dead_letters WHERE stage = 'sink' AND kind = 'DECODE'"
        until(lambda: ended(world, prompts) and world.count(sql) == count, "everything is accounted for by the sink", 300)
        until(lambda: quiet(world), "everything is read")
        with world.bus() as bus:
            letters = [decode(value, DeadLetter) for value in read_values(bus, "dead-letters")]
        readers = {"prompts": 1, "responses": 2, "critiques": 1, "revisions": 1, "preferences": 0}
        wanted = sum(readers[message.topic] for message in messages)
        check(len(letters) == wanted, f"{len(letters)} dead letters of the stages, not {wanted}")
        places = {(letter.stage, letter.source_topic, letter.source_partition, letter.source_offset) for letter in letters}
        check(len(places) == wanted, "a message has two dead letters of one stage")
        originals = {message.value for message in messages if readers[message.topic]}
        check({letter.value for letter in letters} == originals, "a dead letter has other bytes than came")
        check(all(process.poll() is None for process in world.processes.values()), "a process has ended")
        yield f"{count} hostile messages, {count} dead letters of the sink, {wanted} of the stages; {prompts} prompts done"


def ended(world: World, prompts: int) -> bool:
    return world.ended() == prompts
