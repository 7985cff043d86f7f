"""`transformers serve`, started on the loopback interface."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from engine.models.chat_api import ServerCapabilities
from engine.models.chat_stream import STREAM_BODIES
from tests.support.kafka import find_free_port
from tests.support.waiting import HANG_S

# What the probe finds (tests/engine/test_models_served.py): unknown fields are rejected, log-probabilities are ignored, and a last
# assistant message is closed.
SERVER_CAPABILITIES = ServerCapabilities(
    extra_body={"chat_template_kwargs": {"enable_thinking": False}}, stream_body=STREAM_BODIES[0]
)


def _copy_with_sampling(model, folder):
    """Copy the model's folder with sampling enabled: the server samples only if generation_config.json enables it."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((model / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True, "top_k": 0}))
    return folder


def launch_transformers_server(model, folder):
    """Launch `transformers serve` with this model.

    Return its process, its address as a setting (http://HOST:PORT/v1#MODEL), and a function that waits until it answers.
    """
    served, port = _copy_with_sampling(model, folder / "model"), find_free_port()
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(served), "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--log-level", "error",
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    return process, f"{url}/v1#{served}", lambda: _wait_until_ready(process, f"{url}/health", folder / "server.log")


def _wait_until_ready(process, url, log):
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"transformers serve did not start: {log.read_text()[-2000:]}")
