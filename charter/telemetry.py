"""Export the metrics of a process to Prometheus and its traces to OpenTelemetry, if the settings enable this."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from charter.connect import open_bus_from_settings
from charter.installation import get_install_command
from consumers.sink import Sink, collect_sink_metrics
from engine.bus.port import Bus, Offsets
from engine.errors import BusUnreachable, LoginRejected, UsageError
from engine.metrics import (
    MetricSample,
    collect_notice_metrics,
    collect_server_metrics,
    collect_token_metrics,
    collect_worker_metrics,
    serve_metrics,
)
from engine.policy import read_policy_updates
from engine.settings import Settings
from engine.worker import Worker
from schemas.records import PolicyKind
from schemas.topics import TOPICS

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint
    from engine.tracing import Tracing

CloseFunction = Callable[[], None]


def open_tracing(settings: Settings) -> Tracing | None:
    """Return the tracing of this process, or None if telemetry.traces is off. Raises UsageError if OpenTelemetry is missing."""
    if not settings.telemetry.traces:
        return None
    try:
        from engine.tracing import Tracing
    except ModuleNotFoundError as error:
        raise UsageError(
            "telemetry.traces needs OpenTelemetry", f"{error.name} is not installed", f"type: {get_install_command('otel')}"
        ) from error
    return Tracing()


def start_metrics_server(settings: Settings, collect: Callable[[Bus], Iterable[MetricSample]]) -> list[CloseFunction]:
    """Serve the samples of `collect` for Prometheus if the settings have a port. Return the functions that stop the server.

    The server opens a separate connection to the log at the first scrape. Therefore a scrape does not wait for a worker. If the
    log is unreachable or rejects the login, the metrics that need the log are omitted. The process itself reports the reason.
    """
    if not settings.telemetry.metrics_port:
        return []

    collector = _MetricsCollector(settings, collect)
    return [serve_metrics(settings.telemetry.metrics_host, settings.telemetry.metrics_port, collector), collector.close]


class _MetricsCollector:
    """Collects the samples of one scrape at a time."""

    def __init__(self, settings: Settings, collect: Callable[[Bus], Iterable[MetricSample]]) -> None:
        self.settings, self.collect = settings, collect
        self.bus: Bus | None = None
        self.lock = threading.Lock()

    def __call__(self) -> list[MetricSample]:

        samples = list(collect_token_metrics())
        with self.lock, suppress(BusUnreachable, LoginRejected):
            self.bus = self.bus or open_bus_from_settings(self.settings)
            for sample in self.collect(self.bus):  # extend() would lose the samples that precede a BusUnreachable
                samples.append(sample)
        return samples

    def close(self) -> None:
        if self.bus:
            self.bus.close()


def make_pipeline_collector(
    workers: Sequence[Worker], sinks: Sequence[Sink], list_servers: Callable[[], Sequence[Endpoint]] = list
) -> Callable[[Bus], Iterator[MetricSample]]:
    """Return a function that yields the samples of a host's workers, model servers and sinks.

    Each scrape reads `sinks`, because a standby sink can be added after this call. The lag samples are last, because the log
    may be unreachable.
    """

    def read(bus: Bus) -> Iterator[MetricSample]:

        yield from collect_notice_metrics()
        for worker in workers:
            yield from collect_worker_metrics(worker)
        yield from collect_server_metrics(list_servers())
        for sink in sinks:
            yield from collect_sink_metrics(sink)
        for worker in workers:
            topics = worker.stage.inputs
            next_offsets = worker.run_start.get_offsets(bus, topics) | bus.committed(worker.group, topics)
            yield _make_lag_sample(worker.run_id, worker.stage.name, next_offsets, bus.end_offsets(topics))
        for sink in sinks:
            yield _make_lag_sample("all", "sink", sink.next_offsets, bus.end_offsets(list(TOPICS)))

    return read


def _make_lag_sample(run_id: str, stage: str, next_offsets: Offsets, end_offsets: Offsets) -> MetricSample:

    lag = sum(max(0, end - next_offsets.get(partition, 0)) for partition, end in end_offsets.items())
    labels = (("run", run_id), ("stage", stage))
    return MetricSample(
        "charter_lag_records", "Offsets between the stage's last commit and the ends of its topics.", lag, labels
    )


def make_trainer_collector(
    latest_metrics: Mapping[str, Mapping[str, float]], step_counts: Mapping[str, int]
) -> Callable[[Bus], Iterator[MetricSample]]:
    """Return a function that yields the newest metrics of each phase in this process, and the newest versions on the log."""

    def read(bus: Bus) -> Iterator[MetricSample]:

        yield from collect_notice_metrics()
        for phase, count in list(step_counts.items()):
            yield MetricSample("charter_train_steps_total", "Optimizer steps of this process.", count, (("phase", phase),))
        for phase, metrics in list(latest_metrics.items()):
            for name, value in metrics.items():
                yield MetricSample(
                    "charter_train_metric", "Metrics of the newest optimizer step.", value, (("phase", phase), ("metric", name))
                )
        updates = read_policy_updates(bus)
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            newest = max((update.version for update in updates if update.kind is kind), default=0)
            yield MetricSample("charter_version", "The newest published version.", newest, (("kind", kind.value.lower()),))

    return read
