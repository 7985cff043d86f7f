"""Telemetry of a running process: metrics, log lines with record coordinates, and one trace per prompt."""

import json
import logging
import socket
import sys
import urllib.request
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from charter.connect import connect_bus, open_store
from charter.console import TerminalFormatter, configure_logging
from charter.pipeline import STAGES, make_host
from charter.telemetry import make_trainer_collector, start_metrics_server
from engine.errors import UsageError
from engine.logs import LOG_FORMAT, JsonFormatter
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from producers.files import FileProducer
from tests.support.kafka import find_free_port
from tests.support.waiting import HANG_S, wait_until


def make_settings(folder, **values):
    flags = {"data.folder": str(folder / "data"), "models.policy": "scripted", "worker.max_attempts": "1"}
    return load_settings(flags | {name.replace("__", "."): value for name, value in values.items()}, environment={})[0]


def run_pipeline(settings, prompts, until):
    """Produce prompts, run every stage until a query returns the expected rows, and yield while the stages still run."""
    bus = connect_bus(settings)
    file = settings.folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(file))
    host = make_host(settings, bus, STAGES, sink=True)
    with host:
        store = open_store(settings)
        wait_until(lambda: store.path.exists() and store.query(until[0]).rows == until[1], host)
        yield
    bus.close()


JUDGED = ("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL", [(2,)])


def scrape_metrics(port):
    """Return {(name, labels): value}."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_prometheus_metrics_of_stages_and_sink(tmp_path):
    port = find_free_port()
    settings = make_settings(tmp_path, telemetry__metrics_port=str(port))
    for _ in run_pipeline(settings, ["one", "two", f"{POISON_TEXT} three"], JUDGED):
        metrics = scrape_metrics(port)

        def get_metric(name, stage, run="live", metrics=metrics):
            return metrics[f"charter_{name}", (("run", run), ("stage", stage))]

        assert get_metric("records_read_total", "respond") == 3 and get_metric("records_written_total", "respond") == 3
        assert get_metric("dead_letters_total", "respond") == 1 and get_metric("dead_letters_total", "judge") == 0
        assert get_metric("tokens_total", "respond") > 0 and get_metric("batch_seconds_total", "respond") > 0
        assert get_metric("lag_records", "respond") == 0 and get_metric("records_written_total", "judge") == 2
        assert get_metric("records_read_total", "sink", "all") >= 3 + 3 + 2 + 2
    with pytest.raises(OSError):
        scrape_metrics(port)


def test_port_in_use_raises(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = make_settings(tmp_path, telemetry__metrics_port=str(taken.getsockname()[1]))
        with pytest.raises(UsageError, match="port is in use"):
            start_metrics_server(settings, lambda bus: [])


def test_trainer_exports_its_latest_step_and_versions(tmp_path, bus):
    settings, port = make_settings(tmp_path), find_free_port()
    settings = settings.model_copy(update={"telemetry": settings.telemetry.model_copy(update={"metrics_port": port})})
    closing = start_metrics_server(settings, make_trainer_collector({"sft": {"loss": 2.5}}, Counter(sft=7)))
    metrics = scrape_metrics(port)
    for close in closing:
        close()
    assert metrics["charter_train_metric", (("metric", "loss"), ("phase", "sft"))] == 2.5
    assert metrics["charter_train_steps_total", (("phase", "sft"),)] == 7
    assert metrics["charter_version", (("kind", "policy"),)] == 0


def test_json_log_lines_contain_the_coordinates_of_a_record(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "charter"):
        for _ in run_pipeline(make_settings(tmp_path), ["one", "two", f"{POISON_TEXT} three"], JUDGED):
            lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    dead_letter_line = next(line for line in lines if "to the dead letters" in line["message"])
    assert dead_letter_line["level"] == "WARNING" and dead_letter_line["logger"] == "charter.worker"
    assert (
        dead_letter_line["topic"] == "prompts" and dead_letter_line["stage"] == "respond" and dead_letter_line["run"] == "live"
    )
    assert f"[{dead_letter_line['partition']}]" in dead_letter_line["message"] and len(dead_letter_line["prompt_id"]) == 36
    finished = [line for line in lines if "has finished" in line["message"] and line.get("stage") == "judge"]
    assert len({line["prompt_id"] for line in finished}) == 2


def test_traceback_is_part_of_its_json_line():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("charter", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["traceback"]


def test_hostile_text_stays_on_one_log_line():
    record = logging.LogRecord("charter", logging.INFO, "", 0, "a\n\x1b[2Jb\u202e", None, None)
    line = JsonFormatter().format(record)
    assert line.isascii() and line.isprintable() and json.loads(line)["message"] == "a\n\x1b[2Jb\u202e"


@pytest.mark.parametrize(("as_json", "kind"), [(True, JsonFormatter), (False, TerminalFormatter)])
def test_log_format_is_text_unless_json_is_requested(monkeypatch, as_json, kind):
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    configure_logging(False, as_json)
    assert type(root.handlers[0].formatter) is kind and root.level == logging.WARNING
    assert as_json or root.handlers[0].formatter._fmt == LOG_FORMAT


def test_text_log_escapes_hostile_text():
    line = TerminalFormatter().format(logging.LogRecord("charter", logging.INFO, "", 0, "a\x1b[2Jb\u202e", None, None))
    assert line == "INFO charter a\\x1b[2Jb\\u202e"


def test_one_prompt_has_one_trace(tmp_path, monkeypatch):
    from opentelemetry.sdk.trace.export import in_memory_span_exporter as exporting

    from engine import tracing

    exporter = exporting.InMemorySpanExporter()
    monkeypatch.setattr(tracing, "make_otlp_exporter", lambda: exporter)
    settings = make_settings(tmp_path, telemetry__traces="true")
    for _ in run_pipeline(settings, ["one", "two"], JUDGED):
        bus = connect_bus(settings)
        headers = [dict(message.headers) for message in read_everything(bus, "preferences")]
        bus.close()
    spans = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    assert {span.name for span in spans} >= {"charter.respond", "charter.critique", "charter.judge"}
    prompts = {span.attributes["charter.prompt_id"] for span in spans}
    assert len(prompts) == 2
    for prompt in prompts:
        prompt_spans = [span for span in spans if span.attributes["charter.prompt_id"] == prompt]
        assert len({span.context.trace_id for span in prompt_spans}) == 1
        roots = [span for span in prompt_spans if span.parent is None]
        assert [span.name for span in roots] == ["charter.respond"]
        assert all(by_id[span.parent.span_id].context.trace_id == span.context.trace_id for span in prompt_spans if span.parent)
    judge_spans = {f"00-{s.context.trace_id:032x}-{s.context.span_id:016x}" for s in spans if s.name == "charter.judge"}
    assert {header["traceparent"].decode().rpartition("-")[0] for header in headers} == judge_spans


def read_everything(bus, topic):
    from engine.bus.read import read_topic

    return list(read_topic(bus, topic))


def test_traces_require_opentelemetry_and_nothing_else_does(tmp_path, monkeypatch):
    import builtins

    importing = builtins.__import__

    def fail_import(name, *arguments, **keywords):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *arguments, **keywords)

    from charter.telemetry import open_tracing

    monkeypatch.setattr(builtins, "__import__", fail_import)
    monkeypatch.delitem(sys.modules, "engine.tracing", raising=False)
    assert open_tracing(make_settings(tmp_path)) is None
    with pytest.raises(UsageError, match="opentelemetry"):
        open_tracing(make_settings(tmp_path, telemetry__traces="true"))
