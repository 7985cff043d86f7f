"""`charter up` and `charter down`: an Apache Kafka for this machine, with Docker or from a folder with its jars."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.options import common_options

if TYPE_CHECKING:
    from engine.settings import Settings

COMPOSE_FILE = Path(__file__).parent.parent / "docker-compose.yml"
_STATE_FILENAME = "broker.json"
_START_TIMEOUT_S = 90.0
_POLL_INTERVAL_S = 0.2
_STOP_TIMEOUT_S = 30.0


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    default=9092,
    show_default=True,
    help="Where clients connect, on this machine only.",
)
@common_options
def up(settings: Settings, port: int) -> None:
    """Start an Apache Kafka on this machine.

    With Docker where it is, else from KAFKA_HOME (a folder with libs/*.jar and Java).

    Without either nothing is needed: everything runs on the embedded log in the data folder.

    \b
    Examples:
      charter up
      KAFKA_HOME=/opt/kafka charter up --port 19092
    """
    from engine.errors import UsageError

    folder = settings.folder / "kafka"
    if _has_docker() and COMPOSE_FILE.exists():
        _start_with_docker(port)
    elif home := _find_kafka_home():
        _start_from_jars(home, folder, port)
    else:
        raise UsageError(
            "there is nothing here to start Kafka with",
            "Docker does not answer, and KAFKA_HOME is not set to a folder with libs/*.jar (or there is no java)",
            "nothing is lost: without --bus everything runs on the embedded log; type: charter run",
        )
    click.echo(
        f"Kafka is up; use it with: --bus kafka://localhost:{port}    or: export CHARTER_BUS__ADDRESS=kafka://localhost:{port}"
    )


@click.command()
@common_options
def down(settings: Settings) -> None:
    """Stop the Kafka that `charter up` has started. Its data stays.

    \b
    Examples:
      charter down
    """
    from engine.errors import UsageError

    state = settings.folder / "kafka" / _STATE_FILENAME
    if state.exists():
        _stop_kafka_process(json.loads(state.read_text())["pid"])
        state.unlink()
    elif _has_docker() and COMPOSE_FILE.exists():
        subprocess.run(["docker", "compose", "-f", str(COMPOSE_FILE), "stop", "kafka"], check=True)
    else:
        raise UsageError("no Kafka was started from this data folder", f"there is no {state}", "to start one, type: charter up")
    click.echo("Kafka is down; its data stays")


def _has_docker() -> bool:
    """Whether a Docker engine answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0 and (
        subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    )


def _find_kafka_home() -> Path | None:
    home = Path(os.environ.get("KAFKA_HOME", ""))
    usable = os.environ.get("KAFKA_HOME") and shutil.which("java") and any((home / "libs").glob("kafka*.jar"))
    return home if usable else None


def _start_with_docker(port: int) -> None:
    environment = os.environ | {"CHARTER_KAFKA_PORT": str(port)}
    subprocess.run(["docker", "compose", "-f", str(COMPOSE_FILE), "up", "-d", "--wait", "kafka"], env=environment, check=True)


def _start_from_jars(home: Path, folder: Path, port: int) -> None:
    """One broker in the background, with its data in `folder`; returns when it answers."""
    from engine.errors import CharterError, UsageError

    state = folder / _STATE_FILENAME
    if state.exists() and _is_kafka_running(json.loads(state.read_text())["pid"]):
        raise UsageError(f"a Kafka runs already from {folder}", "one data folder has one", "to stop it, type: charter down")
    if _is_port_open(port):
        raise UsageError(
            f"something else listens on port {port}",
            "Kafka could not be reached there",
            "give another: charter up --port 19092",
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_server_properties(folder, port)
    java = ["java", "-Xmx512m", "-cp", f"{home.resolve()}/libs/*"]
    if not (folder / "data" / "meta.properties").exists():
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = [*java, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--config=server.properties"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with (folder / "broker.log").open("ab") as log:
        broker = subprocess.Popen(
            [*java, "kafka.Kafka", "server.properties"], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    state.write_text(json.dumps({"pid": broker.pid, "port": port}))
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _is_port_open(port):
        if broker.poll() is not None or time.monotonic() > deadline:
            raise CharterError(
                "Kafka did not start", f"its log says why: {folder / 'broker.log'}", "mend it, then type: charter up"
            )
        time.sleep(_POLL_INTERVAL_S)


def _write_server_properties(folder: Path, port: int) -> None:
    controller = port + 1
    path = folder / "server.properties"
    if path.exists() and (line := f"advertised.listeners=CLIENT://localhost:{port}") not in path.read_text().splitlines():
        from engine.errors import UsageError

        raise UsageError(f"the Kafka in {folder} has another port", f"{path} does not say {line}", "give the port it had")
    settings: dict[str, Any] = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@localhost:{controller}",
        "listeners": f"CLIENT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"CLIENT://localhost:{port}",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "CLIENT",
        "log.dirs": "data",
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
    }
    path.write_text("\n".join(f"{key}={value}" for key, value in settings.items()) + "\n")


def _is_port_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_kafka_running(pid: int) -> bool:
    """Whether this process still runs (and is no one else's: it must be a Kafka)."""
    found = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
    return b"kafka.Kafka" in found.stdout


def _stop_kafka_process(pid: int) -> None:
    if not _is_kafka_running(pid):
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while _is_kafka_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(_POLL_INTERVAL_S)


VERBS = (up, down)
