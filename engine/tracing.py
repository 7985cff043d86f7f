"""Write OpenTelemetry trace context into record headers (optional). All records of a prompt belong to one trace.

A record with a W3C `traceparent` header continues the trace of this header. A record without the header (a prompt) starts a
trace. Each stage creates a span for each record that it processes, and writes the context of the span into the headers of its
outputs. OpenTelemetry's environment variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and others) set the destination of spans. The
headers are also written if no collector is running.
"""

from __future__ import annotations

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
    """The tracer provider of one process. `close` exports the remaining spans."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self.provider = TracerProvider(resource=Resource.create({"service.name": "charter"}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter or make_otlp_exporter()))
        self.tracer = self.provider.get_tracer("charter")

    def make_stage_tracer(self, name: str, run_id: str) -> StageTracer:
        return StageTracer(self.tracer, name, run_id)

    def close(self) -> None:
        self.provider.shutdown()


class StageTracer:
    """Creates a span for each processed record, and adds the context of the span to the outputs (a `TraceFunction`)."""

    def __init__(self, tracer: trace.Tracer, stage: str, run_id: str) -> None:
        self.tracer, self.stage, self.run_id = tracer, stage, run_id

    def __call__(self, consumer_record: ConsumerRecord, outputs: list[ProducerRecord], started_ns: int) -> list[ProducerRecord]:
        incoming = {name: value.decode("ascii", "replace") for name, value in consumer_record.headers if name in _TRACE_HEADERS}
        attributes = {f"charter.{name}": str(value) for name, value in get_coordinates(consumer_record).items()}
        span = self.tracer.start_span(
            f"charter.{self.stage}",
            context=_PROPAGATOR.extract(incoming),
            kind=trace.SpanKind.CONSUMER,
            start_time=started_ns,
            attributes=attributes | {"charter.run": self.run_id, "messaging.system": "kafka"},
        )
        outgoing: dict[str, str] = {}
        _PROPAGATOR.inject(outgoing, trace.set_span_in_context(span))
        span.end()
        headers = tuple((name, value.encode("ascii")) for name, value in outgoing.items())
        return [output._replace(headers=(*output.headers, *headers)) for output in outputs]


def make_otlp_exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
