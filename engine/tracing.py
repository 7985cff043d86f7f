"""OpenTelemetry's trace context in record headers, as an option: one prompt's way through all stages is one trace.

A message that comes with a W3C `traceparent` header goes on with its trace; one without (a prompt) begins one. Each stage makes
a span for each record that it works on, and what it writes carries that span's context. Where spans go is said by
OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and the others); the headers are there also when nobody listens.
"""

from __future__ import annotations

from dataclasses import replace

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.bus.port import ConsumerRecord, ProducerRecord
from engine.logs import get_coordinates

_TRACE_HEADERS = ("traceparent", "tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """The spans of one process. `close` hands over what has not been sent yet."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self.provider = TracerProvider(resource=Resource.create({"service.name": "charter"}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter or make_otlp_exporter()))
        self.tracer = self.provider.get_tracer("charter")

    def make_stage_tracer(self, name: str, run_id: str) -> StageTracer:
        return StageTracer(self.tracer, name, run_id)

    def close(self) -> None:
        self.provider.shutdown()


class StageTracer:
    """Makes a span of the work on one message, and puts its context into what is written (a `Trace` of the worker)."""

    def __init__(self, tracer: trace.Tracer, stage: str, run_id: str) -> None:
        self.tracer, self.stage, self.run_id = tracer, stage, run_id

    def __call__(self, consumer_record: ConsumerRecord, outputs: list[ProducerRecord], started_ns: int) -> list[ProducerRecord]:
        came = {name: value.decode("ascii", "replace") for name, value in consumer_record.headers if name in _TRACE_HEADERS}
        about = {f"charter.{name}": str(value) for name, value in get_coordinates(consumer_record).items()}
        span = self.tracer.start_span(
            f"charter.{self.stage}",
            context=_PROPAGATOR.extract(came),
            kind=trace.SpanKind.CONSUMER,
            start_time=started_ns,
            attributes=about | {"charter.run": self.run_id, "messaging.system": "kafka"},
        )
        carried: dict[str, str] = {}
        _PROPAGATOR.inject(carried, trace.set_span_in_context(span))
        span.end()
        headers = tuple((name, value.encode("ascii")) for name, value in carried.items())
        return [replace(output, headers=(*output.headers, *headers)) for output in outputs]


def make_otlp_exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
