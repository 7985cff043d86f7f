"""Figures for Prometheus: an endpoint that reads the state of this process when it is asked, and costs nothing in between.

Every figure of a stage has the labels `run` and `stage`. Names end in their unit, counters in `_total`. A stage's lag is
counted in offsets from its last commit (on Kafka the marker of a transaction takes one too).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.errors import UsageError
from engine.worker import Worker

_Labels = tuple[tuple[str, str], ...]


class MetricSample(NamedTuple):
    """One number as of now. A name that ends in `_total` is a counter, any other a gauge."""

    name: str
    documentation: str
    value: float
    labels: _Labels = ()


_ReadSamples = Callable[[], Iterable[MetricSample]]


@dataclass(frozen=True)
class _MetricsRegistry(Collector):
    """What `read` says when Prometheus asks."""

    read_samples: _ReadSamples

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for figure in self.read_samples():
            kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
            names = [name for name, _ in figure.labels]
            family = families.setdefault(figure.name, kind(figure.name, figure.documentation, labels=names))
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([value for _, value in figure.labels], figure.value)
        yield from families.values()


def serve_metrics(host: str, port: int, read_samples: _ReadSamples) -> Callable[[], None]:
    """Answer at http://HOST:PORT/metrics from a thread of its own; returns what ends it. A taken port is a UsageError."""
    registry = CollectorRegistry()
    registry.register(_MetricsRegistry(read_samples))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        why = "something else listens there" if error.errno == errno.EADDRINUSE else str(error)
        raise UsageError(
            f"the figures cannot be served at {host}:{port}", why, "give another port: --set telemetry.metrics_port=9465"
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def collect_worker_metrics(worker: Worker) -> Iterator[MetricSample]:
    """A stage's figures."""
    labels = (("run", worker.run_id), ("stage", worker.stage.name))
    yield MetricSample(
        "charter_records_read_total", "Records that the stage has finished and committed.", worker.num_committed, labels
    )
    yield MetricSample("charter_records_written_total", "Records that the stage has written.", worker.num_written, labels)
    yield MetricSample("charter_dead_letters_total", "Records that the stage gave up on.", worker.num_dead_letters, labels)
    yield MetricSample("charter_pauses_total", "Pauses because a dependency was away.", worker.num_pauses, labels)
    yield MetricSample("charter_batches_total", "Batches that the stage has worked on.", worker.num_batches, labels)
    yield MetricSample("charter_batch_seconds_total", "Seconds spent working on batches.", worker.batch_seconds, labels)
    yield MetricSample(
        "charter_tokens_total", "Tokens read and written by models, of the records made.", worker.num_tokens, labels
    )
    yield MetricSample(
        "charter_in_flight_records", "Records that are read and not yet committed.", worker.num_in_flight, labels
    )
    yield MetricSample("charter_queued_records", "Records that wait for the model.", worker.num_queued, labels)
    yield MetricSample("charter_partitions", "Partitions that this copy has.", len(worker.positions), labels)
