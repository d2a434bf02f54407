"""Targets behind a connection: a router, its settings, its providers, a gateway."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing import Finding, Target
from tandem_router.api.app import RouterApp
from tandem_router.api.inference import POSTS
from tandem_router.config import parse_config
from tandem_router.testing.fake_agent import FakeAgent
from tandem_router.testing.fake_server import FakeServer, Seen
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.live_router import LiveRouter, live_router

PEER = "x-tandem-peer-token: token"
TURN = {"role": "user", "content": "hello"}
PATIENCE_S = 0.03
OWN_FAILURES = (b"502", b"503", b"504")
"""Of a tier that answered badly or not at all."""


def request(method: str, path: str, fields: Any = None, *more: str) -> bytes:
    """A whole request, the only one of its connection."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *more, "connection: close"]
    data = b"" if fields is None else json.dumps(fields).encode()
    if fields is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def sent(port: int, data: bytes, patience_s: float = PATIENCE_S) -> bytes:
    """What the server says until it closes the connection. Raises Finding where it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        reply = b""
        try:
            connection.sendall(data)
            # Who has closed its side is no longer answered; half a request is never.
            while part := _received(connection, patience_s):
                reply += part
        except TimeoutError as error:
            raise Finding("no reply and no end of the connection") from error
        except OSError:  # reset, or closed before we did
            return reply
    return reply


def _received(connection: socket.socket, patience_s: float) -> bytes:
    """More of a reply; after a while of nothing the server is told that no more comes."""
    connection.settimeout(patience_s)
    try:
        return connection.recv(65536)
    except TimeoutError:
        connection.settimeout(20.0)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536)


def ask(port: int, data: bytes) -> None:
    """One client's connection. Raises Finding for a bad reply."""
    reply = sent(port, data)
    if reply and not reply.startswith(b"HTTP/1.1 "):
        raise Finding(f"the reply is no HTTP: {reply[:80]!r}")
    if reply[9:10] == b"5" and reply[9:12] not in OWN_FAILURES:
        raise Finding(f"status {reply[9:12]!r}: {reply[-300:]!r}")
    if b"Traceback" in reply or b".py" in reply.replace(b"python", b""):
        raise Finding(f"a stack trace: {reply[-300:]!r}")


# -- a router --------------------------------------------------------------------------------------


@contextmanager
def router(provider: FakeServer, **options: Any) -> Iterator[tuple[LiveRouter, int]]:
    """A router before a provider, which starts with it; its port."""

    async def app() -> RouterApp:
        await provider.start()
        tier = {"name": "t", "served_model": "m", "kind": "external", "url": f"{provider.url}/v1"}
        config = {"name": "chat", "tiers": [tier], "fallback_tier": "t", **options}
        return RouterApp(parse_config(json.dumps(config)), peer_token="token")

    with live_router(app) as running:
        yield running, int(running.url.rpartition(":")[2])


def asking() -> list[bytes]:
    """Requests of clients to every path that takes a body, and some that do not."""
    body = {"model": "chat", "max_tokens": 4, "prompt": "a", "input": "a", "messages": [TURN]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bodies: list[Any] = [body, {**body, "stream": True}]
    bodies += [{**body, "tools": tools, "stop": ["x"], "n": 2}]
    bodies += [{"prompt": [[1, 2], [3]], "model": "t", "logprobs": 1, "echo": True}]
    seeds = []
    for path in sorted(POSTS):
        seeds += [request("POST", path, fields) for fields in bodies]
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        packed = f"{head}transfer-encoding: chunked\r\n\r\n{len(data):x}\r\n".encode()
        seeds.append(packed + data + b"\r\n0\r\n\r\n")
    for path in ("/", "/v1/models", "/v1/models/t", "/openapi.json", "/errors/queue_full"):
        seeds.append(request("GET", path, None, "range: bytes=0-1"))
    part = {"type": "input_text", "text": "hello"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    done = {"type": "function_call_output", "call_id": "c", "output": "42"}
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    response = {"model": "chat", "input": [{"role": "user", "content": [part]}, call, done]}
    response |= {"tools": [flat], "text": {"format": {"type": "json_object"}}, "stream": True}
    seen = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
    told = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "4"}]}
    talk = [TURN, {"role": "assistant", "content": [seen]}, {"role": "user", "content": [told]}]
    tool = {"name": "f", "input_schema": {"type": "object"}}
    message = {"model": "chat", "max_tokens": 4, "messages": talk, "tools": [tool]}
    message |= {"system": [{"type": "text", "text": "be brief"}], "stop_sequences": ["x"]}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    seeds += [
        request("POST", "/v1/responses", response),
        request("POST", "/v1/messages", message, "anthropic-version: 2023-06-01"),
        request("POST", "/v1/messages", {**message, "stream": True}, "x-api-key: k"),
        request("POST", "/v1/embeddings", {"model": "t", "input": ["a", [1]], "dimensions": 4}),
        request("POST", "/v1/feedback", {"request_id": "r", "score": 1}),
        request("POST", "/v1/chat/completions", {"messages": [{**TURN, "content": [image]}]}),
    ]
    return seeds


@contextmanager
def http() -> Iterator[tuple[Target, list[bytes]]]:
    """A whole router on a real port; the bytes are a client's connection."""
    with router(FakeAgent()) as (_, port):
        # A verdict is read to its end only where the request is known.
        told = sent(port, request("POST", "/v1/chat/completions", {"messages": [TURN]}), 9.0)
        known = told.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
        verdict = request("POST", "/v1/feedback", {"request_id": known, "score": 1})

        yield (lambda data: ask(port, data)), [*asking(), verdict]


@contextmanager
def admin() -> Iterator[tuple[Target, list[bytes]]]:
    """The same with tenants and a store: what an operator sets, reads and mints."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.sqlite"

        async def app() -> RouterApp:
            provider = await FakeAgent().start()
            tier = {"name": "t", "served_model": "m", "kind": "external"}
            tier |= {"url": f"{provider.url}/v1"}
            config = {"name": "chat", "tiers": [tier], "fallback_tier": "t"}
            config |= {"tenants": [{"name": "a"}], "store": {"type": "sqlite"}}
            return RouterApp(
                parse_config(json.dumps(config)),
                peer_token="token",
                key_secret=b"0123456789abcdef",
                store_file=store,
            )

        with live_router(app) as running:
            port = int(running.url.rpartition(":")[2])
            told = sent(port, request("POST", "/admin/keys", {"tenant": "a"}, PEER), 9.0)
            minted = json.loads(told.partition(b"\r\n\r\n")[2])
            key = f"authorization: Bearer {minted['key']}"
            limits = {"max_concurrency": 3, "requests_per_minute": 9.0, "expires_in_s": 60.0}
            limits |= {"tokens_per_minute": None, "usd_per_hour": 1.0}
            label = {"request_id": "r", "quality": {"t": 1.0}, "probability": 0.5}
            tier = {"t": {"usd_per_1m_output_tokens": 2.0}}
            paths = ("state", "decisions?limit=2&after=0&before=1", "decisions/x", "spend", "keys")
            paths += ("spend?since=2026-01-01", "labels?since=0&limit=5", "settings")
            seeds = [request("GET", f"/admin/{path}", None, PEER) for path in paths]
            seeds += [
                request("PUT", "/admin/set-points", {"gain_threshold": 0.1}, PEER),
                request("PUT", "/admin/settings", {"tiers": tier, "limits": {}}, PEER),
                request("PUT", "/admin/settings", {"tenants": [{"name": "a"}]}, PEER),
                request("POST", "/admin/keys", {"tenant": "a", **limits}, PEER),
                request("PATCH", f"/admin/keys/{minted['id']}", limits, PEER),
                request("DELETE", "/admin/keys/none", None, PEER),
                request("POST", "/admin/labels", {"labels": [label]}, PEER),
                request("GET", "/metrics", None, PEER),
                request("GET", "/admin/state", None, "authorization: Basic OnRva2Vu"),
                request("POST", "/v1/chat/completions", {"messages": [TURN]}, key),
                request("POST", "/v1/feedback", {"request_id": "r", "score": 0}, key),
            ]

            yield (lambda data: ask(port, data)), seeds


@dataclass(eq=False)
class HostileProvider(FakeServer):
    """Says the same bytes to everybody, and hangs up."""

    reply: bytes = field(default=b"")

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        writer.write(self.reply)
        await writer.drain()
        writer.close()
        return True


@contextmanager
def provider() -> Iterator[tuple[Target, list[bytes]]]:
    """What a provider replies, to a client of each of the router's APIs."""
    said = {"role": "assistant", "content": "Hello"}
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    choice = {"index": 0, "finish_reason": "stop", "message": said, "logprobs": None}
    whole = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
    tools = {**whole, "choices": [{**choice, "message": {"tool_calls": [called]}}]}
    text = {"choices": [{"index": 0, "text": "Hello", "finish_reason": "length"}], "usage": usage}
    vector = {"object": "list", "data": [{"index": 0, "embedding": [0.1, 0.2]}], "usage": usage}
    error = {"error": {"message": "no", "type": "server_error", "code": "boom"}}
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "Hel"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{**called, "index": 0}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    stream = b"".join(b"data: %s\n\n" % json.dumps(each).encode() for each in events)
    stream += b"data: [DONE]\n\n"

    def reply(status: str, data: bytes, kind: str = "application/json", *more: str) -> bytes:
        lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", *more]
        return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data

    def as_json(fields: Any, status: str = "200 OK", *more: str) -> bytes:
        return reply(status, json.dumps(fields).encode(), "application/json", *more)

    kind = "text/event-stream"
    chunked = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
    seeds = [
        *(as_json(each) for each in (whole, tools, text, vector, error)),
        *(as_json(error, status, "retry-after: 1") for status in ("429 Slow", "400 Bad", "500 x")),
        reply("200 OK", stream, kind),
        chunked.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(stream), stream),
        reply("302 Found", b"", "text/html", "location: http://169.254.169.254/"),
        as_json(whole, "200 OK", "content-encoding: gzip"),
    ]
    chat, fields = "/v1/chat/completions", {"model": "chat", "messages": [TURN], "max_tokens": 4}
    tool = {"name": "f", "input_schema": {"type": "object"}}
    clients = [
        request("POST", chat, fields),
        request("POST", chat, {**fields, "stream": True}),
        request("POST", "/v1/completions", {"model": "chat", "prompt": "a"}),
        request("POST", "/v1/responses", {"model": "chat", "input": "a"}),
        request("POST", "/v1/responses", {"model": "chat", "input": "a", "stream": True}),
        request("POST", "/v1/messages", {**fields, "tools": [tool]}),
        request("POST", "/v1/messages", {**fields, "stream": True}),
        request("POST", "/v1/embeddings", {"model": "t", "input": "a"}),
    ]
    hostile = HostileProvider()
    # Else bad answers take the provider out of service, and the next bytes are not asked for.
    patient = {"outliers": {"consecutive_failures": 1_000_000}, "stall_timeout_s": 2.0}
    with router(hostile, failover={**patient, "wait_s": 4.0}) as (_, port):
        number = 0

        def read(data: bytes) -> None:
            nonlocal number
            hostile.reply = data
            hostile.seen.clear()
            number += 1
            ask(port, clients[number % len(clients)])

        yield read, seeds


# -- a gateway's endpoint picker -------------------------------------------------------------------


@contextmanager
def gateway() -> Iterator[tuple[Target, list[bytes]]]:
    """Messages of Envoy's external processing, each after its length, through one conversation."""
    from google.protobuf.message import DecodeError

    from tandem_router.errors import ApiError
    from tandem_router.gateway.messages import ProcessingRequest
    from tandem_router.gateway.session import ProtocolError, Session

    async def app() -> RouterApp:
        worker = await FakeWorker().start()
        config = {"name": "chat", "tiers": [{"name": "t", "served_model": "m"}]}
        endpoints = Path(folder) / "endpoints.json"
        endpoints.write_text(json.dumps({"tiers": {"t": {"unified": [worker.url]}}}))
        text = json.dumps({**config, "fallback_tier": "t"})
        return RouterApp(parse_config(text), endpoints_path=endpoints, peer_token="token")

    def packed(*messages: Any) -> bytes:
        parts = [each.SerializeToString() for each in messages]
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    def headers(side: str, end: bool = False, **named: str) -> Any:
        message = ProcessingRequest()
        held = getattr(message, f"{side}_headers")
        for name, value in named.items():
            name = f":{name}" if name in ("path", "method", "status") else name.replace("_", "-")
            held.headers.headers.add(key=name, raw_value=value.encode())
        held.end_of_stream = end
        if side == "request":
            entry = message.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
            entry.value.update({"x-gateway-destination-endpoint-subset": "127.0.0.1"})
        return message

    def body(side: str, data: bytes, end: bool = True) -> Any:
        message = ProcessingRequest()
        part = getattr(message, f"{side}_body")
        part.body, part.end_of_stream = data, end
        return message

    def messages(data: bytes) -> list[Any]:
        found = []
        while len(data) > 4:
            size = int.from_bytes(data[:4], "big")
            found.append(ProcessingRequest.FromString(data[4 : 4 + size]))
            data = data[4 + size :]
        return found

    asked = json.dumps({"model": "t", "messages": [TURN], "stream": True}).encode()
    post = {"path": "/v1/chat/completions", "method": "POST", "content_type": "application/json"}
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\ndata: [DONE]\n\n'
    whole = json.dumps({"choices": [{"index": 0, "message": {"content": "a"}}], "usage": {}})
    trailers = ProcessingRequest()
    trailers.request_trailers.SetInParent()
    ok, asks = headers("response", status="200"), headers("request", **post)
    conversations = [
        [asks, body("request", asked), ok, body("response", event[:30], False)],
        [asks, body("request", asked), ok, body("response", event)],
        [asks, body("request", asked.replace(b"true", b"false")), ok],
        [asks, body("request", asked[:9], False), trailers],
        [asks, body("request", asked), headers("response", True, status="500")],
        [headers("request", end=True, path="/v1/models", method="GET")],
    ]
    conversations[2].append(body("response", whole.encode()))
    seeds = [packed(*each) for each in conversations]

    with tempfile.TemporaryDirectory() as folder, live_router(app) as running:

        async def converse(said: list[Any]) -> None:
            assert running.app is not None
            left = iter(said)

            async def receive() -> Any:
                return next(left, None)

            async def send(_: Any) -> None:
                return None

            try:
                await Session(running.app.front("127.0.0.1:1"), receive, send).run()
            except (ProtocolError, ApiError):
                return
            finally:
                ledger = running.app.services.ledger
                if ledger.num_inflight:
                    raise Finding(f"{ledger.num_inflight} requests are held for ever")

        def read(data: bytes) -> None:
            try:
                said = messages(data)
            except DecodeError:
                return
            running.run(converse(said))

        yield read, seeds
