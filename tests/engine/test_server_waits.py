"""What a process waits for at model servers: the file that other processes read, and the metrics."""

import json
import os
import threading
import time

from engine.metrics import collect_server_metrics
from engine.models.chat_api import ServerCapabilities
from engine.models.endpoint import Endpoint
from engine.models.interface import GenerationRequest
from engine.models.server_health import ServerHealth
from engine.server_waits import ServerWaitReporter, list_server_waits
from schemas.records import ChatMessage
from tests.support.chat_server import FakeChatServer, make_chat_completion
from tests.support.waiting import HANG_S, wait_until


def test_waits_are_visible_to_other_processes_until_they_end(tmp_path, caplog):
    health = ServerHealth("http://s/v1#m")
    reporter = ServerWaitReporter(tmp_path, lambda: [health, ServerHealth("http://other/v1#m")])
    reporter.write()
    assert list_server_waits(tmp_path) == []
    health.note_failure("status 500", "status 500: Internal Server Error", 8.0, 600.0)
    reporter.write()
    (row,) = list_server_waits(tmp_path)
    assert row["message"].startswith(
        "waiting for http://s/v1#m: status 500: Internal Server Error; 1 failed attempt, the next in 8.0 s"
    )
    assert row["name"] == "http://s/v1#m" and row["num_failures"] == 1 and row["process"].endswith(f"process {os.getpid()}")
    health.note_answer(time.monotonic())
    reporter.write()
    assert list_server_waits(tmp_path) == []


def test_waits_of_a_killed_process_are_ignored_and_removed_later(tmp_path):
    folder = tmp_path / "waits"
    folder.mkdir()
    for name, age_s in (("host-1", 60), ("host-2", 7200)):
        (folder / f"{name}.json").write_text(json.dumps([{"message": "waiting"}]))
        os.utime(folder / f"{name}.json", (time.time() - age_s,) * 2)
    assert list_server_waits(tmp_path) == [] and [path.name for path in folder.iterdir()] == ["host-1.json"]


def test_waits_that_cannot_be_written_are_reported_once(tmp_path, caplog):
    (tmp_path / "waits").write_text("a file in the place of the folder")
    health = ServerHealth("http://s/v1#m")
    health.note_failure("status 500", "status 500", 8.0, 600.0)
    reporter = ServerWaitReporter(tmp_path, lambda: [health])
    caplog.clear()
    for _ in range(2):
        reporter.write()
    assert len(caplog.messages) == 1 and "do not show what waits" in caplog.messages[0]


def test_metrics_have_the_load_and_the_failures_of_each_server():
    server, is_broken = FakeChatServer(), threading.Event()
    is_broken.set()
    server.script = lambda n, request: (503, b"loading") if is_broken.is_set() else (200, make_chat_completion("x"))
    model = Endpoint(
        server.url, "m", timeout_s=HANG_S, backoff_range_s=(0.01, 0.02), cached_server_capabilities=ServerCapabilities()
    )

    def read():
        samples = list(collect_server_metrics([model]))
        assert {sample.labels[:2] for sample in samples} == {(("server", server.url), ("model", "m"))}
        return {(sample.name, *(value for _, value in sample.labels[2:])): sample.value for sample in samples}

    requests = [GenerationRequest((ChatMessage(role="user", content=str(n)),)) for n in range(6)]
    caller = threading.Thread(target=model.generate, args=(requests,))
    try:
        caller.start()
        wait_until(lambda: read().get(("charter_server_failures_total", "status 503"), 0) > 2)
        metrics = read()
        assert metrics["charter_server_requests",] == 6 and metrics["charter_server_wait_seconds",] > 0
        assert metrics["charter_server_concurrency",] < 4 and metrics["charter_server_timeout_seconds",] == HANG_S
    finally:
        is_broken.clear()
        caller.join()
        server.close()
    assert read()["charter_server_requests",] == read()["charter_server_wait_seconds",] == 0
