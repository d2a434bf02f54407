"""A client of a router in the same process: through the router's own server, without a socket.

A request that is to be left in the middle speaks plain ASGI instead, as any other server would.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httptools

from tandem_router.http.server import Listener, ServerLimits


@dataclass
class Reply:
    """What the client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        return fields

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

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


class _Wire:
    """The transport of a connection without a socket; reads the reply that is written to it."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self._parser = httptools.HttpResponseParser(self)

    def write(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self.abort()

    def get_extra_info(self, name: str) -> Any:
        return ("test", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        return self.done.done()

    def abort(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    close = write_eof = abort

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Client:
    """Calls a router without a socket."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._protocol: Any = Listener(ServerLimits()).protocol()
        self._state = SimpleNamespace(
            connections=set(), tasks=set(), total_requests=0, default_headers=[]
        )

    async def _served(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        config = SimpleNamespace(loaded=True, loaded_app=self.app)
        loop, wire = asyncio.get_running_loop(), _Wire()
        connection = self._protocol(config, self._state, {}, loop)
        connection.connection_made(wire)
        sent = {"host": "test", **{name.lower(): value for name, value in headers.items()}}
        if body or method != "GET":
            sent.setdefault("content-length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {sent[name]}" for name in sent), "", ""]
        before = set(self._state.tasks)
        connection.data_received("\r\n".join(lines).encode() + body)
        task = next(iter(self._state.tasks - before), None)
        try:
            async with asyncio.timeout(20):
                await wire.done
        finally:
            connection.connection_lost(None)
            if task is not None:
                async with asyncio.timeout(20):
                    while task in self._state.tasks:  # noqa: ASYNC110 what is accounted after the last byte
                        await asyncio.sleep(0)
        return Reply(wire.status, wire.headers, wire.body)

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
        if leave_after is None and method != "HEAD":
            return await self._served(method, path, raw, headers or {})
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
