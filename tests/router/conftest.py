"""A fake worker on a real socket, and a client that speaks ASGI to the router in-process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tandem_router.api.app import RouterApp
from tandem_router.config import RouterConfig, parse_config
from two_tiers import TIERS

PIECES = ["Hello", " wor", "ld", ", ", "", "日本", "\n\n", '"data": ', "[DONE]", " é", "!", " 42"]


def token_text(token_id: int) -> str:
    """Text of one token; an empty piece stands for half a character that is held back."""
    return PIECES[token_id % len(PIECES)]


@dataclass
class Seen:
    """One request as the worker got it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass
class FakeWorker:
    """Answers like a worker: deterministic in (prompt, seed), resumable, and breakable.

    cut_after: bytes of the next streamed bodies after which the connection is reset, one entry
    per request; None leaves that request alone. refuse: (status, headers, body) instead of an
    answer, one per request.
    """

    num_tokens: int = 8
    served_model: str = "model"
    cut_after: list[int | None] = field(default_factory=list)
    refuse: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    ready: bool = True
    draining: bool = False
    # Bytes of the next stream after which the worker answers nobody any more.
    freeze_after: int | None = None
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    revision: str = ""
    token_ids_in_chunks: bool = True
    pause_s: float = 0.0
    write_size: int | None = None
    seen: list[Seen] = field(default_factory=list)
    num_disconnects: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def inference(self) -> list[Seen]:
        return [one for one in self.seen if one.path != "/v1/load"]

    async def start(self) -> FakeWorker:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0)

    # -- the model ---------------------------------------------------------------------------

    def tokens(self, body: dict[str, Any], seed: str, index: int) -> list[int]:
        prompt = json.dumps(body.get("messages", body.get("prompt")), sort_keys=True)
        digest = hashlib.sha256(f"{prompt}/{seed}/{index}".encode()).digest()
        limit = body.get("max_tokens") or self.num_tokens
        return [3 + digest[i % 32] % 97 for i in range(min(limit, self.num_tokens))]

    def events(self, seen: Seen) -> list[bytes]:
        body = seen.json
        chat = seen.path == "/v1/chat/completions"
        seed = str(body.get("seed", seen.headers.get("x-tandem-seed")))
        num_choices = body.get("n", 1)
        resume = body.get("tandem", {}).get("resume_token_ids") or [[]] * num_choices
        events: list[bytes] = []
        num_generated = 0

        def chunk(choices: list[dict[str, Any]], **extra: Any) -> None:
            payload = {
                "id": ("chatcmpl-" if chat else "cmpl-") + seen.headers["x-request-id"],
                "object": "chat.completion.chunk" if chat else "text_completion",
                "created": int(seen.headers["x-tandem-created"]),
                "model": seen.headers["x-tandem-model"],
                "choices": choices,
                **extra,
            }
            events.append(b"data: " + json.dumps(payload).encode() + b"\n\n")

        def choice(
            index: int, text: str, ids: list[int], finish: str | None, role: bool = False
        ) -> dict[str, Any]:
            entry: dict[str, Any] = {"index": index, "finish_reason": finish}
            if chat:
                entry["delta"] = {"role": "assistant", "content": ""} if role else {"content": text}
            else:
                entry["text"] = text
            if seen.headers.get("x-tandem-token-ids") == "1" and self.token_ids_in_chunks:
                entry["token_ids"] = ids
            return entry

        queues = []
        for index in range(num_choices):
            tokens = self.tokens(body, seed, index)
            done = resume[index]
            assert tokens[: len(done)] == done, "resumed with other tokens than were generated"
            if chat and not done:
                chunk([choice(index, "", [], None, role=True)])
            num_generated += len(tokens)
            queues.append((index, tokens, len(done)))
        for position in range(self.num_tokens):
            for index, tokens, start in queues:
                if start <= position < len(tokens):
                    chunk([choice(index, token_text(tokens[position]), [tokens[position]], None)])
        for index, _, _ in queues:
            chunk([choice(index, "", [], "length")])
        if seen.headers.get("x-tandem-usage") == "1" or (body.get("stream_options") or {}).get(
            "include_usage"
        ):
            usage = {"prompt_tokens": 5, "completion_tokens": num_generated}
            chunk([], usage={**usage, "total_tokens": 5 + num_generated})
        events.append(b"data: [DONE]\n\n")
        return events

    def whole(self, seen: Seen) -> bytes:
        body = seen.json
        seed = str(body.get("seed", seen.headers.get("x-tandem-seed")))
        choices = []
        total = 0
        for index in range(body.get("n", 1)):
            tokens = self.tokens(body, seed, index)
            total += len(tokens)
            text = "".join(map(token_text, tokens))
            choices.append({"index": index, "message": {"role": "assistant", "content": text}})
        usage = {"prompt_tokens": 5, "completion_tokens": total, "total_tokens": 5 + total}
        return json.dumps(
            {"model": seen.headers.get("x-tandem-model"), "choices": choices, "usage": usage}
        ).encode()

    # -- the server --------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(first.split(" ")[1], headers, body)
                self.seen.append(seen)
                if seen.path != "/v1/load":
                    self.asked.set()
                if not await self._answer(seen, writer):
                    writer.transport.abort()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_disconnects += 1
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if self.frozen.is_set():
            await asyncio.Event().wait()
        if seen.path == "/v1/load":
            load = {
                "ready": self.ready,
                "draining": self.draining,
                "num_running": 0,
                "revision": self.revision,
            }
            return await self._plain(writer, 200, {}, json.dumps(load).encode())
        if self.refuse:
            return await self._plain(writer, *self.refuse.pop(0))
        cut = self.cut_after.pop(0) if self.cut_after else None
        if seen.path in ("/tokenize", "/detokenize"):
            return await self._plain(writer, 200, {}, b'{"tokens": [1, 2]}')
        if not seen.json.get("stream"):
            body = self.whole(seen)
            if cut is not None:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                writer.write(body[:cut])
                await writer.drain()
                return False
            return await self._plain(writer, 200, {}, body)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        data = b"".join(self.events(seen))
        sent = data if cut is None else data[:cut]
        if self.freeze_after is not None:
            writer.write(b"%x\r\n%b\r\n" % (self.freeze_after, data[: self.freeze_after]))
            await writer.drain()
            self.frozen.set()
            await asyncio.Event().wait()
        size = self.write_size or len(sent) or 1
        for start in range(0, len(sent), size):
            part = sent[start : start + size]
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            if self.pause_s:
                await writer.drain()
                await asyncio.sleep(self.pause_s)
        if cut is not None:
            await writer.drain()
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _plain(
        self, writer: asyncio.StreamWriter, status: int, headers: dict[str, str], body: bytes
    ) -> bool:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{lines}"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        return True


@dataclass
class Reply:
    """What the client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """Parsed events; fails when the stream holds anything but whole events and [DONE]."""
        text = self.body.decode()
        assert text.endswith("\n\n"), text[-80:]
        payloads = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
        assert payloads[-1] == "[DONE]", payloads[-1]
        return [json.loads(payload) for payload in payloads[:-1]]

    def text(self, index: int = 0) -> str:
        parts = []
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                if choice["index"] == index:
                    delta = choice.get("delta")
                    parts.append(
                        choice["text"] if delta is None else delta.get("content", "") or ""
                    )
        return "".join(parts)

    def token_ids(self, index: int = 0) -> list[int]:
        return [
            token_id
            for chunk in self.chunks
            for choice in chunk["choices"]
            if choice["index"] == index
            for token_id in choice["token_ids"]
        ]


class Client:
    """Calls an ASGI application without a server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
    ) -> Reply:
        """leave_after: disconnect once so many body messages have come."""
        raw = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        left = asyncio.Event()
        inbox = [{"type": "http.request", "body": raw, "more_body": False}]
        status, reply_headers, parts = 0, {}, []
        num_messages = 0

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, reply_headers, num_messages
            if message["type"] == "http.response.start":
                status = message["status"]
                reply_headers = {k.decode(): v.decode() for k, v in message["headers"]}
                if leave_after == 0:
                    left.set()
            else:
                parts.append(message.get("body", b""))
                num_messages += 1
                last = not message.get("more_body", False)
                # A server says "disconnected" once a reply is complete, too.
                if last or (leave_after is not None and num_messages >= leave_after):
                    left.set()
            await asyncio.sleep(0)

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
            "client": ("test", 1),
            "server": ("test", 80),
            "scheme": "http",
            "root_path": "",
        }
        async with asyncio.timeout(20):
            await self.app(scope, receive, send)
        return Reply(status, reply_headers, b"".join(parts))

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def chat(
        self,
        content: str = "hello",
        *,
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
        **fields: Any,
    ) -> Reply:
        body = {"model": "chat", "messages": [{"role": "user", "content": content}], **fields}
        return await self.request(
            "POST", "/v1/chat/completions", body, headers, leave_after=leave_after
        )


CONFIG: dict[str, Any] = {
    "name": "chat",
    "tiers": TIERS,
    "fallback_tier": "large",
    "failover": {"wait_s": 2.0, "tier_wait_s": 0.05},
    "picking": {"load_poll_s": 0.05},
}


@pytest.fixture
def make_config() -> Callable[..., RouterConfig]:
    """The standard two tiers, with some fields replaced."""

    def make(**changes: Any) -> RouterConfig:
        return parse_config(json.dumps({**CONFIG, **changes}))

    return make


@pytest.fixture
async def make_worker() -> AsyncIterator[Callable[..., Any]]:
    """Start fake workers; all are stopped at the end."""
    workers: list[FakeWorker] = []

    async def make(**options: Any) -> FakeWorker:
        worker = await FakeWorker(**options).start()
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        await worker.stop()


@pytest.fixture
def run_router(make_config: Callable[..., RouterConfig], tmp_path: Any) -> Callable[..., Any]:
    """`async with run_router({"large": {"decode": [worker]}}) as (client, app)`."""

    @asynccontextmanager
    async def run(
        table: dict[str, dict[str, list[FakeWorker]]],
        *,
        background: bool = True,
        **changes: Any,
    ) -> AsyncIterator[tuple[Client, RouterApp]]:
        options = {
            name: changes.pop(name)
            for name in ("predictor", "peer_token", "key_secret")
            if name in changes
        }
        app = RouterApp(
            make_config(**changes),
            endpoints_path=tmp_path / "endpoints.json",
            rng=random.Random(7),
            **options,
        )
        urls = {
            tier: {role: tuple(worker.url for worker in workers) for role, workers in roles.items()}
            for tier, roles in table.items()
        }
        app.set_table(urls)
        if background:
            async with app.running():
                yield Client(app), app
        else:
            yield Client(app), app
            app.services.client.close()

    return run


@pytest.fixture
def token_text_of() -> Callable[[int], str]:
    return token_text
