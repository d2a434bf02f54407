"""A client that speaks ASGI to a router in the same process, and reads its replies."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


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
