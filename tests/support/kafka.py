"""A temporary Apache Kafka (KRaft) on the loopback interface, from a folder with libs/*.jar and a Java runtime."""

import os
import random
import re
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import kafka
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from tests.support.credentials import ClientCertificates, TokenIssuer
from tests.support.shared import start_once
from tests.support.waiting import HANG_S

_POLL_INTERVAL_S = 0.2
# Settings of every broker that nobody has configured. A new group waits three seconds for more members, and a client that asks
# for an unknown topic may create it. `Broker` has other settings, to save time and to find clients that create topics.
DEFAULT_SETTINGS = {"group.initial.rebalance.delay.ms": 3000, "auto.create.topics.enable": "true"}


def find_free_port() -> int:
    """Return a free port below the range of outgoing connections, so that a restarted broker still finds its port free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Broker:
    """A broker as a context manager. `kill` followed by `start` keeps the data.

    A single broker, or node `node_id` of a cluster; `controller_ports` then holds the controller port of every node.
    `settings` override the broker settings below.
    """

    # Without the slower and better of the two compilers: it would use more time in short tests than it saves.
    JAVA_OPTIONS: tuple[str, ...] = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

    def __init__(
        self,
        kafka_home: Path,
        folder: Path,
        node_id: int = 1,
        controller_ports: dict[int, int] | None = None,
        cluster_id: str = "",
        settings: dict[str, object] | None = None,
    ) -> None:
        self.settings = settings or {}
        self.kafka_home, self.folder, self.node_id = kafka_home, folder, node_id
        self.port = find_free_port()
        self.controller_ports = controller_ports or {node_id: find_free_port()}
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        (folder / "server.properties").write_text(self.build_properties())
        # With "=": one id in 64 begins with a dash, which would be parsed as an option.
        cluster_option = f"--cluster-id={cluster_id or _generate_cluster_id()}"
        self.run_java(
            "kafka.tools.StorageTool", "format", cluster_option, "--config=server.properties", *self.build_user_arguments()
        )

    def build_user_arguments(self) -> list[str]:
        """Return the arguments of `kafka.tools.StorageTool format` that create users."""
        return []

    def build_client_settings(self) -> dict[str, object]:
        """Return the options with which kafka-python connects to the broker."""
        return {"bootstrap_servers": self.address}

    def build_properties(self) -> str:
        replicas = min(3, len(self.controller_ports))
        in_sync = max(1, replicas - 1)
        controller = self.controller_ports[self.node_id]
        settings = {
            "process.roles": "broker,controller",
            "node.id": self.node_id,
            "controller.quorum.voters": ",".join(f"{node}@127.0.0.1:{port}" for node, port in self.controller_ports.items()),
            "listeners": f"CLIENT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"CLIENT://127.0.0.1:{self.port}",
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "CLIENT",
            "log.dirs": self.folder / "data",
            "auto.create.topics.enable": "false",
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": 4,
            "group.initial.rebalance.delay.ms": 0,
            # A killed broker can register again under its node id only after its old session has expired.
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
        }
        return "\n".join(f"{key}={value}" for key, value in (settings | self.settings).items())

    def build_java_command(self, *arguments: str) -> list[str]:
        return ["java", *self.JAVA_OPTIONS, "-cp", f"{self.kafka_home}/libs/*", *arguments]

    def run_java(self, *arguments: str) -> None:
        subprocess.run(self.build_java_command(*arguments), cwd=self.folder, check=True, capture_output=True)

    def launch_process(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.build_java_command("kafka.Kafka", "server.properties"), cwd=self.folder, stdout=log, stderr=log
            )

    def start(self) -> None:
        self.launch_process()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return once a client can connect; raise the client's error if the process has ended."""
        assert self.process
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                kafka.KafkaConsumer(**self.build_client_settings(), bootstrap_timeout_ms=2000).close()
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


# No test kills a shared broker, so it need not notice quickly that it has lost its session; on a busy machine it would lose it.
_SHARED_SETTINGS = {"broker.session.timeout.ms": 60_000, "broker.heartbeat.interval.ms": 2000}


def start_shared_broker(name: str, make_broker: Callable[[Path], Broker]) -> tuple[Path, str]:
    """Return the folder and HOST:PORT of a broker that all test processes share.

    Each test has its own prefix for topics and groups.
    """

    def launch(folder: Path) -> tuple[subprocess.Popen, str, Callable[[], None]]:
        broker = make_broker(folder)
        with (folder / "server.properties").open("a") as file:
            file.writelines(f"\n{key}={value}" for key, value in _SHARED_SETTINGS.items())
        broker.launch_process()
        assert broker.process
        return broker.process, broker.address, broker.wait_until_ready

    return start_once(name, launch)


class SecureBroker(Broker):
    """A broker with three secured listeners and a self-signed certificate.

    CLIENT (SASL_SSL): USER logs in with SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN. OAUTH (SASL_SSL): tokens of `TokenIssuer`, for the
    audience AUDIENCE; a session ends with its token. MTLS (SSL): clients with a certificate of `ClientCertificates`.
    """

    USER, PASSWORD, CA_FILE, AUDIENCE = "charter", "s3cret-of-the-test", "ca.pem", "kafka"

    def __init__(self, kafka_home: Path, folder: Path) -> None:
        self.ca_file = folder / self.CA_FILE
        self.issuer, self.certificates = TokenIssuer(folder), ClientCertificates(folder)
        self.issuer.create()
        self.certificates.create()
        allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={self.issuer.keys_url}"
        self.JAVA_OPTIONS = (*Broker.JAVA_OPTIONS, allowed)
        self.other_ports = {"OAUTH": find_free_port(), "MTLS": find_free_port()}
        store = ["-alias", "broker", "-keystore", "broker.p12", "-storetype", "PKCS12", "-storepass", self.PASSWORD]
        names = ["-dname", "CN=localhost", "-ext", "SAN=dns:localhost,ip:127.0.0.1", "-ext", "bc=ca:true"]
        for command in (
            ["keytool", "-genkeypair", "-keyalg", "RSA", "-keysize", "2048", *names, *store],
            ["keytool", "-exportcert", "-rfc", "-file", self.CA_FILE, *store],
        ):
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        super().__init__(kafka_home, folder)

    @staticmethod
    def find_address(folder: Path, listener: str) -> str:
        """Return HOST:PORT of a listener of the broker in this folder."""
        found = re.search(rf"^listeners=.*\b{listener}://([^,\s]+)", (folder / "server.properties").read_text(), re.MULTILINE)
        assert found
        return found[1]

    def build_user_arguments(self) -> list[str]:
        login = f"[name={self.USER},password={self.PASSWORD}]"
        return ["--add-scram", f"SCRAM-SHA-512={login}", "--add-scram", f"SCRAM-SHA-256={login}"]

    def build_properties(self) -> str:
        login = f'required username="{self.USER}" password="{self.PASSWORD}"'
        scram = f"org.apache.kafka.common.security.scram.ScramLoginModule {login};"
        plain = f'org.apache.kafka.common.security.plain.PlainLoginModule {login} user_{self.USER}="{self.PASSWORD}";'
        oauth = "org.apache.kafka.common.security.oauthbearer"
        plain_settings = dict(line.split("=", 1) for line in super().build_properties().splitlines())
        others = [f"{name}://127.0.0.1:{port}" for name, port in self.other_ports.items()]
        settings = {
            "listeners": ",".join([plain_settings["listeners"], *others]),
            "advertised.listeners": ",".join([plain_settings["advertised.listeners"], *others]),
            "listener.security.protocol.map": "CLIENT:SASL_SSL,OAUTH:SASL_SSL,MTLS:SSL,CONTROLLER:PLAINTEXT",
            "listener.name.client.sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
            "listener.name.client.scram-sha-512.sasl.jaas.config": scram,
            "listener.name.client.scram-sha-256.sasl.jaas.config": scram,
            "listener.name.client.plain.sasl.jaas.config": plain,
            "listener.name.oauth.sasl.enabled.mechanisms": "OAUTHBEARER",
            "listener.name.oauth.oauthbearer.sasl.jaas.config": f"{oauth}.OAuthBearerLoginModule required;",
            "listener.name.oauth.oauthbearer.sasl.server.callback.handler.class": f"{oauth}.OAuthBearerValidatorCallbackHandler",
            "listener.name.oauth.oauthbearer.connections.max.reauth.ms": 3_600_000,
            "listener.name.oauth.sasl.oauthbearer.jwks.endpoint.url": self.issuer.keys_url,
            "listener.name.oauth.sasl.oauthbearer.expected.audience": self.AUDIENCE,
            "listener.name.oauth.sasl.oauthbearer.clock.skew.seconds": 0,
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.mtls.ssl.truststore.location": self.certificates.ca_file,
            "listener.name.mtls.ssl.truststore.type": "PEM",
            "ssl.keystore.location": self.folder / "broker.p12",
            "ssl.keystore.type": "PKCS12",
            "ssl.keystore.password": self.PASSWORD,
            "ssl.truststore.location": self.ca_file,
            "ssl.truststore.type": "PEM",
        }
        return "\n".join(f"{key}={value}" for key, value in (plain_settings | settings).items())

    def build_client_settings(self) -> dict[str, object]:
        secure = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "ssl_cafile": str(self.ca_file)}
        login = {"sasl_plain_username": self.USER, "sasl_plain_password": self.PASSWORD}
        return super().build_client_settings() | secure | login


def _generate_cluster_id() -> str:
    return urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


class Cluster:
    """Three brokers with replication, so that any one of them can fail."""

    def __init__(self, kafka_home: Path, folder: Path, num_brokers: int = 3, settings: dict[str, object] | None = None) -> None:
        controllers = {node: find_free_port() for node in range(1, num_brokers + 1)}
        cluster = _generate_cluster_id()
        self.brokers = []
        for node in controllers:
            (folder / str(node)).mkdir(parents=True)
            self.brokers.append(Broker(kafka_home, folder / str(node), node, controllers, cluster, settings))
        self.address = ",".join(broker.address for broker in self.brokers)
        self.exit_stack = ExitStack()

    def __enter__(self) -> "Cluster":
        for broker in self.brokers:
            broker.launch_process()
        for broker in self.brokers:
            self.exit_stack.push(broker)
        for broker in self.brokers:
            broker.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:  # all at once: each waits until another broker takes over its partitions
            if broker.process and broker.process.poll() is None:
                broker.process.terminate()
        self.exit_stack.close()

    def wait_until_in_sync(self) -> None:
        """Return once every partition has all its replicas again: only then may another broker fail."""
        deadline = time.monotonic() + HANG_S
        while not self.is_in_sync():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {HANG_S:.0f} s the replicas have not caught up")
            time.sleep(_POLL_INTERVAL_S)

    def is_in_sync(self) -> bool:
        """Return whether every partition has all its replicas in sync; False also while no broker can be asked."""
        try:
            admin = KafkaAdminClient(bootstrap_servers=self.address.split(","))
        except (KafkaError, OSError):
            return False
        try:
            described = admin.describe_topics(admin.list_topics())
        except (KafkaError, OSError):
            return False
        finally:
            admin.close()
        partitions = [partition for topic in described for partition in topic["partitions"]]
        return all(len(p["isr_nodes"]) == len(p["replica_nodes"]) for p in partitions)
