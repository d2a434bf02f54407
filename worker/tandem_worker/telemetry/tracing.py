"""Traces by OpenTelemetry's standard variables; nothing is imported or done without them.

Callers say by `traceparent` and `tracestate` (W3C) whose child a span is: that of a decode worker
is its router's, that of a prefill worker the decode worker's. No prompt and no answer is in it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """The open spans of one worker, by request; does nothing until it is `begin`-ed."""

    def __init__(self) -> None:
        self._open: dict[str, Span] = {}
        self._provider: Any = None

    def begin(self, service: str, env: Mapping[str, str] = os.environ) -> None:
        """Trace from now on, where the variables ask for it."""
        if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return
        if env.get("OTEL_TRACES_EXPORTER", "otlp") == "none" or not any(map(env.get, ENDPOINTS)):
            return
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            logger.warning("no traces: %s; install tandem[otel] to have them", error)
            return
        # The variables of the user, OTEL_SERVICE_NAME among them, win over ours.
        name = {"service.name": service} if "OTEL_SERVICE_NAME" not in env else {}
        self._provider = TracerProvider(resource=Resource.create(name))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("tandem.worker")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def span(
        self, name: str, headers: Mapping[str, str], request_id: str
    ) -> AbstractContextManager[None]:
        """A span for as long as the body runs; an error that leaves it is said in it."""
        if self._provider is None:
            return nullcontext()
        return self._span(name, headers, request_id)

    @contextmanager
    def _span(self, name: str, headers: Mapping[str, str], request_id: str) -> Iterator[None]:
        parent = self._propagator.extract(headers)
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(name, parent, kind)
        span.set_attribute("tandem.request_id", request_id)
        self._open[request_id] = span
        try:
            yield
        except Exception as error:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
            raise
        finally:
            self._open.pop(request_id, None)
            span.end()

    def note(self, request_id: str, attributes: Mapping[str, Any]) -> None:
        """Say more of a request; what is None is left out."""
        span = self._open.get(request_id)
        if span is not None:
            span.set_attributes({k: v for k, v in attributes.items() if v is not None})

    def headers(self, sequence_id: str) -> dict[str, str]:
        """What tells a peer whose child its span is; of a request, or of one of its sequences."""
        if self._provider is None:
            return {}
        span = self._open.get(sequence_id) or self._open.get(sequence_id.rpartition("-")[0])
        carrier: dict[str, str] = {}
        if span is not None:
            self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
