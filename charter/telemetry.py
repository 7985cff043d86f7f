"""What a process shows of itself: its figures for Prometheus, and the traces of what it works on, as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from charter.connect import open_bus_from_settings
from consumers.sink import Sink, collect_sink_metrics
from engine.bus.port import Bus, Offsets
from engine.errors import BusUnreachable, UsageError
from engine.metrics import MetricSample, collect_worker_metrics, serve_metrics
from engine.policy import read_policy_updates
from engine.settings import Settings
from engine.tracing import Tracing
from engine.worker import Worker
from schemas.records import PolicyKind
from schemas.topics import TOPICS

CloseFunction = Callable[[], None]


def open_tracing(settings: Settings) -> Tracing | None:
    """The spans of this process, if the settings ask for traces."""
    if not settings.telemetry.traces:
        return None
    try:
        from engine.tracing import Tracing
    except ModuleNotFoundError as error:
        raise UsageError(
            "telemetry.traces needs OpenTelemetry", f"{error.name} is not installed", "type: pip install -e '.[otel]'"
        ) from error
    return Tracing()


def start_metrics_server(settings: Settings, collect: Callable[[Bus], Iterable[MetricSample]]) -> list[CloseFunction]:
    """Serve what `read` says of this process and of the log, if the settings name a port; returns what ends that.

    The log is asked over a connection of its own, made at the first question, so that a scrape never waits for a worker. While
    the log is away the figures that come from it are left out.
    """
    if not settings.telemetry.metrics_port:
        return []

    asking = _MetricsCollector(settings, collect)
    return [serve_metrics(settings.telemetry.metrics_host, settings.telemetry.metrics_port, asking), asking.close]


class _MetricsCollector:
    """Answers one scrape after the other."""

    def __init__(self, settings: Settings, collect: Callable[[Bus], Iterable[MetricSample]]) -> None:
        self.settings, self.collect = settings, collect
        self.bus: Bus | None = None
        self.lock = threading.Lock()

    def __call__(self) -> list[MetricSample]:

        figures: list[MetricSample] = []
        with self.lock, suppress(BusUnreachable):
            self.bus = self.bus or open_bus_from_settings(self.settings)
            for figure in self.collect(self.bus):  # one by one: what came before the log went away is kept
                figures.append(figure)
        return figures

    def close(self) -> None:
        if self.bus:
            self.bus.close()


def make_pipeline_collector(workers: Sequence[Worker], sinks: Sequence[Sink]) -> Callable[[Bus], Iterator[MetricSample]]:
    """What a host's workers and sinks say; the lags, which need the log, come last. `sinks` may still grow."""

    def read(bus: Bus) -> Iterator[MetricSample]:

        for worker in workers:
            yield from collect_worker_metrics(worker)
        for sink in sinks:
            yield from collect_sink_metrics(sink)
        for worker in workers:
            topics = worker.stage.inputs
            stands = bus.beginning_offsets(topics) | bus.committed(worker.group, topics)
            yield _make_lag_sample(worker.run_id, worker.stage.name, stands, bus.end_offsets(topics))
        for sink in sinks:
            yield _make_lag_sample("all", "sink", sink.next_offsets, bus.end_offsets(list(TOPICS)))

    return read


def _make_lag_sample(run_id: str, stage: str, next_offsets: Offsets, end_offsets: Offsets) -> MetricSample:

    behind = sum(max(0, end - next_offsets.get(place, 0)) for place, end in end_offsets.items())
    labels = (("run", run_id), ("stage", stage))
    return MetricSample(
        "charter_lag_records", "Offsets between the stage's last commit and the ends of its topics.", behind, labels
    )


def make_trainer_collector(
    latest_metrics: Mapping[str, Mapping[str, float]], step_counts: Mapping[str, int]
) -> Callable[[Bus], Iterator[MetricSample]]:
    """The newest metrics of each phase in this process, and the versions on the log."""

    def read(bus: Bus) -> Iterator[MetricSample]:

        for phase, count in list(step_counts.items()):
            yield MetricSample("charter_train_steps_total", "Optimiser steps of this process.", count, (("phase", phase),))
        for phase, metrics in list(latest_metrics.items()):
            for name, value in metrics.items():
                yield MetricSample(
                    "charter_train_metric", "The newest step's numbers.", value, (("phase", phase), ("metric", name))
                )
        known = read_policy_updates(bus)
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            newest = max((update.version for update in known if update.kind is kind), default=0)
            yield MetricSample("charter_version", "The newest published version.", newest, (("kind", kind.value.lower()),))

    return read
