"""Serve Prometheus metrics. The endpoint reads the state of this process only when it gets a request.

Every metric of a stage has the labels `run` and `stage`. The name of a metric ends in its unit. The name of a counter ends in
`_total`. The lag of a stage is the number of offsets after its last commit. On Kafka this includes transaction markers.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.bus.token_statistics import TOKEN_STATISTICS
from engine.errors import UsageError
from engine.notices import NOTICES
from engine.worker import Worker

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

_Labels = tuple[tuple[str, str], ...]


class MetricSample(NamedTuple):
    """The current value of a metric.

    The metric is a counter if its name ends in `_total`. A metric with any other name is a gauge.
    """

    name: str
    documentation: str
    value: float
    labels: _Labels = ()


_ReadSamples = Callable[[], Iterable[MetricSample]]


@dataclass(frozen=True)
class _MetricsRegistry(Collector):
    """Collects the samples of `read_samples` on each request of Prometheus."""

    read_samples: _ReadSamples

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for sample in self.read_samples():
            kind = CounterMetricFamily if sample.name.endswith("_total") else GaugeMetricFamily
            names = [name for name, _ in sample.labels]
            family = families.setdefault(sample.name, kind(sample.name, sample.documentation, labels=names))
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([value for _, value in sample.labels], sample.value)
        yield from families.values()


def serve_metrics(host: str, port: int, read_samples: _ReadSamples) -> Callable[[], None]:
    """Serve metrics at http://HOST:PORT/metrics in a separate thread. Return a function that stops the server.

    Raise UsageError if the port is in use.
    """
    registry = CollectorRegistry()
    registry.register(_MetricsRegistry(read_samples))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        why = "the port is in use" if error.errno == errno.EADDRINUSE else str(error)
        raise UsageError(
            f"metrics cannot be served at {host}:{port}", why, "use another port: --set telemetry.metrics_port=9465"
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def collect_notice_metrics() -> Iterator[MetricSample]:
    """Yield the number of events in this process that changed or excluded data (engine/notices.py)."""
    for (kind, value), count in sorted(NOTICES.get_counts().items()):
        labels = (("kind", kind), ("value", value))
        yield MetricSample(
            "charter_notices_total", "Events that changed or excluded data, e.g. pairs that were not judged.", count, labels
        )


def collect_token_metrics() -> Iterator[MetricSample]:
    """Yield how often this process fetched a Kafka token, and how long the current one is valid. Nothing without tokens."""
    for outcome, count in sorted(TOKEN_STATISTICS.fetch_counts.items()):
        labels = (("outcome", outcome),)
        yield MetricSample("charter_kafka_token_fetches_total", "Attempts to fetch a Kafka token.", count, labels)
    if (remaining_s := TOKEN_STATISTICS.get_remaining_s()) is not None:
        yield MetricSample("charter_kafka_token_remaining_seconds", "Seconds until the Kafka token expires.", remaining_s)


def collect_server_metrics(servers: Iterable[Endpoint]) -> Iterator[MetricSample]:
    """Yield the load on each model server, and how long its requests wait."""
    for server in servers:
        labels = (("server", server.url), ("model", server.id))
        throttle, wait = server.throttle, server.health.get_wait()
        yield MetricSample(
            "charter_server_requests", "Requests to the model server without a response.", server.health.num_waiting, labels
        )
        yield MetricSample(
            "charter_server_concurrency",
            "Current limit of concurrent requests to the server.",
            int(throttle.concurrency),
            labels,
        )
        yield MetricSample(
            "charter_server_timeout_seconds", "Current timeout of requests to the model server.", throttle.timeout_s, labels
        )
        yield MetricSample(
            "charter_server_wait_seconds",
            "Seconds since the first failure or the last token, while requests wait; otherwise 0.",
            wait.waiting_s if wait else 0.0,
            labels,
        )
        for kind, count in sorted(server.health.failure_counts.items()):
            yield MetricSample(
                "charter_server_failures_total", "Failed attempts of requests to the server.", count, (*labels, ("kind", kind))
            )
        for outcome, count in sorted(server.health.weight_load_counts.items()):
            yield MetricSample(
                "charter_server_weight_loads_total",
                "Weights that this process has loaded into the server.",
                count,
                (*labels, ("outcome", outcome)),
            )


def collect_worker_metrics(worker: Worker) -> Iterator[MetricSample]:
    """Yield the metrics of a stage."""
    labels = (("run", worker.run_id), ("stage", worker.stage.name))
    yield MetricSample(
        "charter_records_read_total", "Records that the stage has processed and committed.", worker.num_committed, labels
    )
    yield MetricSample("charter_records_written_total", "Records that the stage has written.", worker.num_written, labels)
    yield MetricSample(
        "charter_transactions_total", "Transactions in which the stage has committed records.", worker.num_transactions, labels
    )
    yield MetricSample("charter_dead_letters_total", "Records that became dead letters.", worker.num_dead_letters, labels)
    yield MetricSample(
        "charter_erased_records_total", "Records of erased prompts that were skipped.", worker.num_erased, labels
    )
    yield MetricSample(
        "charter_duplicates_total",
        "Records that were skipped, because the first record of a key counts.",
        worker.num_duplicates,
        labels,
    )
    yield MetricSample("charter_pauses_total", "Pauses because a dependency was unavailable.", worker.num_pauses, labels)
    yield MetricSample(
        "charter_retry_waits_total",
        "Records for whose next attempt the whole stage waited (worker.max_uncommitted).",
        worker.num_waits_for_retry,
        labels,
    )
    yield MetricSample("charter_batches_total", "Batches that the stage has processed.", worker.num_batches, labels)
    yield MetricSample("charter_batch_seconds_total", "Seconds spent processing batches.", worker.batch_seconds, labels)
    yield MetricSample(
        "charter_tokens_total",
        "Prompt and completion tokens of the records that the stage has written.",
        worker.num_tokens,
        labels,
    )
    yield MetricSample(
        "charter_in_flight_records", "Records that the stage has read but not yet committed.", worker.num_in_flight, labels
    )
    yield MetricSample("charter_queued_records", "Records that wait for the model.", worker.num_queued, labels)
    if worker.pacing:
        yield MetricSample(
            "charter_holds_total", "Times that the stage held new prompts for a training loop.", worker.pacing.num_holds, labels
        )
        yield MetricSample(
            "charter_held_seconds_total",
            "Seconds in which the stage held new prompts for a training loop.",
            worker.pacing.get_held_s(),
            labels,
        )
        yield MetricSample(
            "charter_holding",
            "1 while the stage holds new prompts for a training loop.",
            bool(worker.pacing.held_since),
            labels,
        )
    yield MetricSample("charter_partitions", "Partitions assigned to this instance.", len(worker.positions), labels)
