"""Real servers, started once per session: vLLM with adapters, vLLM with replaceable weights, and llama.cpp."""

import os

import pytest
import torch

from engine.models.smollm2 import find_gguf_file
from tests.support.real_servers import LORA_OPTIONS, MEASUREMENTS, start_llama, start_vllm
from trainer import weights


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "real_servers":
            item.add_marker(pytest.mark.real_server)


def pytest_terminal_summary(terminalreporter):
    for line in MEASUREMENTS:
        terminalreporter.write_line(f"measured: {line}")


def get_home(variable, server):
    home = os.environ.get(variable)
    if not home:
        pytest.skip(f"no real {server}: set {variable} to a Python environment with it (docs/models.md)")
    return home


@pytest.fixture(scope="session")
def vllm_home():
    return get_home("CHARTER_VLLM_HOME", "vLLM")


@pytest.fixture(scope="session")
def llama(smollm2, tmp_path_factory):
    """Yield a llama.cpp server of the packaged model."""
    server = start_llama(
        get_home("CHARTER_LLAMA_HOME", "llama.cpp"), find_gguf_file(), tmp_path_factory.mktemp("llama") / "server.log"
    )
    yield server
    server.kill()


@pytest.fixture(scope="session")
def untied(smollm2, tmp_path_factory):
    """Return the packaged model with an output layer of its own, because vLLM on a processor cannot replace a tied one."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = weights.load_policy(smollm2)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    weights.load_tokenizer(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(vllm_home, untied, tmp_path_factory):
    """Yield a vLLM server without adapters, whose weights can be replaced. It starts with version 0 in each file."""
    server = start_vllm(vllm_home, untied, tmp_path_factory.mktemp("vllm") / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def vllm_lora(vllm_home, smollm2, tmp_path_factory):
    """Yield a vLLM server with adapters. On a processor it generates a few tokens per second."""
    server = start_vllm(vllm_home, smollm2, tmp_path_factory.mktemp("vllm-lora") / "server.log", *LORA_OPTIONS)
    yield server
    server.kill()
