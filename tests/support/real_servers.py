"""A real vLLM and a real llama.cpp on the loopback interface. Their Python environments are named by environment variables."""

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

from tests.support.kafka import find_free_port
from tests.support.waiting import HANG_S

_VLLM_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
# A request with a seed ends the CPU build if its prompt is computed in parts, so all prompts must fit into one step.
_VLLM_OPTIONS = [
    "--host", "127.0.0.1", "--max-logprobs", "20", "--generation-config", "vllm", "--dtype", "bfloat16", "--max-model-len", "2048",
    "--max-num-batched-tokens", "16384", "--enforce-eager", "--enable-scale-out",
]  # fmt: skip
LORA_OPTIONS = ("--enable-lora", "--max-lora-rank", "64", "--max-cpu-loras", "4")
_LLAMA_PROGRAM = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias, params.hostnames, params.port = sys.argv[1], {"model"}, ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 8192, 2, 1, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


class RealServer:
    """A server process in a process group. `address` is a value for models.*; it stays the same after a restart."""

    def __init__(self, command, port, log, environment):
        self.command, self.port, self.log, self.environment = command, port, log, environment
        self.url = f"http://127.0.0.1:{port}"
        self.address = f"{self.url}/v1#model"
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=os.environ | self.environment, start_new_session=True
            )

    def wait_until_ready(self):
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"{self.command[0]} did not start: {self.log.read_text()[-3000:]}")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_vllm(home, model, log, *options):
    port = find_free_port()
    command = [
        "nice", "-n", "5", f"{home}/bin/vllm", "serve", str(model), "--served-model-name", "model", "--port", str(port),
        *_VLLM_OPTIONS, *options,
    ]  # fmt: skip
    return RealServer(command, port, log, _VLLM_ENVIRONMENT).wait_until_ready()


def start_llama(home, gguf, log):
    """Start llama-server from `home/bin`, or the server in the Python package xllamacpp."""
    port, program = find_free_port(), Path(home, "bin", "llama-server")
    if program.exists():
        options = ["-m", str(gguf), "--alias", "model", "--jinja", "--parallel", "2", "--threads", "1", "--port", str(port)]
        command = [str(program), *options]
    else:
        command = [f"{home}/bin/python", "-c", _LLAMA_PROGRAM, str(gguf), str(port)]
    return RealServer(["nice", "-n", "5", *command], port, log, {}).wait_until_ready()


MEASUREMENTS = []  # printed after the tests (tests/real_servers/conftest.py)


def report(line):
    MEASUREMENTS.append(line)
