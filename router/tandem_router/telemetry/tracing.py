"""Traces of requests by OpenTelemetry's standard variables; without them nothing is even imported.

One span per request, child of the client's `traceparent` where it sends one, and its parent to
workers of ours. No prompt and no answer is in it. A provider gets no trace header.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("tandem.router")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_CARRIED = (b"traceparent", b"tracestate")

Headers = Iterable[tuple[bytes, bytes]]


def from_environment(service: str, env: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing as the variables say; None where they ask for none."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if env.get("OTEL_TRACES_EXPORTER", "otlp") == "none" or not any(map(env.get, ENDPOINTS)):
        return None
    try:
        return Tracing(service)
    except ImportError as error:
        logger.warning("no traces: %s; install tandem[otel] to have them", error)
        return None


class Tracing:
    """The open spans of one router, by request."""

    def __init__(self, service: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # The variables of the user, OTEL_SERVICE_NAME among them, win over ours.
        name = {"service.name": service} if "OTEL_SERVICE_NAME" not in os.environ else {}
        self._provider = TracerProvider(resource=Resource.create(name))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("tandem.router")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace
        self._open: dict[str, Span] = {}

    def begin(self, request_id: str, name: str, headers: Headers) -> None:
        """Open the span of a request."""
        given = {k.decode(): v.decode("latin-1") for k, v in headers if k in _CARRIED}
        parent = self._propagator.extract(given)
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(name, parent, kind)
        span.set_attribute("tandem.request_id", request_id)
        self._open[request_id] = span

    def headers(self, request_id: str) -> list[tuple[bytes, bytes]]:
        """What tells a worker whose child its span is."""
        span = self._open.get(request_id)
        if span is None:
            return []
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return [(k.encode(), v.encode()) for k, v in carrier.items()]

    def note(self, request_id: str, attributes: Mapping[str, Any]) -> None:
        """Say more of a request; what is None is left out."""
        span = self._open.get(request_id)
        if span is not None:
            span.set_attributes({k: v for k, v in attributes.items() if v is not None})

    def event(self, request_id: str, name: str, attributes: Mapping[str, Any]) -> None:
        """Say what happened on the way."""
        span = self._open.get(request_id)
        if span is not None:
            span.add_event(name, dict(attributes))

    def end(self, request_id: str, error: str | None = None) -> None:
        """Close the span of a request; again is nothing."""
        span = self._open.pop(request_id, None)
        if span is None:
            return
        if error is not None:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
