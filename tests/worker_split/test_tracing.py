"""One trace through router, decode and prefill worker, by OpenTelemetry's own variables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from otlp_collector import Span, collecting
from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.telemetry.tracing import from_environment
from tandem_router.testing.asgi_client import Client

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAID = "words that no trace may hold"


def config() -> Any:
    return parse_config(
        json.dumps(
            {
                "name": "chat",
                "tiers": [{"name": "large", "served_model": "tiny"}],
                "fallback_tier": "large",
                "picking": {"load_poll_s": 0.05},
            }
        )
    )


async def test_one_trace_goes_through_router_decode_and_prefill_worker(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as (url, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        prefill, decode = await start("prefill", "decode")
        app = RouterApp(
            config(),
            endpoints_path=tmp_path / "endpoints.json",
            rng=random.Random(7),
            peer_token="split-secret",
            tracing=from_environment("tandem-router"),
        )
        app.set_table({"large": {"prefill": (prefill.url,), "decode": (decode.url,)}})
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        async with app.running():
            while any(worker.load is None for worker in app.picker.workers):
                app.services.workers_changed.clear()
                await app.services.workers_changed.wait()
            answer = await Client(app).request(
                "POST",
                "/v1/completions",
                json.dumps({"model": "chat", "prompt": [5] * 200, "max_tokens": 4}).encode(),
                headers=headers,
            )
            refused = await Client(app).request(
                "POST",
                "/v1/completions",
                json.dumps({"model": "nobody", "prompt": SAID, "max_tokens": 1}).encode(),
            )
        assert (answer.status, refused.status) == (200, 404)
        for worker in (decode, prefill):
            worker.kill(15)
            await worker.stop()
        by_name: dict[str, Span] = {s.name: s for s in spans if not s.failed}

    request_id = answer.headers["x-request-id"]
    router, decoded, filled = (
        by_name["completions chat"],
        by_name["decode"],
        by_name["prefill"],
    )
    assert {s.trace.hex() for s in (router, decoded, filled)} == {TRACE}
    assert router.parent.hex() == PARENT
    assert (decoded.parent, filled.parent) == (router.id, decoded.id)
    assert {s.service for s in (decoded, filled)} == {"tandem-worker"}
    assert router.service == "tandem-router"
    assert router.attributes["tandem.request_id"] == request_id
    assert decoded.attributes["tandem.request_id"] == request_id
    assert filled.attributes["tandem.request_id"].startswith(request_id)
    assert router.attributes["gen_ai.usage.input_tokens"] == 200
    assert decoded.attributes["gen_ai.usage.output_tokens"] == 4
    assert router.attributes["tandem.tier"] == "large"
    (failed,) = [s for s in spans if s.failed]
    assert failed.service == "tandem-router"
    assert not any(SAID in str(s) for s in spans)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_where_the_variables_do_not_ask_for_it(env: dict[str, str]) -> None:
    assert from_environment("tandem-router", env) is None
