"""What the control loop reads of a query's answer, and whom it asks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs

import pytest

from tandem_operator.reconcile.prometheus import QueryError, number_of, queried, query_prometheus
from tandem_operator.resources import Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec

POOL = ("large", "decode")
ROUTER = Router.model_validate(
    {
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {"tiers": [{"name": "large", "modelRef": {"name": "m"}}]},
    }
)


def answer(result: Any, kind: str = "vector") -> Any:
    return {"status": "success", "data": {"resultType": kind, "result": result}}


def policy(query: str) -> AutoscalingPolicySpec:
    signal = {"name": "Prometheus", "target": "10"}
    return AutoscalingPolicySpec.model_validate({"query": query, "decode": {"signals": [signal]}})


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (answer([{"metric": {}, "value": [1.0, "45"]}]), 45.0),
        (answer([1.0, "4.5"], "scalar"), 4.5),
    ],
)
def test_one_series_or_a_scalar_is_a_number(body: Any, number: float) -> None:
    assert number_of(body) == number


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (answer([]), "0 series instead of one"),
        (answer([{"value": [1, "1"]}, {"value": [1, "2"]}]), "2 series instead of one"),
        (answer([{"value": [1, "NaN"]}]), "nan is no number"),
        (answer([{"value": [1, "+Inf"]}]), "inf is no number"),
        (answer([{"value": None}]), "no number but None"),
        (answer([], "matrix"), "a matrix instead"),
        (answer("x", "string"), "a string instead"),
        ({"status": "error", "error": "parse error"}, "Prometheus says: parse error"),
        ([], "no object"),
        ({"status": "success", "data": None}, "a None instead"),
    ],
)
def test_anything_else_is_told(body: Any, why: str) -> None:
    with pytest.raises(QueryError, match=why.replace("+", "[+]")):
        number_of(body)


class Fake(BaseHTTPRequestHandler):
    """A Prometheus that knows one number."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode()
        self.asked.append(f"{self.path} {parse_qs(text)['query'][0]}")
        body = json.dumps(answer([{"metric": {}, "value": [1.0, "30"]}])).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/prefix/"
    server.shutdown()
    server.server_close()
    thread.join()


async def test_names_are_filled_in_and_equal_queries_asked_once(url: str) -> None:
    Fake.asked.clear()

    async def ask(server: str, query: str) -> float:
        return await query_prometheus(server, query)

    both = [("large", "decode"), ("small", "decode"), ("large", "prefill")]
    said = await queried(
        url, ROUTER, policy('q{n="$namespace",r="$router",t="$tier",o="$role"}'), both, ask
    )
    same = await queried(url, ROUTER, policy("up"), both, ask)

    assert said == {("large", "decode"): 30.0, ("small", "decode"): 30.0} == same
    assert sorted(Fake.asked) == [
        '/prefix/api/v1/query q{n="team",r="chat",t="large",o="decode"}',
        '/prefix/api/v1/query q{n="team",r="chat",t="small",o="decode"}',
        "/prefix/api/v1/query up",
    ]


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("", "set operator.prometheusUrl"),
        ("http://127.0.0.1:9", "does not answer"),
        ("http://[", "does not answer"),
    ],
)
async def test_a_prometheus_that_is_not_there_is_told(server: str, why: str) -> None:
    said = await queried(server, ROUTER, policy("up"), [POOL])

    assert why in str(said[POOL])


async def test_without_a_query_nobody_is_asked() -> None:
    async def ask(server: str, query: str) -> float:
        raise AssertionError(query)

    assert await queried("http://x", ROUTER, None, [POOL], ask) == {}
    assert await queried("http://x", ROUTER, AutoscalingPolicySpec(), [POOL], ask) == {}
