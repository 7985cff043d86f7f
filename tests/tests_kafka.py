"""A throw-away Apache Kafka broker (KRaft, one node) on loopback, from a folder with libs/*.jar and a Java runtime."""

import os
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

import kafka
from kafka.errors import KafkaError

UP_WITHIN_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Broker:
    """Start on entering, stop on leaving; `kill` and `start` again in between keep the data."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.port, self.controller = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        (folder / "server.properties").write_text(self.properties())
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # With "=": one id in 64 begins with a dash and would be taken for an option.
        self.java("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--config=server.properties")

    def properties(self) -> str:
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller}",
            "listeners": f"CLIENT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self.controller}",
            "advertised.listeners": f"CLIENT://127.0.0.1:{self.port}",
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "CLIENT",
            "log.dirs": self.folder / "data",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 4,
            "group.initial.rebalance.delay.ms": 0,
            # A killed broker comes back under its old number only once its old session has ended.
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
        }
        return "\n".join(f"{key}={value}" for key, value in settings.items())

    def command(self, *arguments: str) -> list[str]:
        return ["java", "-Xmx512m", "-XX:+UseSerialGC", "-cp", f"{self.home}/libs/*", *arguments]

    def java(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), cwd=self.folder, check=True, capture_output=True)

    def start(self) -> None:
        log = (self.folder / "broker.log").open("ab")
        self.process = subprocess.Popen(
            self.command("kafka.Kafka", "server.properties"), cwd=self.folder, stdout=log, stderr=log
        )
        deadline = time.monotonic() + UP_WITHIN_S
        while True:
            try:
                kafka.KafkaConsumer(bootstrap_servers=self.address, bootstrap_timeout_ms=2000).close()
                return
            except (KafkaError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise

    def kill(self) -> None:
        assert self.process
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
