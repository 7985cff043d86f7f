"""What a running process shows of itself: figures, log lines with coordinates, and one trace for one prompt's way."""

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


def settings_in(folder, **values):
    chosen = {"data.folder": str(folder / "data"), "models.policy": "scripted", "worker.max_attempts": "1"}
    return load_settings(chosen | {name.replace("__", "."): value for name, value in values.items()}, environment={})[0]


def stream(settings, prompts, until):
    """Produce prompts and run every stage until a query gives what is expected; the caller looks while it still runs."""
    bus = connect_bus(settings)
    file = settings.folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(file))
    host = make_host(settings, bus, STAGES, sink=True)
    with host:
        store = open_store(settings)
        while not store.path.exists() or store.query(until[0]).rows != until[1]:
            host.failure_event.wait(0.05)
            host.raise_if_failed()
        yield
    bus.close()


JUDGED = ("SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL", [(2,)])


def scraped(port):
    """(name, labels) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_prometheus_reads_what_the_stages_and_the_sink_have_done(tmp_path):
    port = find_free_port()
    settings = settings_in(tmp_path, telemetry__metrics_port=str(port))
    for _ in stream(settings, ["one", "two", f"{POISON_TEXT} three"], JUDGED):
        found = scraped(port)

        def figure(name, stage, run="live", found=found):
            return found[f"charter_{name}", (("run", run), ("stage", stage))]

        assert figure("records_read_total", "respond") == 3 and figure("records_written_total", "respond") == 3
        assert figure("dead_letters_total", "respond") == 1 and figure("dead_letters_total", "judge") == 0
        assert figure("tokens_total", "respond") > 0 and figure("batch_seconds_total", "respond") > 0
        assert figure("lag_records", "respond") == 0 and figure("records_written_total", "judge") == 2
        assert figure("records_read_total", "sink", "all") >= 3 + 3 + 2 + 2
    with pytest.raises(OSError):
        scraped(port)


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = settings_in(tmp_path, telemetry__metrics_port=str(taken.getsockname()[1]))
        with pytest.raises(UsageError, match="port is in use"):
            start_metrics_server(settings, lambda bus: [])


def test_the_trainer_shows_its_newest_step_and_the_versions(tmp_path, bus):
    settings, port = settings_in(tmp_path), find_free_port()
    settings = settings.model_copy(update={"telemetry": settings.telemetry.model_copy(update={"metrics_port": port})})
    closing = start_metrics_server(settings, make_trainer_collector({"sft": {"loss": 2.5}}, Counter(sft=7)))
    found = scraped(port)
    for close in closing:
        close()
    assert found["charter_train_metric", (("metric", "loss"), ("phase", "sft"))] == 2.5
    assert found["charter_train_steps_total", (("phase", "sft"),)] == 7
    assert found["charter_version", (("kind", "policy"),)] == 0


def test_log_lines_are_json_with_the_coordinates_of_a_record(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "charter"):
        for _ in stream(settings_in(tmp_path), ["one", "two", f"{POISON_TEXT} three"], JUDGED):
            lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    dead_letter_line = next(line for line in lines if "to the dead letters" in line["message"])
    assert dead_letter_line["level"] == "WARNING" and dead_letter_line["logger"] == "charter.worker"
    assert (
        dead_letter_line["topic"] == "prompts" and dead_letter_line["stage"] == "respond" and dead_letter_line["run"] == "live"
    )
    assert f"[{dead_letter_line['partition']}]" in dead_letter_line["message"] and len(dead_letter_line["prompt_id"]) == 36
    finished = [line for line in lines if "has finished" in line["message"] and line.get("stage") == "judge"]
    assert len({line["prompt_id"] for line in finished}) == 2


def test_a_traceback_is_part_of_its_line():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("charter", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["traceback"]


def test_hostile_text_stays_on_one_line_of_a_log():
    record = logging.LogRecord("charter", logging.INFO, "", 0, "a\n\x1b[2Jb\u202e", None, None)
    line = JsonFormatter().format(record)
    assert line.isascii() and line.isprintable() and json.loads(line)["message"] == "a\n\x1b[2Jb\u202e"


@pytest.mark.parametrize(("as_json", "kind"), [(True, JsonFormatter), (False, TerminalFormatter)])
def test_the_log_is_for_people_unless_a_machine_reads_it(monkeypatch, as_json, kind):
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    configure_logging(False, as_json)
    assert type(root.handlers[0].formatter) is kind and root.level == logging.WARNING
    assert as_json or root.handlers[0].formatter._fmt == LOG_FORMAT


def test_hostile_text_in_a_log_is_inert_for_people_too():
    said = TerminalFormatter().format(logging.LogRecord("charter", logging.INFO, "", 0, "a\x1b[2Jb\u202e", None, None))
    assert said == "INFO charter a\\x1b[2Jb\\u202e"


def test_one_prompts_way_is_one_trace(tmp_path, monkeypatch):
    from opentelemetry.sdk.trace.export import in_memory_span_exporter as exporting

    from engine import tracing

    kept = exporting.InMemorySpanExporter()
    monkeypatch.setattr(tracing, "make_otlp_exporter", lambda: kept)
    settings = settings_in(tmp_path, telemetry__traces="true")
    for _ in stream(settings, ["one", "two"], JUDGED):
        bus = connect_bus(settings)
        headers = [dict(message.headers) for message in read_everything(bus, "preferences")]
        bus.close()
    spans = kept.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    assert {span.name for span in spans} >= {"charter.respond", "charter.critique", "charter.judge"}
    prompts = {span.attributes["charter.prompt_id"] for span in spans}
    assert len(prompts) == 2
    for prompt in prompts:
        own = [span for span in spans if span.attributes["charter.prompt_id"] == prompt]
        assert len({span.context.trace_id for span in own}) == 1
        roots = [span for span in own if span.parent is None]
        assert [span.name for span in roots] == ["charter.respond"]
        assert all(by_id[span.parent.span_id].context.trace_id == span.context.trace_id for span in own if span.parent)
    judged = {f"00-{s.context.trace_id:032x}-{s.context.span_id:016x}" for s in spans if s.name == "charter.judge"}
    assert {header["traceparent"].decode().rpartition("-")[0] for header in headers} == judged


def read_everything(bus, topic):
    from engine.bus.read import read_topic

    return list(read_topic(bus, topic))


def test_without_opentelemetry_traces_are_refused_and_nothing_else_needs_it(tmp_path, monkeypatch):
    import builtins

    importing = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *arguments, **keywords)

    from charter.telemetry import open_tracing

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "engine.tracing", raising=False)
    assert open_tracing(settings_in(tmp_path)) is None
    with pytest.raises(UsageError, match="opentelemetry"):
        open_tracing(settings_in(tmp_path, telemetry__traces="true"))
