"""Figures for Prometheus: an endpoint that reads the state of this process when it is asked, and costs nothing in between.

Every figure of a stage has the labels `run` and `stage`. Names end in their unit, counters in `_total`. A stage's lag is
counted in offsets from its last commit (on Kafka the marker of a transaction takes one too).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.errors import UsageError
from engine.worker import Worker

if TYPE_CHECKING:
    from consumers.sink import Sink

Labels = tuple[tuple[str, str], ...]


class Figure(NamedTuple):
    """One number as of now. A name that ends in `_total` is a counter, any other a gauge."""

    name: str
    help: str
    value: float
    labels: Labels = ()


Read = Callable[[], Iterable[Figure]]


@dataclass(frozen=True)
class Figures(Collector):
    """What `read` says when Prometheus asks."""

    read: Read

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for figure in self.read():
            kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
            names = [name for name, _ in figure.labels]
            family = families.setdefault(figure.name, kind(figure.name, figure.help, labels=names))
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([value for _, value in figure.labels], figure.value)
        yield from families.values()


def serve(host: str, port: int, read: Read) -> Callable[[], None]:
    """Answer at http://HOST:PORT/metrics from a thread of its own; returns what ends it. A taken port is a UsageError."""
    registry = CollectorRegistry()
    registry.register(Figures(read))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        why = "something else listens there" if error.errno == errno.EADDRINUSE else str(error)
        raise UsageError(
            f"the figures cannot be served at {host}:{port}", why, "give another port: --set observe.metrics_port=9465"
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def of_worker(worker: Worker) -> Iterator[Figure]:
    """A stage's figures."""
    labels = (("run", worker.run_id), ("stage", worker.stage.name))
    yield Figure("charter_records_read_total", "Records that the stage has finished and committed.", worker.committed, labels)
    yield Figure("charter_records_written_total", "Records that the stage has written.", worker.made, labels)
    yield Figure("charter_dead_letters_total", "Records that the stage gave up on.", worker.buried, labels)
    yield Figure("charter_pauses_total", "Pauses because a dependency was away.", worker.pauses, labels)
    yield Figure("charter_batches_total", "Batches that the stage has worked on.", worker.batches, labels)
    yield Figure("charter_batch_seconds_total", "Seconds spent working on batches.", worker.batch_s, labels)
    yield Figure("charter_tokens_total", "Tokens read and written by models, of the records made.", worker.tokens, labels)
    yield Figure("charter_in_flight_records", "Records that are read and not yet committed.", worker.in_flight, labels)
    yield Figure("charter_queued_records", "Records that wait for the model.", worker.queued, labels)
    yield Figure("charter_partitions", "Partitions that this copy has.", len(worker.positions), labels)


def of_sink(sink: Sink) -> Iterator[Figure]:
    """The sink's figures."""
    labels = (("run", "all"), ("stage", "sink"))
    yield Figure("charter_records_read_total", "Records that the stage has finished and committed.", sink.written, labels)
    yield Figure("charter_pauses_total", "Pauses because a dependency was away.", sink.pauses, labels)
    yield Figure("charter_batches_total", "Batches that the stage has worked on.", sink.flushes, labels)
    yield Figure("charter_batch_seconds_total", "Seconds spent working on batches.", sink.flush_s, labels)
