"""OpenTelemetry traces: a span a request and one for each of its stages, made once the request is over."""

from __future__ import annotations

import time
from typing import Any

from convoynet.server.observing.observer import Finished
from convoynet.server.observing.stage_times import intervals
from convoynet.server.observing.trace_settings import TraceSettings

_SERVICE = "inference.GRPCInferenceService"
# What OpenTelemetry's conventions call an error of the server; the others are the client's.
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_EXPORT_TIMEOUT_S = 5


class Tracing:
    """An observer that sends spans to a collector, in batches from a thread of its own."""

    def __init__(self, endpoint: str, version: str, settings: TraceSettings) -> None:
        """Starts the exporter; the collector need not be there yet.

        Args:
            endpoint: The collector's URL; https:// for TLS.
            version: The server's, for the resource.
            settings: Which requests are traced.

        Raises:
            ValueError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError("--otlp-endpoint needs OpenTelemetry: pip install 'convoynet[otel]'") from error
        self._settings = settings
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "convoy", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("convoy", version)

    def finished(self, request: Finished) -> None:
        """Makes the request's spans if it is to be traced (convoynet.server.observing.observer.Observer)."""
        context, sampled = self._parent(request)
        if not self._settings.wants(request.model, sampled):
            return
        now = time.perf_counter_ns()
        to_epoch = time.time_ns() - now
        span = self._tracer.start_span(
            f"{_SERVICE}/{request.rpc}",
            context,
            self._trace.SpanKind.SERVER,
            _attributes(request),
            start_time=request.call.arrived + to_epoch,
        )
        request.trace_id = f"{span.get_span_context().trace_id:032x}"
        if request.code in _SERVER_ERRORS:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(request.error)))
        if request.call.result:
            inside = self._trace.set_span_in_context(span)
            for name, begin, end in intervals(request.call.result.timings, now):
                self._tracer.start_span(name, inside, start_time=begin + to_epoch).end(end + to_epoch)
        span.end(now + to_epoch)

    def close(self) -> None:
        """Sends what is left and stops; waits for that, at most a few seconds."""
        self._provider.shutdown()

    def _parent(self, request: Finished) -> tuple[Any, bool | None]:
        """The client's W3C trace context, and whether it samples; (None, None) without one."""
        traceparent = request.call.header("traceparent")
        if not traceparent:
            return None, None
        carrier = {"traceparent": traceparent, "tracestate": request.call.header("tracestate")}
        context = self._propagator.extract(carrier)
        parent = self._trace.get_current_span(context).get_span_context()
        return (context, parent.trace_flags.sampled) if parent.is_valid else (None, None)


def _attributes(request: Finished) -> dict[str, str | int]:
    """Names of OpenTelemetry's conventions for RPC, and our own under `convoy.`."""
    result = request.call.result
    attributes: dict[str, str | int] = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{_SERVICE}/{request.rpc}",
        "rpc.response.status_code": request.code,
        "network.protocol.name": request.call.protocol,
        "convoy.request.id": request.id,
        "convoy.model.name": request.model,
        "convoy.model.version": result.version if result else request.version,
    }
    if result:
        attributes["convoy.rows"] = result.rows
    if request.code != "OK":
        attributes["error.type"] = request.code
    return {name: value for name, value in attributes.items() if value != ""}
