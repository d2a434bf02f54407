"""Whose child a worker's span is, and that nothing is traced unasked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from otlp_collector import collecting
from tandem_worker.errors import RequestError
from tandem_worker.telemetry.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracing]:
    with collecting() as (url, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        tracing = Tracing()
        tracing.begin("tandem-worker")
        yield tracing
        tracing.close()


def test_a_peer_is_told_the_span_of_the_request_and_the_callers_trace(tracing: Tracing) -> None:
    with tracing.span("decode", {"traceparent": PARENT, "tracestate": "a=b"}, "r1"):
        of_sequence = tracing.headers("r1-0.7")
        assert tracing.headers("r1") == of_sequence
        assert tracing.headers("r2-0.1") == {}

    version, trace, span, _ = of_sequence["traceparent"].split("-")
    assert (version, trace) == tuple(PARENT.split("-")[:2])
    assert span != PARENT.split("-")[2]
    assert of_sequence["tracestate"] == "a=b"
    assert tracing.headers("r1") == {}


def test_an_error_passes_through_the_span(tracing: Tracing) -> None:
    with pytest.raises(RequestError), tracing.span("prefill", {}, "r1"):
        raise RequestError("no")


def test_nothing_is_traced_unasked() -> None:
    tracing = Tracing()
    tracing.begin("tandem-worker", {})
    with tracing.span("decode", {"traceparent": PARENT}, "r1"):
        assert tracing.headers("r1") == {}
    tracing.close()
